// An expert is one way to compress one layer's K/V cache (MoE-nD's term): what share of the tokens stays, and
// with how many bits an element of K and of V is stored.
#pragma once

#include <array>
#include <compare>
#include <cstdint>

namespace moend {

inline constexpr std::array<int, 5> kBitWidths = {16, 8, 4, 3, 2};

struct Expert {
  double keep = 1.0;  // (0, 1]: share of the tokens seen that each KV head keeps
  int k_bits = 16;    // one of kBitWidths
  int v_bits = 16;    // one of kBitWidths
  auto operator<=>(const Expert&) const = default;
};

constexpr bool IsBitWidth(int bits) {
  for (int b : kBitWidths)
    if (b == bits) return true;
  return false;
}

// What a layer's cache looks like in every model moend runs. Per KV head, K and V are vectors of head_size.
struct KvShape {
  int64_t n_kv_heads = 0;
  int64_t head_size = 0;  // a multiple of 16, 16 to 256
  auto operator<=>(const KvShape&) const = default;
};

// Tokens that are never evicted nor quantized, the same in every layer.
struct Protected {
  int64_t sinks = 4;    // the first tokens (attention sinks)
  int64_t window = 28;  // the newest tokens
  auto operator<=>(const Protected&) const = default;
};

}  // namespace moend
