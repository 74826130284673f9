// API keys. A key is also a scope: caches, prefixes and slot details are never shared between two keys.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "moend/base/error.h"

namespace moend::serve {

class ApiKeys {
 public:
  // No keys: everyone is let in, with one common scope.
  // kInvalidArgument for an empty key or one with white space or control characters.
  static Expected<ApiKeys> Create(const std::vector<std::string>& keys);
  // One key a line; empty lines and lines that begin with # are skipped.
  static Expected<std::vector<std::string>> ParseFile(const std::string& text, const std::string& source);

  bool required() const { return !digests_.empty(); }
  int64_t size() const { return static_cast<int64_t>(digests_.size()); }

  // The scope that the value of an Authorization field belongs to ("Bearer KEY", or "Basic" with the key as
  // password, which is what a browser can send), or nothing. Takes the same time for every wrong key: digests
  // are compared, all of them, and every byte.
  std::optional<std::string> Scope(std::string_view authorization) const;

 private:
  std::vector<std::array<uint8_t, 32>> digests_;
};

}  // namespace moend::serve
