// A context as bytes in a store:
//   "MOENDKV1" | u64 total bytes | u32 n cache id, bytes | u32 n scope, bytes | u64 n tokens, i32 each |
//   u64 n payload, bytes | SHA-256 of all before
// All little endian. Nothing of it is believed before the checksum, the cache id, the scope and every token
// were compared.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moend/base/error.h"

namespace moend::serve {

struct SavedPrefix {
  std::string cache_id;  // BackendInfo::cache_id
  std::string scope;
  std::vector<int32_t> tokens;
  std::string payload;  // Backend::Serialize
};

std::string Encode(const SavedPrefix& prefix);
// kCorrupt says what is wrong.
Expected<SavedPrefix> Decode(std::string_view bytes);

// Names of a prefix of `tokens` for each of the ascending `lengths`: "<cache>/<scope>/<length>-<hash>". The
// hash only finds; equality is checked on the tokens.
std::vector<std::string> PrefixNames(const std::string& cache_id, const std::string& scope,
                                     std::span<const int32_t> tokens, std::span<const int64_t> lengths);

}  // namespace moend::serve
