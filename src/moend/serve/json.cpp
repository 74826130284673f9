#include "moend/serve/json.h"

#include <algorithm>
#include <cmath>

#include "moend/engine/text_stream.h"

namespace moend::serve {
namespace {

// Walks the bytes once. Brackets inside strings do not count; malformed text is left to the parser.
ApiResult<void> CheckShape(std::string_view body, const Limits& limits) {
  int64_t depth = 0, values = 0;
  std::vector<int64_t> fields;  // so far, of the objects and lists around
  bool in_string = false;
  for (std::size_t i = 0; i < body.size(); ++i) {
    const char c = body[i];
    if (in_string) {
      if (c == '\\') {
        ++i;
      } else if (c == '"') {
        in_string = false;
      }
      continue;
    }
    if (c == '"') in_string = true;
    if (c == '[' || c == '{') {
      if (++depth > limits.json_depth)
        return std::unexpected(BadField(
            "", fmt::format("the body is nested deeper than {} levels", limits.json_depth), "json_too_deep"));
      ++values;
      fields.push_back(0);
    }
    if (c == ']' || c == '}') {
      --depth;
      if (!fields.empty()) fields.pop_back();
    }
    if (c == ':' && !fields.empty() && ++fields.back() > limits.json_fields)
      return std::unexpected(
          BadField("", fmt::format("an object in the body has more than {} fields", limits.json_fields),
                   "json_too_large"));
    if (c == ',') ++values;
    if (values > limits.json_values)
      return std::unexpected(BadField("", fmt::format("the body has more than {} values", limits.json_values),
                                      "json_too_large"));
  }
  return {};
}

std::unexpected<ApiError> WrongType(const std::string& path, const char* wanted, const Json& got) {
  return std::unexpected(
      BadField(path, fmt::format("{} must be {}, not {}", path, wanted, got.type_name()), "invalid_type"));
}

// Only looks for the place where text stops being JSON.
class FaultFinder : public nlohmann::json_sax<Json> {
 public:
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(std::size_t) override { return true; }
  bool key(string_t&) override { return true; }
  bool end_object() override { return true; }
  bool start_array(std::size_t) override { return true; }
  bool end_array() override { return true; }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception&) override {
    position_ = position;
    return false;
  }
  std::size_t position() const { return position_; }  // bytes read, the faulty one included

 private:
  std::size_t position_ = 0;
};

ApiError NoJson(std::string_view body) {
  if (body.empty()) return BadField("", "the body is empty; a JSON object is wanted", "invalid_json");
  FaultFinder finder;
  Json::sax_parse(body, &finder);
  const std::string_view before = body.substr(0, std::min(finder.position(), body.size()));
  const auto line = 1 + std::ranges::count(before, '\n');
  const auto column = before.size() - (before.rfind('\n') + 1);  // npos + 1 is 0
  return BadField("",
                  fmt::format("the body is not valid JSON in UTF-8: {} line {}, column {}",
                              finder.position() > body.size() ? "it ends at" : "see", line, column),
                  "invalid_json");
}

}  // namespace

ApiResult<Json> ParseBody(std::string_view body, const Limits& limits) {
  if (static_cast<int64_t>(body.size()) > limits.body_bytes)
    return std::unexpected(
        ApiError{.status = 413,
                 .message = fmt::format("the body is larger than {} bytes", limits.body_bytes),
                 .code = "body_too_large"});
  if (auto shape = CheckShape(body, limits); !shape) return std::unexpected(std::move(shape.error()));
  Json j = Json::parse(body, nullptr, /*allow_exceptions=*/false);
  if (j.is_discarded()) return std::unexpected(NoJson(body));
  if (!j.is_object())
    return std::unexpected(
        BadField("", fmt::format("the body must be a JSON object, not {}", j.type_name()), "invalid_json"));
  return j;
}

std::string Dump(const OrderedJson& value) {
  return value.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

bool IsUtf8(std::string_view bytes) {
  std::string left(bytes), text;
  TakeUtf8(left, text, /*all=*/true);
  return text == bytes;
}

const Json* Fields::Find(const char* name) const {
  const auto it = object_.find(name);
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

ApiResult<std::optional<int64_t>> Fields::Integer(const char* name, int64_t low, int64_t high) const {
  const Json* j = Find(name);
  if (!j) return std::nullopt;
  int64_t value = 0;
  bool fits = true;
  if (j->is_number_unsigned()) {
    const auto u = j->get<uint64_t>();
    fits = u <= static_cast<uint64_t>(INT64_MAX);
    value = fits ? static_cast<int64_t>(u) : 0;
  } else if (j->is_number_integer()) {
    value = j->get<int64_t>();
  } else if (j->is_number_float()) {
    // Some clients send 16.0; a float64 is exact up to 2^53.
    const double d = j->get<double>();
    if (!(std::floor(d) == d)) return WrongType(Path(name), "an integer", *j);
    fits = std::abs(d) <= 9007199254740992.0;
    value = fits ? static_cast<int64_t>(d) : 0;
  } else {
    return WrongType(Path(name), "an integer", *j);
  }
  if (!fits || value < low || value > high)
    return std::unexpected(BadField(
        Path(name), fmt::format("{} must be between {} and {}", Path(name), low, high), "out_of_range"));
  return value;
}

ApiResult<std::optional<double>> Fields::Number(const char* name, double low, double high) const {
  const Json* j = Find(name);
  if (!j) return std::nullopt;
  if (!j->is_number()) return WrongType(Path(name), "a number", *j);
  const double d = j->get<double>();
  if (!(d >= low && d <= high))  // also refuses NaN
    return std::unexpected(BadField(
        Path(name), fmt::format("{} must be between {} and {}", Path(name), low, high), "out_of_range"));
  return d;
}

ApiResult<std::optional<bool>> Fields::Boolean(const char* name) const {
  const Json* j = Find(name);
  if (!j) return std::nullopt;
  if (!j->is_boolean()) return WrongType(Path(name), "true or false", *j);
  return j->get<bool>();
}

ApiResult<std::optional<std::string>> Fields::String(const char* name) const {
  const Json* j = Find(name);
  if (!j) return std::nullopt;
  if (!j->is_string()) return WrongType(Path(name), "a string", *j);
  return j->get<std::string>();
}

}  // namespace moend::serve
