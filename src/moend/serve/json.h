// Reading untrusted JSON: shape limits are checked on the bytes before anything is built from them, and every
// field is read with its type and range.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "moend/serve/api_error.h"
#include "moend/serve/limits.h"

namespace moend::serve {

using OrderedJson = nlohmann::ordered_json;
using Json = OrderedJson;  // the order of a schema's properties is that of the answer

// The body as a JSON object. Depth, number of values and of an object's fields are bounded before parsing;
// bad UTF-8, trailing text and anything but an object are refused.
ApiResult<Json> ParseBody(std::string_view body, const Limits& limits);

// Text that is safe for JSON: bytes that are no UTF-8 become U+FFFD.
std::string Dump(const OrderedJson& value);

bool IsUtf8(std::string_view bytes);  // whole characters only

// Typed access to an object's fields; absent and null are the same. Messages name the field.
class Fields {
 public:
  explicit Fields(const Json& object, std::string prefix = {})
      : object_(object), prefix_(std::move(prefix)) {}

  const Json* Find(const char* name) const;  // null when absent
  std::string Path(const char* name) const { return prefix_ + name; }

  ApiResult<std::optional<int64_t>> Integer(const char* name, int64_t low, int64_t high) const;
  ApiResult<std::optional<double>> Number(const char* name, double low, double high) const;
  ApiResult<std::optional<bool>> Boolean(const char* name) const;
  ApiResult<std::optional<std::string>> String(const char* name) const;

 private:
  const Json& object_;
  std::string prefix_;
};

}  // namespace moend::serve
