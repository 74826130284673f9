// The asymmetric quantizer that all packed widths share: x ~ min + scale * code with half-float min and
// scale.
//
// K, and V of 3 bits and more, span the range of their values: clipping K's range lowers the squared error
// and yet costs the model far more, because the few keys that stand out are those that attention looks for.
// V of 2 bits spans 85% of the range where that lowers the squared error. Figures: docs/quantizers.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "moend/base/half.h"

namespace moend {

struct GroupScale {
  uint16_t scale = 0, min = 0;  // f16
};

// For values within [low, high], |values| <= kMaxHalf. The minimum is rounded down and the scale to nearest,
// or up where the last code would then be more than half a step short of `high`; so no value is further than
// half a step from its code. Values that came out of the quantizer get their old scale back.
inline GroupScale ChooseScale(float low, float high, int max_code) {
  GroupScale g;
  g.min = HalfBelow(low + 0.0f);  // no negative zero: which zero is the lowest is anybody's guess
  const float span = high - HalfToFloat(g.min);
  g.scale = FloatToHalf(span / static_cast<float>(max_code));
  if (span > HalfToFloat(g.scale) * (static_cast<float>(max_code) + 0.5f)) ++g.scale;
  return g;
}

// 1 / scale, and 0 for a constant group: all its codes are 0.
inline float InverseScale(uint16_t scale) {
  return scale == 0 ? 0.0f : 1.0f / HalfToFloat(scale);
}

// Both steps round once each, so every instruction set gives the same code.
inline uint8_t EncodeValue(float x, float min, float inverse_scale, int max_code) {
  const float code = std::nearbyint((ClampToHalfRange(x) - min) * inverse_scale);
  return static_cast<uint8_t>(code < 0                              ? 0.0f
                              : code > static_cast<float>(max_code) ? static_cast<float>(max_code)
                                                                    : code);
}

// The widest codes for which a narrowed range is tried, and what is taken off at either end of it.
inline constexpr int kNarrowedMaxCode = 3;
inline constexpr float kNarrowMargin = 0.075f;

inline GroupScale ChooseNarrowScale(float low, float high, int max_code) {
  const float margin = (high - low) * kNarrowMargin;
  return ChooseScale(low + margin, high - margin, max_code);
}

// Squared errors of n <= 256 values in units of (scale / 256)^2. Integers, so that the order of the summation
// does not matter; an error beyond 8 steps counts as 8, which keeps the sum below 2^31.
inline constexpr float kResidualUnits = 256.0f, kMostResidual = 2048.0f;

inline int32_t ResidualSum(const float* x, int64_t n, GroupScale g, int max_code) {
  const float min = HalfToFloat(g.min), inverse = InverseScale(g.scale);
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float steps = (ClampToHalfRange(x[i]) - min) * inverse;
    const float off =
        (steps - static_cast<float>(EncodeValue(x[i], min, inverse, max_code))) * kResidualUnits;
    const auto residual =
        static_cast<int32_t>(std::nearbyint(std::clamp(off, -kMostResidual, kMostResidual)));
    sum += residual * residual;
  }
  return sum;
}

// Whether the narrowed range of a group is the better one: its squared error is smaller, and no value is
// further from its code than the half step that the whole range allows.
inline bool PreferNarrow(GroupScale wide, GroupScale narrow, float low, float high, int max_code,
                         int32_t wide_sum, int32_t narrow_sum) {
  const float wide_step = HalfToFloat(wide.scale), step = HalfToFloat(narrow.scale);
  const float first = HalfToFloat(narrow.min), last = first + step * static_cast<float>(max_code);
  const float half = 0.5f * wide_step;
  return step > 0 && step <= wide_step && first - low <= half && high - last <= half &&
         static_cast<float>(narrow_sum) * (step * step) <
             static_cast<float>(wide_sum) * (wide_step * wide_step);
}

// The product is exact (11 + 8 bits), so a fused multiply-add gives the same.
inline float DecodeValue(uint8_t code, float min, float scale) {
  return min + scale * static_cast<float>(code);
}

}  // namespace moend
