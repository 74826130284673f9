// The checksum that ends a saved cache, for tests that damage what stands before it.
#pragma once

#include <bit>
#include <cstring>
#include <string>

namespace moend::test {

// Makes it right, computed as cache/serialize.cpp documents it. Shorter blobs have none.
inline void Seal(std::string& blob) {
  if (blob.size() < 8) return;
  const std::size_t size = blob.size() - 8;
  uint64_t state = 0x9E3779B97F4A7C15u * (size + 1);
  for (std::size_t i = 0; i < size; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, blob.data() + i, std::min<std::size_t>(8, size - i));
    state = std::rotl(state ^ word, 29) * 0xBF58476D1CE4E5B9u;
  }
  state ^= state >> 32;
  std::memcpy(blob.data() + size, &state, 8);
}

}  // namespace moend::test
