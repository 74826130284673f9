// IEEE 754 half floats ("f16") as uint16_t bits, one value at a time. Exact, subnormals included, on every
// machine.
#pragma once

#include <bit>
#include <cstdint>

namespace moend {

inline constexpr float kMaxHalf = 65504.0f;
inline constexpr float kMinHalfStep = 0x1p-24f;  // distance between subnormal half floats

inline float HalfToFloat(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7FFFu;
  if (magnitude >= 0x7C00u)  // infinity, NaN
    return std::bit_cast<float>(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
  if (magnitude < 0x0400u) {  // zero, subnormal
    const float value = static_cast<float>(magnitude) * kMinHalfStep;
    return sign ? -value : value;
  }
  return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
}

// Rounds to nearest, ties to even; too large becomes infinity, NaN stays NaN.
inline uint16_t FloatToHalf(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude >= 0x47800000u)  // 65536 and more, infinity, NaN
    return static_cast<uint16_t>(sign | (magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u));
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 1/2 leaves the value in units of 2^-24 in the low bits, rounded by the addition.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3F000000u));
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xFFFu + odd) >> 13));
}

// For values that must not poison sums: NaN becomes 0, infinite and too large values the largest finite one.
inline float ClampToHalfRange(float f) {
  return f != f ? 0.0f : f > kMaxHalf ? kMaxHalf : f < -kMaxHalf ? -kMaxHalf : f;
}
inline uint16_t FloatToFiniteHalf(float f) {
  return FloatToHalf(ClampToHalfRange(f));
}
inline uint16_t FiniteHalf(uint16_t h) {
  if ((h & 0x7C00u) != 0x7C00u) return h;
  return (h & 0x3FFu) ? uint16_t{0} : static_cast<uint16_t>((h & 0x8000u) | 0x7BFFu);
}

// The largest half float that is not above f; |f| <= kMaxHalf.
inline uint16_t HalfBelow(float f) {
  const uint16_t nearest = FloatToHalf(f);
  if (HalfToFloat(nearest) <= f) return nearest;
  return (nearest & 0x8000u) ? static_cast<uint16_t>(nearest + 1) : static_cast<uint16_t>(nearest - 1);
}

}  // namespace moend
