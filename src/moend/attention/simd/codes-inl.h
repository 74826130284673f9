// Reads packed codes as 32-bit words whose four bytes are codes of neighbours on the summed axis
// (plan/layout.h).
#if defined(MOEND_ATTENTION_SIMD_CODES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOEND_ATTENTION_SIMD_CODES_INL_H_
#undef MOEND_ATTENTION_SIMD_CODES_INL_H_
#else
#define MOEND_ATTENTION_SIMD_CODES_INL_H_
#endif

#include "moend/attention/simd/common-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moend::simd {
namespace HWY_NAMESPACE {

// Field `step` of kBits in every byte. A step known after unrolling costs one shift by a constant.
template <int kBits>
HWY_INLINE VU Field(VU packed, int step) {
  static_assert(kBits == 1 || kBits == 2 || kBits == 4 || kBits == 8);
  if constexpr (kBits == 8) return packed;
  constexpr uint32_t kMask = 0x01010101u * ((1u << kBits) - 1u);
  VU words = packed;
  if (step == 1) words = hn::ShiftRight<kBits>(packed);
  if constexpr (kBits < 4) {
    if (step == 2) words = hn::ShiftRight<2 * kBits>(packed);
    if (step == 3) words = hn::ShiftRight<3 * kBits>(packed);
  }
  if constexpr (kBits < 2) {
    if (step == 4) words = hn::ShiftRight<4>(packed);
    if (step == 5) words = hn::ShiftRight<5>(packed);
    if (step == 6) words = hn::ShiftRight<6>(packed);
    if (step == 7) words = hn::ShiftRight<7>(packed);
  }
  return hn::And(words, hn::Set(DU(), kMask));
}

// Lanes [lane, lane + kLanes) of row `row` (before packing) of one plane.
template <int kBits>
HWY_INLINE VU PlaneWords(const uint8_t* HWY_RESTRICT codes, int64_t row, int lane) {
  constexpr int kPerByte = 8 / kBits;
  const VU packed = LoadWords(codes + row / kPerByte * kPageTokens + lane * 4);
  return Field<kBits>(packed, static_cast<int>(row % kPerByte));
}

// The same for a codec: 3 bits are two planes.
template <int kBits>
HWY_INLINE VU CodeWords(const uint8_t* HWY_RESTRICT codes, int64_t head_size, int64_t row, int lane) {
  if constexpr (kBits == 3) {
    const VU low = PlaneWords<2>(codes, row, lane);
    const VU high = PlaneWords<1>(codes + head_size / 4 * kPageTokens, row, lane);
    return hn::Or(low, hn::ShiftLeft<2>(high));
  } else {
    return PlaneWords<kBits>(codes, row, lane);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace moend::simd
HWY_AFTER_NAMESPACE();

#endif  // MOEND_ATTENTION_SIMD_CODES_INL_H_
