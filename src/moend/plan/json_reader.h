// Reading JSON that somebody else wrote: every access is checked, and an error names the file and the field,
// e.g. "plan.json: layers[3].k_bits is 5; possible: 16, 8, 4, 3, 2".
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>

#include "moend/base/error.h"

namespace moend {

// Text from a file, fit for a terminal: control characters become '?', long text is cut.
std::string Printable(std::string_view text, std::size_t limit = 80);

// Parses without throwing. Refuses nesting deeper than 32 before the parser sees it. `source` names the text
// in errors.
Expected<nlohmann::json> ParseJson(const std::string& text, const std::string& source);

// A value inside a parsed document and the way to it. Borrows both the document and `source`.
class JsonNode {
 public:
  JsonNode(const nlohmann::json& value, const std::string& source) : value_(&value), source_(&source) {}

  bool Has(std::string_view key) const { return value_->is_object() && value_->contains(key); }
  Expected<JsonNode> At(std::string_view key) const;  // a field of an object
  Expected<JsonNode> At(int64_t index) const;         // an element of an array
  Expected<int64_t> Size() const;                     // of an array

  Expected<int64_t> Int(int64_t low, int64_t high) const;
  Expected<double> Real(double low, double high) const;  // finite and low <= x <= high
  Expected<bool> Bool() const;
  Expected<std::string> Text(std::size_t limit) const;  // at most `limit` bytes

  // An error about this value: Wrong("is {}; possible: {}", ...).
  template <class... Args>
  std::unexpected<Error> Wrong(fmt::format_string<Args...> text, Args&&... args) const {
    return Fail(ErrorCode::kCorrupt, "{}: {} {}", *source_, path_.empty() ? "the document" : path_,
                fmt::format(text, std::forward<Args>(args)...));
  }

 private:
  JsonNode(const nlohmann::json& value, const std::string& source, std::string path)
      : value_(&value), source_(&source), path_(std::move(path)) {}
  std::string Shown() const;  // the value itself, short enough for a sentence

  const nlohmann::json* value_;
  const std::string* source_;
  std::string path_;
};

}  // namespace moend
