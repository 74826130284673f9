// The quantizer of group.h for many groups at a time.
#if defined(MOEND_CACHE_SIMD_GROUPS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOEND_CACHE_SIMD_GROUPS_INL_H_
#undef MOEND_CACHE_SIMD_GROUPS_INL_H_
#else
#define MOEND_CACHE_SIMD_GROUPS_INL_H_
#endif

#include <limits>

#include "moend/cache/group.h"
#include "moend/cache/simd/planes-inl.h"
#include "moend/plan/layout.h"

HWY_BEFORE_NAMESPACE();
namespace moend::codec_simd {
namespace HWY_NAMESPACE {

constexpr int64_t kMaxGroups = 256;

// Parameters of the groups of one side of a page: first the ranges, then what follows from them.
struct Groups {
  alignas(64) float low[kMaxGroups], high[kMaxGroups];
  alignas(64) float min[kMaxGroups], inverse[kMaxGroups];
};

// Lanes whose token is in `live`; tokens [token, token + kLanes).
HWY_INLINE auto LiveLanes(uint64_t live, int64_t token) {
  const DU du;
  const VU bits = hn::Set(du, static_cast<uint32_t>(live >> token & 0xFFFFu));
  const VU lane_bit = hn::Shl(hn::Set(du, 1u), hn::BitCast(du, hn::Iota(DI(), 0)));
  return hn::RebindMask(DF(), hn::TestBit(bits, lane_bit));
}

// Range of the n values of x. kMasked: only of those in `live`; (inf, -inf) if there are none.
template <bool kMasked>
HWY_INLINE void FindRange(const float* HWY_RESTRICT x, int64_t n, uint64_t live, float& low, float& high) {
  const DF df;
  const VF infinity = hn::Set(df, std::numeric_limits<float>::infinity());
  VF least = infinity, most = hn::Neg(infinity);
  for (int64_t i = 0; i < n; i += kLanes) {
    const VF value = ClampToHalfRange(hn::LoadU(df, x + i));
    if constexpr (kMasked) {
      const auto is_live = LiveLanes(live, i);
      least = hn::Min(least, hn::IfThenElse(is_live, value, infinity));
      most = hn::Max(most, hn::IfThenElse(is_live, value, hn::Neg(infinity)));
    } else {
      least = hn::Min(least, value);
      most = hn::Max(most, value);
    }
  }
  low = hn::GetLane(hn::MinOfLanes(df, least));
  high = hn::GetLane(hn::MaxOfLanes(df, most));
}

// ChooseScale() and InverseScale() of n groups; n is a multiple of 16. An empty range gives zeros.
HWY_INLINE void ChooseScales(Groups& groups, int64_t n, int max_code, uint16_t* HWY_RESTRICT scales,
                             uint16_t* HWY_RESTRICT mins) {
  const DF df;
  const DU du;
  const VF last = hn::Set(df, static_cast<float>(max_code));
  const VF reach = hn::Set(df, static_cast<float>(max_code) + 0.5f);
  const VU one = hn::Set(du, 1u);
  for (int64_t i = 0; i < n; i += kLanes) {
    VF low = hn::Load(df, groups.low + i), high = hn::Load(df, groups.high + i);
    const auto any = hn::Le(low, high);
    low = hn::Add(hn::IfThenElseZero(any, low), hn::Zero(df));  // no negative zero
    high = hn::IfThenElseZero(any, high);
    // The half float below: for a negative value that is one more in magnitude.
    VU min_bits = HalfBitsFromFloat(low);
    const auto above = hn::RebindMask(du, hn::Gt(FloatFromHalfBits(min_bits), low));
    const auto negative = hn::TestBit(min_bits, hn::Set(du, 0x8000u));
    const VU lower = hn::IfThenElse(negative, hn::Add(min_bits, one), hn::Sub(min_bits, one));
    min_bits = hn::IfThenElse(above, lower, min_bits);
    const VF min = FloatFromHalfBits(min_bits);

    const VF span = hn::Sub(high, min);
    VU scale_bits = HalfBitsFromFloat(hn::Div(span, last));
    const VF nearest = FloatFromHalfBits(scale_bits);
    const auto is_short = hn::RebindMask(du, hn::Gt(span, hn::Mul(nearest, reach)));
    scale_bits = hn::IfThenElse(is_short, hn::Add(scale_bits, one), scale_bits);
    const VF scale = FloatFromHalfBits(scale_bits);
    const auto constant = hn::Eq(scale, hn::Zero(df));
    const VF inverse = hn::IfThenZeroElse(constant, hn::Div(hn::Set(df, 1.0f), scale));

    StoreHalfBits(min_bits, mins + i);
    StoreHalfBits(scale_bits, scales + i);
    hn::Store(min, df, groups.min + i);
    hn::Store(inverse, df, groups.inverse + i);
  }
}

// kLanes neighbours of one group in steps from its minimum, and the codes of such.
HWY_INLINE VF Steps(const float* HWY_RESTRICT x, VF min, VF inverse) {
  return hn::Mul(hn::Sub(ClampToHalfRange(hn::LoadU(DF(), x)), min), inverse);
}
HWY_INLINE hn::Vec<DI> Codes(VF steps, VF last) {
  return hn::NearestInt(hn::Min(hn::Max(steps, hn::Zero(DF())), last));
}
HWY_INLINE VU Encode(const float* HWY_RESTRICT x, VF min, VF inverse, VF last) {
  return hn::BitCast(DU(), Codes(Steps(x, min, inverse), last));
}

// ResidualSum() of the n values of x.
HWY_INLINE int32_t ResidualSum(const float* HWY_RESTRICT x, int64_t n, float min, float inverse, VF last) {
  const DF df;
  const DI di;
  const VF most = hn::Set(df, kMostResidual), units = hn::Set(df, kResidualUnits);
  hn::Vec<DI> sum = hn::Zero(di);
  for (int64_t i = 0; i < n; i += kLanes) {
    const VF steps = Steps(x + i, hn::Set(df, min), hn::Set(df, inverse));
    const VF off = hn::Mul(hn::Sub(steps, hn::ConvertTo(df, Codes(steps, last))), units);
    const hn::Vec<DI> residual = hn::NearestInt(hn::Min(hn::Max(off, hn::Neg(most)), most));
    sum = hn::Add(sum, hn::Mul(residual, residual));
  }
  return hn::GetLane(hn::SumOfLanes(di, sum));
}

// Ranges with kNarrowMargin taken off at both ends; empty ones stay empty. n is a multiple of 16.
HWY_INLINE void NarrowRanges(const Groups& from, int64_t n, Groups& to) {
  const DF df;
  for (int64_t i = 0; i < n; i += kLanes) {
    const VF low = hn::Load(df, from.low + i), high = hn::Load(df, from.high + i);
    const VF margin = hn::Mul(hn::Sub(high, low), hn::Set(df, kNarrowMargin));
    hn::Store(hn::Add(low, margin), df, to.low + i);
    hn::Store(hn::Sub(high, margin), df, to.high + i);
  }
}

// Values of byte j of every word.
template <int j>
HWY_INLINE VF Decode(VU words, float min, float scale) {
  const DF df;
  const VU code = hn::And(hn::ShiftRight<8 * j>(words), hn::Set(DU(), 255u));
  return hn::MulAdd(hn::ConvertTo(df, hn::BitCast(DI(), code)), hn::Set(df, scale), hn::Set(df, min));
}

}  // namespace HWY_NAMESPACE
}  // namespace moend::codec_simd
HWY_AFTER_NAMESPACE();

#endif  // MOEND_CACHE_SIMD_GROUPS_INL_H_
