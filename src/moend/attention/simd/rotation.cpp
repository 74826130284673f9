// Fast Hadamard transforms: log2(block) passes of sums and differences.
#include "moend/attention/rotation.h"

#include <cmath>

#include "moend/attention/simd/targets.h"
#include "moend/plan/layout.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "moend/attention/simd/rotation.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace moend::simd {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr int64_t kMaxHeadSize = 256;

// Four channels a vector: distances of 1 and 2 are within one, longer ones between two.
using DQuad = hn::CappedTag<float, 4>;
using VQuad = hn::Vec<DQuad>;

// One row of head_size channels, in place.
void RotateRow(float* HWY_RESTRICT x, int64_t head_size, int64_t block) {
#if HWY_TARGET == HWY_SCALAR
  for (int64_t distance = 1; distance < block; distance *= 2)
    for (int64_t c = 0; c < head_size; ++c)
      if ((c & distance) == 0) {
        const float a = x[c], b = x[c + distance];
        x[c] = a + b;
        x[c + distance] = a - b;
      }
#else
  const DQuad dq;
  // Head sizes are multiples of 16, so that a block has at least 16 channels.
  for (int64_t c = 0; c < head_size; c += 4) {
    VQuad v = hn::Load(dq, x + c);
    const VQuad pair = hn::Shuffle2301(v);
    v = hn::OddEven(hn::Sub(pair, v), hn::Add(v, pair));
    const VQuad half = hn::Shuffle1032(v);
    v = hn::ConcatUpperLower(dq, hn::Sub(half, v), hn::Add(v, half));
    hn::Store(v, dq, x + c);
  }
  for (int64_t distance = 4; distance < block; distance *= 2)
    for (int64_t begin = 0; begin < head_size; begin += 2 * distance)
      for (int64_t c = begin; c < begin + distance; c += 4) {
        const VQuad a = hn::Load(dq, x + c), b = hn::Load(dq, x + c + distance);
        hn::Store(hn::Add(a, b), dq, x + c);
        hn::Store(hn::Sub(a, b), dq, x + c + distance);
      }
#endif
}

void RotateRows(const float* q, int64_t rows, int64_t head_size, const float* factor, float* out) {
  const int64_t block = RotationBlock(head_size);
  const float norm = 1.0f / std::sqrt(static_cast<float>(block));
  alignas(64) float x[kMaxHeadSize];
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < head_size; ++c) x[c] = q[r * head_size + c] * (factor[c] * norm);
    RotateRow(x, head_size, block);
    for (int64_t c = 0; c < head_size; ++c) out[r * head_size + c] = x[c];
  }
}

// Channels are rows of 64 lanes: whole vectors all the way.
void RotateLanes(float* HWY_RESTRICT k, int64_t head_size, const float* before, const float* after) {
  const hn::CappedTag<float, 16> df;
  const auto lanes = static_cast<int64_t>(hn::Lanes(df));
  const int64_t block = RotationBlock(head_size);
  const float norm = 1.0f / std::sqrt(static_cast<float>(block));
  const auto scale = [&](const float* factor, float more) HWY_ATTR {
    for (int64_t c = 0; c < head_size; ++c) {
      const auto f = hn::Set(df, factor ? factor[c] * more : more);
      for (int64_t t = c * kPageTokens; t < (c + 1) * kPageTokens; t += lanes)
        hn::StoreU(hn::Mul(hn::LoadU(df, k + t), f), df, k + t);
    }
  };
  scale(before, norm);
  for (int64_t distance = 1; distance < block; distance *= 2)
    for (int64_t begin = 0; begin < head_size; begin += 2 * distance)
      for (int64_t c = begin; c < begin + distance; ++c) {
        float* HWY_RESTRICT low = k + c * kPageTokens;
        float* HWY_RESTRICT high = low + distance * kPageTokens;
        for (int64_t t = 0; t < kPageTokens; t += lanes) {
          const auto a = hn::LoadU(df, low + t), b = hn::LoadU(df, high + t);
          hn::StoreU(hn::Add(a, b), df, low + t);
          hn::StoreU(hn::Sub(a, b), df, high + t);
        }
      }
  if (after) scale(after, 1.0f);
}

}  // namespace HWY_NAMESPACE
}  // namespace moend::simd
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moend::simd {

HWY_EXPORT(RotateRows);
HWY_EXPORT(RotateLanes);

void RotateRows(const float* q, int64_t rows, int64_t head_size, const float* factor, float* out) {
  HWY_DYNAMIC_DISPATCH(RotateRows)(q, rows, head_size, factor, out);
}

void RotateLanes(float* k, int64_t head_size, const float* before, const float* after) {
  HWY_DYNAMIC_DISPATCH(RotateLanes)(k, head_size, before, after);
}

}  // namespace moend::simd
#endif  // HWY_ONCE
