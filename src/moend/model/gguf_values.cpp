// Typed access to the checked keys of a GGUF file.
#include <cmath>
#include <cstring>
#include <limits>

#include "moend/model/gguf.h"

namespace moend {
namespace {

template <class T>
T Load(const uint8_t* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(T));
  return value;
}

// Element `i` of an integer value; nullopt for other types and for what an int64_t cannot hold.
std::optional<int64_t> IntegerAt(const GgufValue& v, int64_t i) {
  const uint8_t* p = v.bytes.data();
  switch (v.type) {
    case GgufType::kUint8:
      return p[i];
    case GgufType::kInt8:
      return static_cast<int8_t>(p[i]);
    case GgufType::kUint16:
      return Load<uint16_t>(p + 2 * i);
    case GgufType::kInt16:
      return Load<int16_t>(p + 2 * i);
    case GgufType::kUint32:
      return Load<uint32_t>(p + 4 * i);
    case GgufType::kInt32:
      return Load<int32_t>(p + 4 * i);
    case GgufType::kInt64:
      return Load<int64_t>(p + 8 * i);
    case GgufType::kUint64:
      if (const auto u = Load<uint64_t>(p + 8 * i); u <= static_cast<uint64_t>(INT64_MAX))
        return static_cast<int64_t>(u);
      return {};
    default:
      return {};
  }
}

std::unexpected<Error> Missing(const GgufFile& file, std::string_view key) {
  return Fail(ErrorCode::kCorrupt, "{} lacks the key {}, which a model of its kind must have", file.path(),
              key);
}

std::unexpected<Error> WrongType(const GgufFile& file, std::string_view key, const GgufValue& v,
                                 const char* wanted) {
  return Fail(ErrorCode::kCorrupt, "{}: key {} is of type {}{} instead of {}", file.path(), key,
              v.is_array ? "array of " : "", Name(v.type), wanted);
}

}  // namespace

const GgufValue* GgufFile::Find(std::string_view key) const {
  const auto it = values_.find(key);
  return it == values_.end() ? nullptr : &it->second;
}

const GgufTensor* GgufFile::FindTensor(std::string_view name) const {
  const auto it = tensor_index_.find(name);
  return it == tensor_index_.end() ? nullptr : &tensors_[static_cast<std::size_t>(it->second)];
}

Expected<int64_t> GgufFile::Integer(std::string_view key, int64_t low, int64_t high,
                                    std::optional<int64_t> fallback) const {
  const GgufValue* v = Find(key);
  if (v && v->is_array) return WrongType(*this, key, *v, "an integer");
  return SameInteger(key, 1, low, high, fallback);
}

Expected<int64_t> GgufFile::SameInteger(std::string_view key, int64_t count, int64_t low, int64_t high,
                                        std::optional<int64_t> fallback) const {
  const GgufValue* v = Find(key);
  if (!v) {
    if (fallback) return *fallback;
    return Missing(*this, key);
  }
  if (v->is_array && v->count != count)
    return Fail(ErrorCode::kCorrupt, "{}: key {} has {} values instead of {}", path_, key, v->count, count);
  std::optional<int64_t> first;
  for (int64_t i = 0; i < v->count; ++i) {
    const std::optional<int64_t> value = IntegerAt(*v, i);
    if (!value) {
      if (v->type == GgufType::kUint64)
        return Fail(ErrorCode::kCorrupt, "{}: key {} is larger than {}", path_, key, high);
      return WrongType(*this, key, *v, "an integer");
    }
    if (*value < low || *value > high)
      return Fail(ErrorCode::kCorrupt, "{}: key {} is {}, outside {} to {}", path_, key, *value, low, high);
    if (first && *first != *value)
      return Fail(ErrorCode::kUnsupported,
                  "{}: key {} differs between layers ({} and {}); moend runs models whose "
                  "layers are alike",
                  path_, key, *first, *value);
    first = value;
  }
  return *first;
}

Expected<float> GgufFile::Real(std::string_view key, std::optional<float> fallback) const {
  const GgufValue* v = Find(key);
  if (!v) {
    if (fallback) return *fallback;
    return Missing(*this, key);
  }
  double value = 0;
  if (v->is_array) return WrongType(*this, key, *v, "a real number");
  if (v->type == GgufType::kFloat32)
    value = Load<float>(v->bytes.data());
  else if (v->type == GgufType::kFloat64)
    value = Load<double>(v->bytes.data());
  else if (const auto integer = IntegerAt(*v, 0))
    value = static_cast<double>(*integer);
  else
    return WrongType(*this, key, *v, "a real number");
  // Also false for NaN.
  if (!(std::abs(value) <= std::numeric_limits<float>::max()))
    return Fail(ErrorCode::kCorrupt, "{}: key {} is {}, not a finite number", path_, key, value);
  return static_cast<float>(value);
}

Expected<bool> GgufFile::Boolean(std::string_view key, bool fallback) const {
  const GgufValue* v = Find(key);
  if (!v) return fallback;
  if (v->is_array || v->type != GgufType::kBool) return WrongType(*this, key, *v, "a boolean");
  return v->bytes[0] != 0;
}

Expected<std::vector<bool>> GgufFile::Booleans(std::string_view key, int64_t count) const {
  const GgufValue* v = Find(key);
  if (!v) return Missing(*this, key);
  if (!v->is_array) return WrongType(*this, key, *v, "an array of booleans");
  if (v->count != count)
    return Fail(ErrorCode::kCorrupt, "{}: key {} has {} values instead of {}", path_, key, v->count, count);
  std::vector<bool> out;
  for (int64_t i = 0; i < count; ++i) {
    const auto value =
        v->type == GgufType::kBool ? v->bytes[static_cast<std::size_t>(i)] != 0 : IntegerAt(*v, i);
    if (!value) return WrongType(*this, key, *v, "an array of booleans");
    out.push_back(*value != 0);
  }
  return out;
}

Expected<std::vector<int64_t>> GgufFile::Integers(std::string_view key, int64_t count, int64_t low,
                                                  int64_t high) const {
  const GgufValue* v = Find(key);
  if (!v) return Missing(*this, key);
  if (!v->is_array) return WrongType(*this, key, *v, "an array of integers");
  if (v->count != count)
    return Fail(ErrorCode::kCorrupt, "{}: key {} has {} values instead of {}", path_, key, v->count, count);
  std::vector<int64_t> out;
  for (int64_t i = 0; i < count; ++i) {
    const auto value = IntegerAt(*v, i);
    if (!value) return WrongType(*this, key, *v, "an array of integers");
    if (*value < low || *value > high)
      return Fail(ErrorCode::kCorrupt, "{}: key {} holds {}, outside {} to {}", path_, key, *value, low,
                  high);
    out.push_back(*value);
  }
  return out;
}

Expected<std::string_view> GgufFile::String(std::string_view key,
                                            std::optional<std::string_view> fallback) const {
  const GgufValue* v = Find(key);
  if (!v) {
    if (fallback) return *fallback;
    return Missing(*this, key);
  }
  if (v->is_array || v->type != GgufType::kString) return WrongType(*this, key, *v, "text");
  return std::string_view(reinterpret_cast<const char*>(v->bytes.data()) + 8, v->bytes.size() - 8);
}

Expected<std::vector<std::string_view>> GgufFile::Strings(std::string_view key) const {
  std::vector<std::string_view> out;
  const GgufValue* v = Find(key);
  if (!v) return out;
  if (!v->is_array || v->type != GgufType::kString) return WrongType(*this, key, *v, "an array of text");
  out.reserve(static_cast<std::size_t>(v->count));  // each takes 8 bytes of the file or more
  const uint8_t* p = v->bytes.data();
  for (int64_t i = 0; i < v->count; ++i) {
    const auto length = static_cast<std::size_t>(Load<uint64_t>(p));
    out.emplace_back(reinterpret_cast<const char*>(p) + 8, length);
    p += 8 + length;
  }
  return out;
}

}  // namespace moend
