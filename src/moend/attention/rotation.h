// K of packed pages is rotated before it is quantized: a Hadamard matrix makes every stored channel a sum of
// all, so that no channel stands out and rounding errors of channels cancel in q.k. At 2 bits that is two
// thirds of the loss (docs/quantizers.md). Before it, each channel is multiplied by its balance, which takes
// out the outlier channels that some models have: rotation would spread them over all the others.
//
//     stored k = H (b * k),   and so   q.k = (H (q / b)) . (stored k)
//
// H is block diagonal with normalized Hadamard matrices of the largest power of two that divides the head
// size; H is its own inverse. Queries meet packed pages rotated, everything else as it is.
//
// Functions exist twice with the same meaning, `reference` (scalar, float64) and `simd` (Highway). Every
// order of summation is fixed, so that results are the same on every instruction set but for fused
// multiply-adds.
#pragma once

#include <bit>
#include <cstdint>

namespace moend {

// The largest power of two that divides the head size.
constexpr int64_t RotationBlock(int64_t head_size) {
  return head_size & -head_size;
}

#define MOEND_DECLARE_ROTATION                                                                         \
  /* out[r] = H (factor * q[r]) for rows of head_size channels; out may be q. */                       \
  void RotateRows(const float* q, int64_t rows, int64_t head_size, const float* factor, float* out);   \
  /* k, channel major [head_size][64], in place: k = after * H (before * k). Factors of null are 1. */ \
  void RotateLanes(float* k, int64_t head_size, const float* before, const float* after);

namespace reference {
MOEND_DECLARE_ROTATION
}
namespace simd {
MOEND_DECLARE_ROTATION
}

#undef MOEND_DECLARE_ROTATION

}  // namespace moend
