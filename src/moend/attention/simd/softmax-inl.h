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

// Of each row: what the sums over earlier pages must be multiplied with, and the largest exp(score - max) of
// this page.
struct PageWeights {
  float* factor;
  float* peak;
};

#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86

HWY_INLINE void LoadScores(const float* HWY_RESTRICT scores, uint64_t live, VF (&s)[kPageVectors]) {
  const DF df;
  MOEND_UNROLL for (int v = 0; v < kPageVectors; ++v) {
    s[v] = hn::LoadU(df, scores + v * kLanes);
  }
  if (live == kAllLive) return;
  const VF dead = hn::Set(df, -kInfinity);
  MOEND_UNROLL for (int v = 0; v < kPageVectors; ++v) {
    s[v] = hn::IfThenElse(LiveLanes(live, v), s[v], dead);
  }
}

// scores[kRows][64] become exp(score - new max), 0 for tokens that are not in live(row). Updates max and sum.
template <int kRows, class Live>
HWY_INLINE void SoftmaxBlock(float* HWY_RESTRICT scores, const Live& live, float* max, float* sum,
                             const PageWeights& out) {
  const DF df;
  constexpr __mmask8 kMask = (1 << kRows) - 1;
  VF s[kRows][kPageVectors], high[kRows], total[kRows];
  MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
    LoadScores(scores + r * kPageTokens, live(r), s[r]);
    high[r] = hn::Max(hn::Max(s[r][0], s[r][1]), hn::Max(s[r][2], s[r][3]));
  }
  const __m128 page_max = ReduceRows<kRows>(high, MaxOp);
  const __m128 old_max = _mm_maskz_loadu_ps(kMask, max);
  const __m128 new_max = _mm_max_ps(old_max, page_max);
  _mm_mask_storeu_ps(max, kMask, new_max);
  // Only -inf so far: any finite base gives exp(-inf) = 0 where -inf - -inf would be NaN.
  const __mmask8 none = _mm_cmp_ps_mask(new_max, _mm_set1_ps(-kInfinity), _CMP_EQ_OQ);
  const __m128 base = _mm_mask_mov_ps(new_max, none, _mm_setzero_ps());
  alignas(16) float bases[4];
  _mm_store_ps(bases, base);
  MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
    const VF row_base = hn::Set(df, bases[r]);
    VF p[kPageVectors];
    MOEND_UNROLL for (int v = 0; v < kPageVectors; ++v) {
      p[v] = Exp(hn::Sub(s[r][v], row_base));
      hn::StoreU(p[v], df, scores + r * kPageTokens + v * kLanes);
    }
    total[r] = hn::Add(hn::Add(p[0], p[1]), hn::Add(p[2], p[3]));
  }
  // Either the factor or the peak is 1; the other one is exp(the lower maximum - the higher).
  const __m128 lower = _mm_sub_ps(_mm_min_ps(old_max, page_max), base);
  const __m128 weight = _mm512_castps512_ps128(Exp(VF{_mm512_zextps128_ps512(lower)}).raw);
  const __mmask8 rises = _mm_cmp_ps_mask(page_max, old_max, _CMP_GT_OQ);
  const __m128 one = _mm_set1_ps(1.0f);
  const __m128 factor = _mm_mask_mov_ps(one, rises, weight);
  _mm_mask_storeu_ps(out.factor, kMask, factor);
  _mm_mask_storeu_ps(out.peak, kMask, _mm_mask_mov_ps(weight, rises, one));
  const __m128 new_sum =
      _mm_fmadd_ps(_mm_maskz_loadu_ps(kMask, sum), factor, ReduceRows<kRows>(total, AddOp));
  _mm_mask_storeu_ps(sum, kMask, new_sum);
}

#elif HWY_TARGET == HWY_AVX2

// As above; the scores of a row do not fit into registers and are read twice.
template <int kRows, class Live>
HWY_INLINE void SoftmaxBlock(float* HWY_RESTRICT scores, const Live& live, float* max, float* sum,
                             const PageWeights& out) {
  const DF df;
  VF row[kRows];
  MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
    float* HWY_RESTRICT s = scores + r * kPageTokens;
    const uint64_t seen = live(r);
    if (seen != kAllLive) {
      for (int v = 0; v < kPageVectors; ++v) {
        const VF x = hn::LoadU(df, s + v * kLanes);
        hn::StoreU(hn::IfThenElse(LiveLanes(seen, v), x, hn::Set(df, -kInfinity)), df, s + v * kLanes);
      }
    }
    VF high = hn::LoadU(df, s);
    MOEND_UNROLL for (int v = 1; v < kPageVectors; ++v) high = hn::Max(high, hn::LoadU(df, s + v * kLanes));
    row[r] = high;
  }
  alignas(16) float old_rows[4] = {}, sums[4] = {}, bases[4], results[3][4];
  for (int r = 0; r < kRows; ++r) old_rows[r] = max[r], sums[r] = sum[r];
  const __m128 page_max = ReduceRows<kRows>(row, MaxOp);
  const __m128 old_max = _mm_load_ps(old_rows);
  const __m128 rises = _mm_cmp_ps(page_max, old_max, _CMP_GT_OQ);
  const __m128 new_max = _mm_blendv_ps(old_max, page_max, rises);
  // Only -inf so far: any finite base gives exp(-inf) = 0 where -inf - -inf would be NaN.
  const __m128 none = _mm_cmp_ps(new_max, _mm_set1_ps(-kInfinity), _CMP_EQ_OQ);
  const __m128 base = _mm_andnot_ps(none, new_max);
  _mm_store_ps(bases, base);
  MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
    float* HWY_RESTRICT s = scores + r * kPageTokens;
    const VF row_base = hn::Set(df, bases[r]);
    VF total = hn::Zero(df);
    MOEND_UNROLL for (int v = 0; v < kPageVectors; v += 4) {
      VF p[4];
      MOEND_UNROLL for (int i = 0; i < 4; ++i) p[i] = hn::Sub(hn::LoadU(df, s + (v + i) * kLanes), row_base);
      ExpInStep(p);
      MOEND_UNROLL for (int i = 0; i < 4; ++i) hn::StoreU(p[i], df, s + (v + i) * kLanes);
      total = hn::Add(total, hn::Add(hn::Add(p[0], p[1]), hn::Add(p[2], p[3])));
    }
    row[r] = total;
  }
  // Either the factor or the peak is 1; the other one is exp(the lower maximum - the higher).
  const __m128 lower = _mm_sub_ps(_mm_blendv_ps(page_max, old_max, rises), base);
  const __m128 weight = _mm256_castps256_ps128(Exp(VF{_mm256_zextps128_ps256(lower)}).raw);
  const __m128 one = _mm_set1_ps(1.0f);
  const __m128 factor = _mm_blendv_ps(one, weight, rises);
  _mm_store_ps(results[0], new_max);
  _mm_store_ps(results[1], factor);
  _mm_store_ps(results[2], _mm_blendv_ps(weight, one, rises));
  _mm_store_ps(sums, _mm_fmadd_ps(_mm_load_ps(sums), factor, ReduceRows<kRows>(row, AddOp)));
  for (int r = 0; r < kRows; ++r)
    max[r] = results[0][r], out.factor[r] = results[1][r], out.peak[r] = results[2][r], sum[r] = sums[r];
}

#else

HWY_NOINLINE inline void SoftmaxRow(float* HWY_RESTRICT scores, uint64_t live, float& max, float& sum,
                                    float& factor, float& peak) {
  const DF df;
  VF high = hn::Set(df, -kInfinity);
  if (live != kAllLive) {
    for (int v = 0; v < kPageVectors; ++v) {
      const VF s = hn::LoadU(df, scores + v * kLanes);
      hn::StoreU(hn::IfThenElse(LiveLanes(live, v), s, high), df, scores + v * kLanes);
    }
  }
  for (int v = 0; v < kPageVectors; ++v) high = hn::Max(high, hn::LoadU(df, scores + v * kLanes));
  const float old_max = max, page_max = Max(high);
  const bool rises = page_max > old_max;
  max = rises ? page_max : old_max;
  // Only -inf so far: any finite base gives exp(-inf) = 0 where -inf - -inf would be NaN.
  const float base = max == -kInfinity ? 0.0f : max;
  const VF row_base = hn::Set(df, base);
  VF total = hn::Zero(df);
  for (int v = 0; v < kPageVectors; ++v) {
    const VF p = Exp(hn::Sub(hn::LoadU(df, scores + v * kLanes), row_base));
    hn::StoreU(p, df, scores + v * kLanes);
    total = hn::Add(total, p);
  }
  // Either the factor or the peak is 1; the other one is exp(the lower maximum - the higher).
  const float weight = hn::GetLane(Exp(hn::Set(df, (rises ? old_max : page_max) - base)));
  factor = rises ? weight : 1.0f;
  peak = rises ? 1.0f : weight;
  sum = sum * factor + Sum(total);
}

template <int kRows, class Live>
HWY_INLINE void SoftmaxBlock(float* HWY_RESTRICT scores, const Live& live, float* max, float* sum,
                             const PageWeights& out) {
  for (int r = 0; r < kRows; ++r)
    SoftmaxRow(scores + r * kPageTokens, live(r), max[r], sum[r], out.factor[r], out.peak[r]);
}

#endif

// scores[n], n a multiple of 16: cap * tanh(score / cap). tanh x = (e^2x - 1) / (e^2x + 1), of which rounding
// takes some 1e-7 of the cap.
HWY_NOINLINE inline void CapScores(float* HWY_RESTRICT scores, int64_t n, float cap) {
  const DF df;
  const VF vcap = hn::Set(df, cap), twice = hn::Set(df, 2.0f / cap), one = hn::Set(df, 1.0f);
  const VF most = hn::Set(df, 80.0f);  // far beyond where tanh is 1
  for (int64_t i = 0; i < n; i += kLanes) {
    const VF e = Exp(hn::Min(most, hn::Mul(hn::LoadU(df, scores + i), twice)));
    const VF tanh = hn::Div(hn::Sub(e, one), hn::Add(e, one));
    hn::StoreU(hn::Mul(vcap, tanh), df, scores + i);
  }
}

// live(row) as for SoftmaxBlock, with rows counted from the first of `scores`.
template <class Live>
HWY_INLINE void SoftmaxRows(float* scores, int64_t rows, const Live& live, float* max, float* sum,
                            const PageWeights& out) {
  ForRowBlocks<4>(rows, [&](auto n, int64_t r) {
    SoftmaxBlock<n()>(
        scores + r * kPageTokens, [&](int i) { return live(r + i); }, max + r, sum + r,
        PageWeights{out.factor + r, out.peak + r});
  });
}

template <int kRows>
HWY_INLINE void MaxBlock(const float* HWY_RESTRICT scores, uint64_t live, float* most) {
  const DF df;
  const VF dead = hn::Set(df, -kInfinity);
  VF high[kRows];
  MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
    high[r] = dead;
    MOEND_UNROLL for (int v = 0; v < kPageVectors; ++v) {
      VF s = hn::LoadU(df, scores + r * kPageTokens + v * kLanes);
      if (live != kAllLive) s = hn::IfThenElse(LiveLanes(live, v), s, dead);
      high[r] = hn::Max(high[r], s);
    }
  }
#if HWY_TARGET <= HWY_AVX2 && HWY_ARCH_X86
  alignas(16) float all[4];
  _mm_store_ps(all, ReduceRows<kRows>(high, MaxOp));
  for (int r = 0; r < kRows; ++r) most[r] = all[r];
#else
  for (int r = 0; r < kRows; ++r) most[r] = Max(high[r]);
#endif
}

// most[rows]: the largest of the 64 scores of each row, live tokens only.
HWY_INLINE void MaxRows(const float* scores, int64_t rows, uint64_t live, float* most) {
  ForRowBlocks<4>(rows, [&](auto n, int64_t r) { MaxBlock<n()>(scores + r * kPageTokens, live, most + r); });
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

// weights[64 * 64]: column `at` of 64 rows, one a token, becomes exp(score - max) / sum of one query row, 0
// for tokens that are not live.
HWY_INLINE void StoreColumn(float* HWY_RESTRICT scores, uint64_t live, float max, float sum, int64_t at,
                            float* HWY_RESTRICT weights) {
  const DF df;
  const VF vmax = hn::Set(df, max);
  const VF scale = hn::Set(df, sum > 0.0f ? 1.0f / sum : 0.0f);
  MOEND_UNROLL for (int v = 0; v < kPageVectors; ++v) {
    const VF p = Exp(hn::Sub(hn::LoadU(df, scores + v * kLanes), vmax));
    hn::StoreU(hn::IfThenElseZero(LiveLanes(live, v), hn::Mul(p, scale)), df, scores + v * kLanes);
  }
  for (int64_t t = 0; t < kPageTokens; ++t) weights[t * kPageTokens + at] = sum > 0.0f ? scores[t] : 0.0f;
}

// squares[64] += weight * (exp(score - max) / sum)^2 of one row, live tokens only.
HWY_INLINE void AddSquares(const float* HWY_RESTRICT scores, uint64_t live, float max, float sum,
                           float weight, float* HWY_RESTRICT squares) {
  if (live == 0 || sum == 0.0f) return;
  const DF df;
  const VF vmax = hn::Set(df, max);
  const VF scale = hn::Set(df, 1.0f / sum);
  const VF vweight = hn::Set(df, weight);
  MOEND_UNROLL for (int v = 0; v < kPageVectors; ++v) {
    const VF p = hn::Mul(Exp(hn::Sub(hn::LoadU(df, scores + v * kLanes), vmax)), scale);
    const VF add = hn::IfThenElseZero(LiveLanes(live, v), hn::Mul(hn::Mul(p, p), vweight));
    hn::StoreU(hn::Add(hn::LoadU(df, squares + v * kLanes), add), df, squares + v * kLanes);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace moend::simd
HWY_AFTER_NAMESPACE();

#endif  // MOEND_ATTENTION_SIMD_SOFTMAX_INL_H_
