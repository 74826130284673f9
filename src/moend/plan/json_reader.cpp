#include "moend/plan/json_reader.h"

#include <cmath>

namespace moend {
namespace {

constexpr int kMaxDepth = 32;

// The parser keeps no limit of its own, and a deep document costs memory and time to build and to free.
int Depth(const std::string& text) {
  int depth = 0, deepest = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > deepest) deepest = depth;
      if (deepest > kMaxDepth) return deepest;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return deepest;
}

// "[json.exception.parse_error.101] parse error at line 1, column 2: ..." without its bracket.
std::string_view WithoutTag(std::string_view what) {
  const std::size_t end = what.find("] ");
  return end == std::string_view::npos ? what : what.substr(end + 2);
}

}  // namespace

std::string Printable(std::string_view text, std::size_t limit) {
  std::string out(text.substr(0, limit));
  for (char& c : out) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  if (text.size() > limit) {
    while (!out.empty() && (static_cast<unsigned char>(out.back()) & 0xc0) == 0x80) out.pop_back();
    if (!out.empty() && static_cast<unsigned char>(out.back()) >= 0xc0) out.pop_back();
    out += "...";
  }
  return out;
}

Expected<nlohmann::json> ParseJson(const std::string& text, const std::string& source) {
  if (Depth(text) > kMaxDepth) {
    return Fail(ErrorCode::kCorrupt, "{}: nested deeper than {} levels; no file of ours is", source,
                kMaxDepth);
  }
  try {
    return nlohmann::json::parse(text);
  } catch (const nlohmann::json::exception& e) {
    return Fail(ErrorCode::kCorrupt, "{}: not valid JSON: {}", source, Printable(WithoutTag(e.what()), 200));
  } catch (const std::bad_alloc&) {
    return Fail(ErrorCode::kOutOfMemory, "{}: does not fit into memory", source);
  }
}

std::string JsonNode::Shown() const {
  if (value_->is_object()) return "an object";
  if (value_->is_array()) return "an array";
  return Printable(value_->dump(-1, ' ', false, nlohmann::json::error_handler_t::replace), 40);
}

Expected<JsonNode> JsonNode::At(std::string_view key) const {
  if (!value_->is_object()) return Wrong("is {}, where an object is needed", Shown());
  const auto it = value_->find(key);
  std::string path = path_.empty() ? std::string(key) : fmt::format("{}.{}", path_, key);
  if (it == value_->end()) return Fail(ErrorCode::kCorrupt, "{}: {} is missing", *source_, path);
  return JsonNode(*it, *source_, std::move(path));
}

Expected<JsonNode> JsonNode::At(int64_t index) const {
  MOEND_ASSIGN(const int64_t size, Size());
  std::string path = fmt::format("{}[{}]", path_, index);
  if (index < 0 || index >= size) return Fail(ErrorCode::kCorrupt, "{}: {} is missing", *source_, path);
  return JsonNode((*value_)[static_cast<std::size_t>(index)], *source_, std::move(path));
}

Expected<int64_t> JsonNode::Size() const {
  if (!value_->is_array()) return Wrong("is {}, where an array is needed", Shown());
  return static_cast<int64_t>(value_->size());
}

Expected<int64_t> JsonNode::Int(int64_t low, int64_t high) const {
  if (!value_->is_number_integer()) return Wrong("is {}, where a whole number is needed", Shown());
  const bool huge = value_->is_number_unsigned() && value_->get<uint64_t>() > uint64_t{INT64_MAX};
  const int64_t x = huge ? 0 : value_->get<int64_t>();
  if (huge || x < low || x > high) return Wrong("is {}; possible: {} to {}", Shown(), low, high);
  return x;
}

Expected<double> JsonNode::Real(double low, double high) const {
  if (!value_->is_number()) return Wrong("is {}, where a number is needed", Shown());
  const double x = value_->get<double>();
  if (!std::isfinite(x) || x < low || x > high) return Wrong("is {}; possible: {} to {}", Shown(), low, high);
  return x;
}

Expected<bool> JsonNode::Bool() const {
  if (!value_->is_boolean()) return Wrong("is {}, where true or false is needed", Shown());
  return value_->get<bool>();
}

Expected<std::string> JsonNode::Text(std::size_t limit) const {
  if (!value_->is_string()) return Wrong("is {}, where a string is needed", Shown());
  std::string s = value_->get<std::string>();
  if (s.size() > limit) return Wrong("has {} bytes; at most {} are possible", s.size(), limit);
  return s;
}

}  // namespace moend
