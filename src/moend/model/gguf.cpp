#include "moend/model/gguf.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

namespace moend {

static_assert(std::endian::native == std::endian::little, "GGUF files are read in place");

const char* Name(GgufType type) {
  constexpr const char* kNames[] = {"uint8",   "int8", "uint16", "int16",  "uint32", "int32",  "float32",
                                    "boolean", "text", "array",  "uint64", "int64",  "float64"};
  const auto index = static_cast<uint32_t>(type);
  return index < std::size(kNames) ? kNames[index] : "unknown";
}

std::string Escaped(std::string_view text) {
  constexpr std::size_t kLongest = 80;
  std::string out;
  for (char c : text.substr(0, kLongest)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f)
      out += c;
    else
      out += fmt::format("\\x{:02x}", byte);
  }
  if (text.size() > kLongest) out += "...";
  return out;
}

std::string ShapeText(const std::array<int64_t, 4>& ne) {
  int last = 3;
  while (last > 0 && ne[static_cast<std::size_t>(last)] == 1) --last;
  std::string out = "[";
  for (int i = 0; i <= last; ++i) out += fmt::format("{}{}", i ? ", " : "", ne[static_cast<std::size_t>(i)]);
  return out + "]";
}

namespace {

// Bytes of one element, 0 for those of variable length.
int64_t ElementBytes(GgufType type) {
  switch (type) {
    case GgufType::kUint8:
    case GgufType::kInt8:
    case GgufType::kBool:
      return 1;
    case GgufType::kUint16:
    case GgufType::kInt16:
      return 2;
    case GgufType::kUint32:
    case GgufType::kInt32:
    case GgufType::kFloat32:
      return 4;
    case GgufType::kUint64:
    case GgufType::kInt64:
    case GgufType::kFloat64:
      return 8;
    case GgufType::kString:
    case GgufType::kArray:
      break;
  }
  return 0;
}

constexpr uint64_t kMaxNameBytes = 65535;  // of a key, by the format
// Small enough that an offset, a size and an offset into the header add up without overflow.
constexpr uint64_t kFarthest = INT64_MAX / 4;
constexpr uint64_t kMinAlignment = 8, kMaxAlignment = 1 << 20;

}  // namespace

// Walks the header once, front to back. `at_` never passes the end of the file.
class GgufParser {
 public:
  GgufParser(std::span<const uint8_t> file, const std::string& path) : file_(file), path_(path) {
    out_.path_ = path;
    out_.parts_ = {file};
  }

  Expected<GgufFile> Run() {
    MOEND_TRY(Preamble());
    for (uint64_t i = 0; i < n_keys_; ++i) MOEND_TRY(Key(i));
    MOEND_TRY(Alignment());
    for (uint64_t i = 0; i < n_tensors_; ++i) MOEND_TRY(Tensor(i));
    MOEND_TRY(PlaceTensors());
    return std::move(out_);
  }

 private:
  uint64_t size() const { return file_.size(); }
  uint64_t left() const { return size() - at_; }

  template <class... Args>
  std::unexpected<Error> Bad(fmt::format_string<Args...> text, Args&&... args) const {
    return Fail(ErrorCode::kCorrupt, "{} {}", path_, fmt::format(text, std::forward<Args>(args)...));
  }
  std::unexpected<Error> CutOff(const std::string& where) const {
    return Bad("is cut off or damaged: {} goes past the end of the file at {} bytes; download it again",
               where, size());
  }

  template <class T>
  bool Read(T& value) {
    if (left() < sizeof(T)) return false;
    std::memcpy(&value, file_.data() + at_, sizeof(T));
    at_ += sizeof(T);
    return true;
  }
  bool ReadText(std::string_view& text, uint64_t longest) {
    uint64_t length = 0;
    if (!Read(length) || length > left() || length > longest) return false;
    text = {reinterpret_cast<const char*>(file_.data() + at_), static_cast<std::size_t>(length)};
    at_ += length;
    return true;
  }

  Expected<void> Preamble() {
    if (size() == 0) return Bad("is empty; download it again");
    if (size() < 4 || std::memcmp(file_.data(), "GGUF", 4) != 0) {
      const std::string_view start(reinterpret_cast<const char*>(file_.data()),
                                   static_cast<std::size_t>(std::min<uint64_t>(size(), 8)));
      return Bad("is not a GGUF model: it starts with \"{}\" instead of \"GGUF\"", Escaped(start));
    }
    at_ = 4;
    uint32_t version = 0;
    if (!Read(version)) return CutOff("its header");
    if (version == 0x02000000u || version == 0x03000000u)
      return Fail(ErrorCode::kUnsupported, "{} is a big-endian GGUF file; moend reads little-endian ones",
                  path_);
    if (version != 2 && version != 3)
      return Fail(ErrorCode::kUnsupported, "{} is a GGUF file of version {}; moend reads versions 2 and 3",
                  path_, version);
    if (!Read(n_tensors_) || !Read(n_keys_)) return CutOff("its header");
    if (n_tensors_ > static_cast<uint64_t>(kMaxGgufTensors))
      return Bad("is damaged: it claims {} tensors, at most {} are possible", n_tensors_, kMaxGgufTensors);
    if (n_keys_ > static_cast<uint64_t>(kMaxGgufKeys))
      return Bad("is damaged: it claims {} keys, at most {} are possible", n_keys_, kMaxGgufKeys);
    return {};
  }

  Expected<void> Key(uint64_t i) {
    std::string_view key;
    if (!ReadText(key, kMaxNameBytes)) return CutOff(fmt::format("the name of key {} of {}", i + 1, n_keys_));
    if (key.empty() || key.find('\0') != std::string_view::npos)
      return Bad("is damaged: key {} of {} has no proper name", i + 1, n_keys_);
    const auto value_at = fmt::format("the value of key {}", Escaped(key));
    uint32_t type = 0;
    if (!Read(type)) return CutOff(value_at);
    GgufValue value;
    if (type == static_cast<uint32_t>(GgufType::kArray)) {
      uint64_t count = 0;
      if (!Read(type) || !Read(count)) return CutOff(value_at);
      // Every element takes a byte or more, which also makes the count an int64_t.
      if (count > left()) return CutOff(fmt::format("{} with {} elements", value_at, count));
      if (type == static_cast<uint32_t>(GgufType::kArray))
        return Bad("has an array of arrays under key {}; no model that moend runs has one", Escaped(key));
      if (count > static_cast<uint64_t>(kMaxGgufArray))
        return Bad("is damaged: key {} has {} elements, at most {} are possible", Escaped(key), count,
                   kMaxGgufArray);
      value.is_array = true;
      value.count = static_cast<int64_t>(count);
    }
    if (type > static_cast<uint32_t>(GgufType::kFloat64))
      return Bad("is damaged: key {} has the unknown type {}", Escaped(key), type);
    value.type = static_cast<GgufType>(type);

    const uint64_t begin = at_;
    if (const auto bytes = static_cast<uint64_t>(ElementBytes(value.type)); bytes != 0) {
      if (static_cast<uint64_t>(value.count) > left() / bytes)
        return CutOff(fmt::format("{} with {} elements", value_at, value.count));
      at_ += static_cast<uint64_t>(value.count) * bytes;
    } else {
      std::string_view text;
      for (int64_t k = 0; k < value.count; ++k)
        if (!ReadText(text, size()))
          return CutOff(fmt::format("{}, text {} of {}", value_at, k + 1, value.count));
    }
    value.bytes = file_.subspan(begin, at_ - begin);
    if (value.type == GgufType::kBool)
      for (uint8_t b : value.bytes)
        if (b > 1) return Bad("is damaged: the boolean key {} holds {}", Escaped(key), b);
    if (!out_.values_.emplace(key, value).second)
      return Bad("is damaged: key {} appears twice", Escaped(key));
    return {};
  }

  Expected<void> Alignment() {
    const GgufValue* value = out_.Find("general.alignment");
    if (!value) return {};
    if (value->is_array || value->type != GgufType::kUint32)
      return Bad("is damaged: general.alignment is of type {} instead of uint32", Name(value->type));
    uint32_t alignment = 0;
    std::memcpy(&alignment, value->bytes.data(), sizeof alignment);
    if (alignment < kMinAlignment || alignment > kMaxAlignment || !std::has_single_bit(alignment))
      return Bad("is damaged: general.alignment is {}, not a power of two from {} to {}", alignment,
                 kMinAlignment, kMaxAlignment);
    alignment_ = alignment;
    return {};
  }

  Expected<void> Tensor(uint64_t i) {
    GgufTensor tensor;
    if (!ReadText(tensor.name, kMaxNameBytes))
      return CutOff(fmt::format("the name of tensor {} of {}", i + 1, n_tensors_));
    if (tensor.name.empty() || tensor.name.find('\0') != std::string_view::npos)
      return Bad("is damaged: tensor {} of {} has no proper name", i + 1, n_tensors_);
    const std::string name = Escaped(tensor.name);
    if (tensor.name.size() >= GGML_MAX_NAME)
      return Bad("is damaged: the name of tensor {} has {} characters, at most {} are possible", name,
                 tensor.name.size(), GGML_MAX_NAME - 1);
    const auto description = fmt::format("the description of tensor {}", name);

    uint32_t n_dims = 0;
    if (!Read(n_dims)) return CutOff(description);
    if (n_dims < 1 || n_dims > 4)
      return Bad("is damaged: tensor {} has {} dimensions instead of 1 to 4", name, n_dims);
    for (uint32_t d = 0; d < n_dims; ++d)
      if (!Read(tensor.ne[d])) return CutOff(description);
    uint32_t type = 0;
    uint64_t offset = 0;
    if (!Read(type) || !Read(offset)) return CutOff(description);

    if (type >= GGML_TYPE_COUNT || ggml_get_type_traits(static_cast<ggml_type>(type))->blck_size <= 0 ||
        ggml_get_type_traits(static_cast<ggml_type>(type))->type_size == 0)
      return Fail(ErrorCode::kUnsupported, "{} stores tensor {} in the unknown type {}", path_, name, type);
    tensor.type = static_cast<ggml_type>(type);
    const int64_t block = ggml_get_type_traits(tensor.type)->blck_size;
    const auto block_bytes = static_cast<int64_t>(ggml_get_type_traits(tensor.type)->type_size);

    // The product grows only while it stays below what a file can hold, so it cannot overflow.
    int64_t elements = 1;
    for (int64_t n : tensor.ne) {
      if (n < 1) return Bad("is damaged: tensor {} has a dimension of {}", name, n);
      if (n > (INT64_MAX / 8) / elements)
        return Bad("is damaged: tensor {} of shape {} has more elements than any file", name,
                   ShapeText(tensor.ne));
      elements *= n;
    }
    if (tensor.ne[0] % block != 0)
      return Bad("is damaged: tensor {} has rows of {}, which type {} stores in blocks of {}", name,
                 tensor.ne[0], ggml_type_name(tensor.type), block);
    if (elements / block > static_cast<int64_t>(kFarthest) / block_bytes)
      return Bad("is damaged: tensor {} of shape {} has more bytes than any file", name,
                 ShapeText(tensor.ne));
    tensor.bytes = elements / block * block_bytes;
    if (offset % alignment_ != 0)
      return Bad("is damaged: tensor {} starts at offset {}, not a multiple of {}", name, offset, alignment_);
    if (offset > kFarthest)
      return Bad("is damaged: tensor {} starts at the impossible offset {}", name, offset);
    tensor.offset = static_cast<int64_t>(offset);

    if (!out_.tensor_index_.emplace(tensor.name, static_cast<int64_t>(out_.tensors_.size())).second)
      return Bad("is damaged: tensor {} appears twice", name);
    out_.tensors_.push_back(tensor);
    return {};
  }

  // Offsets of tensors count from the aligned end of the header.
  Expected<void> PlaceTensors() {
    if (out_.tensors_.empty()) return {};
    const auto file_bytes = static_cast<int64_t>(size());
    const auto data = static_cast<int64_t>((at_ + alignment_ - 1) / alignment_ * alignment_);
    for (GgufTensor& tensor : out_.tensors_) {
      tensor.offset += data;  // at most kFarthest each
      if (tensor.offset > file_bytes || tensor.bytes > file_bytes - tensor.offset)
        return Bad("is cut off: tensor {} ends at byte {} but the file has {} bytes; download it again",
                   Escaped(tensor.name),
                   static_cast<uint64_t>(tensor.offset) + static_cast<uint64_t>(tensor.bytes), file_bytes);
      tensor.data = file_.data() + tensor.offset;
    }
    return {};
  }

  std::span<const uint8_t> file_;
  const std::string& path_;
  GgufFile out_;
  uint64_t at_ = 0, n_keys_ = 0, n_tensors_ = 0, alignment_ = 32;
};

Expected<GgufFile> GgufFile::Parse(std::span<const uint8_t> file, const std::string& path) {
  return GgufParser(file, path).Run();
}

Expected<GgufFile> GgufFile::Open(const std::string& path, bool map) {
  MOEND_ASSIGN(MappedFile mapping, MappedFile::Open(path, map));
  MOEND_ASSIGN(GgufFile file, Parse(mapping.bytes(), path));
  file.mappings_.push_back(std::move(mapping));
  file.mapped_paths_.push_back(path);
  MOEND_TRY(file.AddParts(map));
  return file;
}

}  // namespace moend
