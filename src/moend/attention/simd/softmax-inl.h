// Online softmax over the 64 scores that one row has against one page.
#if defined(MOEND_ATTENTION_SIMD_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOEND_ATTENTION_SIMD_SOFTMAX_INL_H_
#undef MOEND_ATTENTION_SIMD_SOFTMAX_INL_H_
#else
#define MOEND_ATTENTION_SIMD_SOFTMAX_INL_H_
#endif

#include "moend/attention/simd/common-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moend::simd {
namespace HWY_NAMESPACE {

// Scores [64] become exp(score - new max); dead tokens become 0. Updates max and sum of the row and returns
// the factor that what was summed before must be multiplied with.
HWY_INLINE float SoftmaxRow(float* HWY_RESTRICT scores, uint64_t live, float& max, float& sum) {
  if (live == 0) return 1.0f;
  const DF df;
  VF s[kPageVectors];
  MOEND_UNROLL for (int v = 0; v < kPageVectors; ++v) s[v] = hn::LoadU(df, scores + v * kLanes);
  if (live != kAllLive) {
    const VF dead = hn::Set(df, -kInfinity);
    MOEND_UNROLL for (int v = 0; v < kPageVectors; ++v) s[v] = hn::IfThenElse(LiveLanes(live, v), s[v], dead);
  }
  VF high = s[0];
  MOEND_UNROLL for (int v = 1; v < kPageVectors; ++v) high = hn::Max(high, s[v]);
  const float old_max = max;
  const float new_max = HWY_MAX(old_max, Max(high));
  // Only -inf so far: any finite base gives exp(-inf) = 0 where -inf - -inf would be NaN.
  const float base = new_max == -kInfinity ? 0.0f : new_max;
  const VF vbase = hn::Set(df, base);
  VF total = hn::Zero(df);
  MOEND_UNROLL for (int v = 0; v < kPageVectors; ++v) {
    const VF p = Exp(hn::Sub(s[v], vbase));
    total = hn::Add(total, p);
    hn::StoreU(p, df, scores + v * kLanes);
  }
  float factor = 1.0f;
  if (new_max != old_max) factor = hn::GetLane(Exp(hn::Set(df, old_max - base)));
  sum = sum * factor + Sum(total);
  max = new_max;
  return factor;
}

// sums[64] += exp(score - max) / sum of one row, live tokens only.
HWY_INLINE void AddWeights(const float* HWY_RESTRICT scores, uint64_t live, float max, float sum,
                           float* HWY_RESTRICT sums) {
  if (live == 0 || sum == 0.0f) return;
  const DF df;
  const VF vmax = hn::Set(df, max);
  const VF scale = hn::Set(df, 1.0f / sum);
  MOEND_UNROLL for (int v = 0; v < kPageVectors; ++v) {
    const VF p = Exp(hn::Sub(hn::LoadU(df, scores + v * kLanes), vmax));
    const VF add = hn::IfThenElseZero(LiveLanes(live, v), hn::Mul(p, scale));
    hn::StoreU(hn::Add(hn::LoadU(df, sums + v * kLanes), add), df, sums + v * kLanes);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace moend::simd
HWY_AFTER_NAMESPACE();

#endif  // MOEND_ATTENTION_SIMD_SOFTMAX_INL_H_
