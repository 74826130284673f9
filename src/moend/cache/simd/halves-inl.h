// Vectors of half floats. Instruction sets that lack a conversion, or round differently, do it here.
#if defined(MOEND_CACHE_SIMD_HALVES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOEND_CACHE_SIMD_HALVES_INL_H_
#undef MOEND_CACHE_SIMD_HALVES_INL_H_
#else
#define MOEND_CACHE_SIMD_HALVES_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>

#include "moend/base/half.h"

HWY_BEFORE_NAMESPACE();
namespace moend::codec_simd {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// At most 16 lanes, because the formats interleave 16 tokens or channels (plan/layout.h).
using DF = hn::CappedTag<float, 16>;
using DU = hn::RebindToUnsigned<DF>;
using DI = hn::RebindToSigned<DF>;
using DBits = hn::Rebind<uint16_t, DF>;
using DHalf = hn::Rebind<hwy::float16_t, DF>;
using VF = hn::Vec<DF>;
using VU = hn::Vec<DU>;

constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(DF()));

#undef MOEND_HALF_INSTRUCTIONS
#if HWY_ARCH_ARM_A64 || (HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2)
#define MOEND_HALF_INSTRUCTIONS 1
#else
#define MOEND_HALF_INSTRUCTIONS 0
#endif

// Half float bits in the low half of each lane to float; the same as HalfToFloat().
HWY_INLINE VF FloatFromHalfBits(VU bits) {
#if MOEND_HALF_INSTRUCTIONS
  const hn::Vec<DBits> narrow = hn::DemoteTo(DBits(), hn::BitCast(DI(), bits));
  return hn::PromoteTo(DF(), hn::BitCast(DHalf(), narrow));
#else
  const DF df;
  const DU du;
  const VU magnitude = hn::And(bits, hn::Set(du, 0x7FFFu));
  const VU sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(du, 0x8000u)));
  const VU rebias = hn::Set(du, 112u << 23);
  VU normal = hn::Add(hn::ShiftLeft<13>(magnitude), rebias);
  // Infinity and NaN: the exponent is all ones in both formats.
  const auto is_special = hn::Gt(hn::BitCast(DI(), magnitude), hn::Set(DI(), 0x7BFF));
  normal = hn::IfThenElse(hn::RebindMask(du, is_special), hn::Add(normal, rebias), normal);
  const VF small = hn::Mul(hn::ConvertTo(df, hn::BitCast(DI(), magnitude)), hn::Set(df, kMinHalfStep));
  const auto is_small = hn::Lt(hn::BitCast(DI(), magnitude), hn::Set(DI(), 0x0400));
  const VF value = hn::IfThenElse(hn::RebindMask(df, is_small), small, hn::BitCast(df, normal));
  return hn::Or(value, hn::BitCast(df, sign));
#endif
}

// |f| <= kMaxHalf; the same as FloatToHalf().
HWY_INLINE VU HalfBitsFromFloat(VF f) {
#if MOEND_HALF_INSTRUCTIONS
  return hn::PromoteTo(DU(), hn::BitCast(DBits(), hn::DemoteTo(DHalf(), f)));
#else
  const DF df;
  const DU du;
  const VU bits = hn::BitCast(du, f);
  const VU magnitude = hn::And(bits, hn::Set(du, 0x7FFFFFFFu));
  const VU sign = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 0x8000u));
  const VU odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(du, 1u));
  const VU rounding = hn::Sub(hn::Set(du, 0xFFFu), hn::Set(du, 112u << 23));
  const VU normal = hn::ShiftRight<13>(hn::Add(hn::Add(magnitude, rounding), odd));
  const VF shifted = hn::Add(hn::BitCast(df, magnitude), hn::Set(df, 0.5f));
  const VU small = hn::Sub(hn::BitCast(du, shifted), hn::Set(du, 0x3F000000u));
  const auto is_small = hn::Lt(hn::BitCast(DI(), magnitude), hn::Set(DI(), 0x38800000));
  return hn::Or(sign, hn::IfThenElse(hn::RebindMask(du, is_small), small, normal));
#endif
}

HWY_INLINE VF LoadHalves(const uint16_t* HWY_RESTRICT from) {
#if MOEND_HALF_INSTRUCTIONS
  return hn::PromoteTo(DF(), hn::BitCast(DHalf(), hn::LoadU(DBits(), from)));
#else
  return FloatFromHalfBits(hn::PromoteTo(DU(), hn::LoadU(DBits(), from)));
#endif
}

HWY_INLINE void StoreHalfBits(VU bits, uint16_t* HWY_RESTRICT to) {
  hn::StoreU(hn::DemoteTo(DBits(), hn::BitCast(DI(), bits)), DBits(), to);
}

// The same as ClampToHalfRange().
HWY_INLINE VF ClampToHalfRange(VF f) {
  const DF df;
  const VF number = hn::IfThenElseZero(hn::Eq(f, f), f);
  return hn::Min(hn::Max(number, hn::Set(df, -kMaxHalf)), hn::Set(df, kMaxHalf));
}

}  // namespace HWY_NAMESPACE
}  // namespace moend::codec_simd
HWY_AFTER_NAMESPACE();

#endif  // MOEND_CACHE_SIMD_HALVES_INL_H_
