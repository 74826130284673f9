// Arithmetic over the 64 keys of a KeyBlock at once.
#pragma once

#include <array>
#include <span>

#include "moend/score/key_blocks.h"

namespace moend {

inline constexpr auto kLanes = static_cast<std::size_t>(kPageTokens);
using LaneFloats = std::array<float, kLanes>;

// out[t] = sum over channels of a[c] * k[c][t].
inline void Dot(const float* a, const float* k, int64_t d, LaneFloats& out) {
  out.fill(0);
  for (int64_t c = 0; c < d; ++c)
    for (std::size_t t = 0; t < kLanes; ++t) out[t] += a[c] * k[c * kPageTokens + static_cast<int64_t>(t)];
}

// Calls write(index of the score, lane) for every token of a block that is scored.
template <class F>
void ForEachScored(const KeyBlock& block, std::span<float> scores, F write) {
  if (block.first < 0) return;
  for (std::size_t t = 0; t < kLanes; ++t) {
    const auto at = static_cast<std::size_t>(block.first) + t;
    if ((block.live >> t & 1) && at < scores.size()) write(at, t);
  }
}

}  // namespace moend
