// The asymmetric quantizer that all packed widths share: x ~ min + scale * code with half-float min and
// scale.
#pragma once

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

// The product is exact (11 + 8 bits), so a fused multiply-add gives the same.
inline float DecodeValue(uint8_t code, float min, float scale) {
  return min + scale * static_cast<float>(code);
}

}  // namespace moend
