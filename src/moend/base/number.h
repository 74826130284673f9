// The one reader of numbers that come as text. It never throws, and knows no locale.
#pragma once

#include <charconv>
#include <optional>
#include <string_view>
#include <system_error>

namespace moend {

// The whole of `text`; none when it is no number or one that T cannot hold. "nan" and "inf" are numbers of
// floating point: a caller that wants a range must ask for it in a way that a NaN fails.
template <class T>
std::optional<T> ParseNumber(std::string_view text) {
  T value{};
  const char* const end = text.data() + text.size();
  const auto [at, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || at != end) return std::nullopt;
  return value;
}

}  // namespace moend
