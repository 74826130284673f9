// Products of 16 bit integers: the largest scores of a page, where x86 multiplies pairs of them at once. They
// decide only which pages are worth a second look, and an instruction takes twice as many as of float32.
#if defined(MOEND_ATTENTION_SIMD_PAIRS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOEND_ATTENTION_SIMD_PAIRS_INL_H_
#undef MOEND_ATTENTION_SIMD_PAIRS_INL_H_
#else
#define MOEND_ATTENTION_SIMD_PAIRS_INL_H_
#endif

#include <cmath>

#include "moend/attention/simd/tile-inl.h"

#undef MOEND_HAVE_PAIRS
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
#define MOEND_HAVE_PAIRS 1
#else
#define MOEND_HAVE_PAIRS 0
#endif

#if MOEND_HAVE_PAIRS
HWY_BEFORE_NAMESPACE();
#if MOEND_HAVE_VNNI && HWY_COMPILER_GCC_ACTUAL
#pragma GCC target("avx512vnni")
#endif
namespace moend::simd {
namespace HWY_NAMESPACE {

// Queries and keys are scaled to at most this length: no sum of products is above its square then.
constexpr float kLength = 32000.0f;

// pairs: i16 [channels / 2][2]. Returns the row's length over kLength.
HWY_NOINLINE inline float RoundQuery(const float* HWY_RESTRICT q, int64_t head_size,
                                     int16_t* HWY_RESTRICT pairs) {
  const DF df;
  VF square = hn::Zero(df);
  for (int64_t c = 0; c < head_size; c += kLanes) {
    const VF x = hn::LoadU(df, q + c);
    square = hn::MulAdd(x, x, square);
  }
  const float length = std::sqrt(Sum(square)) / kLength;
  const VF scale = hn::Set(df, length > 0.0f ? 1.0f / length : 0.0f);
  for (int64_t c = 0; c < head_size; c += kLanes) {
    const auto rounded = hn::NearestInt(hn::Mul(hn::LoadU(df, q + c), scale));
    hn::StoreU(hn::DemoteTo(hn::Rebind<int16_t, DF>(), rounded), hn::Rebind<int16_t, DF>(), pairs + c);
  }
  return length;
}

// f16 [head_size][64] to i16 [channels / 2][64][2]; the first token stands in for those behind the last one.
// Returns the longest key's length over kLength.
HWY_NOINLINE inline float RoundKeys(const uint16_t* HWY_RESTRICT from, int64_t tokens, int64_t head_size,
                                    int32_t* HWY_RESTRICT pairs) {
  const DF df;
  VF longest = hn::Zero(df);
  for (int64_t t = 0; t < kPageTokens; t += kLanes) {
    VF square = hn::Zero(df);
    for (int64_t c = 0; c < head_size; ++c) {
      const VF x = LoadHalf(from + c * kPageTokens + t);
      square = hn::MulAdd(x, x, square);
    }
    longest = hn::Max(longest,
                      hn::IfThenElseZero(LiveLanes(FirstLive(tokens), static_cast<int>(t / kLanes)), square));
  }
  const float length = std::sqrt(Max(longest)) / kLength;
  const VF scale = hn::Set(df, length > 0.0f ? 1.0f / length : 0.0f);
  const DI di;
  for (int64_t c = 0; c < head_size; c += 2) {
    for (int64_t t = 0; t < kPageTokens; t += kLanes) {
      const auto even = hn::NearestInt(hn::Mul(LoadHalf(from + c * kPageTokens + t), scale));
      const auto odd = hn::NearestInt(hn::Mul(LoadHalf(from + (c + 1) * kPageTokens + t), scale));
      const auto both = hn::Or(hn::And(even, hn::Set(di, 0xffff)), hn::ShiftLeft<16>(odd));
      hn::StoreU(both, di, pairs + c / 2 * kPageTokens + t);
    }
    int32_t* row = pairs + c / 2 * kPageTokens;
    for (int64_t t = tokens; t < kPageTokens; ++t) row[t] = row[0];
  }
  return length;
}

// sum += the product of each pair, as AddProduct does it: GCC 12 otherwise stores all sums in every turn.
HWY_INLINE void AddPairs(hn::Vec<DI> a, hn::Vec<DI> b, hn::Vec<DI>& sum) {
#if MOEND_HAVE_VNNI && HWY_COMPILER_GCC_ACTUAL
  asm("vpdpwssd %2, %1, %0" : "+v"(sum.raw) : "v"(a.raw), "v"(b.raw));
#elif MOEND_HAVE_VNNI
  sum.raw = _mm512_dpwssd_epi32(sum.raw, a.raw, b.raw);
#elif HWY_TARGET <= HWY_AVX3
  sum.raw = _mm512_add_epi32(sum.raw, _mm512_madd_epi16(a.raw, b.raw));
#else
  sum.raw = _mm256_add_epi32(sum.raw, _mm256_madd_epi16(a.raw, b.raw));
#endif
}

// most[kRows] = the largest of the rows' products with kTileVectors vectors of tokens, or what it is already.
template <int kRows>
HWY_NOINLINE void MaxPairs(const int32_t* HWY_RESTRICT q, const int32_t* HWY_RESTRICT k, int64_t pairs,
                           float* HWY_RESTRICT most) {
  const DI di;
  hn::Vec<DI> acc[kRows][kTileVectors];
  MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
    MOEND_UNROLL for (int v = 0; v < kTileVectors; ++v) acc[r][v] = hn::Zero(di);
  }
  for (int64_t c = 0; c < pairs; ++c) {
    hn::Vec<DI> kv[kTileVectors];
    MOEND_UNROLL for (int v = 0; v < kTileVectors; ++v) kv[v] =
        hn::LoadU(di, k + c * kPageTokens + v * kLanes);
    MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
      const auto qc = hn::Set(di, q[r * pairs + c]);
      MOEND_UNROLL for (int v = 0; v < kTileVectors; ++v) AddPairs(kv[v], qc, acc[r][v]);
    }
  }
  MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
    auto high = acc[r][0];
    MOEND_UNROLL for (int v = 1; v < kTileVectors; ++v) high = hn::Max(high, acc[r][v]);
    most[r] = HWY_MAX(most[r], Max(hn::ConvertTo(DF(), high)));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace moend::simd
HWY_AFTER_NAMESPACE();
#endif  // MOEND_HAVE_PAIRS

#endif  // MOEND_ATTENTION_SIMD_PAIRS_INL_H_
