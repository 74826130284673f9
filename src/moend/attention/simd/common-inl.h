// Vector types and small helpers that every kernel shares. A vector has at most 16 float lanes, because the
// packed formats interleave 16 tokens or channels (plan/layout.h).
#if defined(MOEND_ATTENTION_SIMD_COMMON_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOEND_ATTENTION_SIMD_COMMON_INL_H_
#undef MOEND_ATTENTION_SIMD_COMMON_INL_H_
#else
#define MOEND_ATTENTION_SIMD_COMMON_INL_H_
#endif

#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "moend/attention/attention.h"
#include "moend/attention/simd/blocking.h"

// Loops over register arrays must disappear, or the arrays live in memory.
#define MOEND_UNROLL _Pragma("GCC unroll 16")

// Highway 1.0 checks for AVX512-VNNI before it chooses AVX3_DL, but tells the compiler of AVX-VNNI only; GCC
// can be told here.
#undef MOEND_HAVE_VNNI
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3_DL && (HWY_COMPILER_GCC_ACTUAL || defined(__AVX512VNNI__))
#define MOEND_HAVE_VNNI 1
#else
#define MOEND_HAVE_VNNI 0
#endif

HWY_BEFORE_NAMESPACE();
namespace moend::simd {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, 16>;
using DU = hn::RebindToUnsigned<DF>;
using DI = hn::RebindToSigned<DF>;
using DH = hn::Rebind<hwy::float16_t, DF>;
using DHBits = hn::Rebind<uint16_t, DF>;
using VF = hn::Vec<DF>;
using VU = hn::Vec<DU>;

constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));
constexpr int kPageVectors = static_cast<int>(kPageTokens) / kLanes;

// AVX-512 and NEON have 32 vector registers, the others 16.
#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = false;
#endif

constexpr float kInfinity = std::numeric_limits<float>::infinity();

HWY_INLINE VF LoadHalf(const uint16_t* from) {
  return hn::PromoteTo(DF(), hn::BitCast(DH(), hn::LoadU(DHBits(), from)));
}

HWY_INLINE VU LoadWords(const uint8_t* from) {
#if HWY_TARGET == HWY_SCALAR
  uint32_t word = 0;
  std::memcpy(&word, from, sizeof(word));
  return hn::Set(DU(), word);
#else
  return hn::BitCast(DU(), hn::LoadU(hn::Repartition<uint8_t, DU>(), from));
#endif
}

HWY_INLINE const uint16_t* AsHalves(const uint8_t* from) {
  return reinterpret_cast<const uint16_t*>(from);
}

// Byte j of every 32-bit lane as float; j is known after unrolling.
HWY_INLINE VF ByteToFloat(VU words, int j) {
  VU byte = words;
  if (j == 1) byte = hn::ShiftRight<8>(words);
  if (j == 2) byte = hn::ShiftRight<16>(words);
  if (j == 3) byte = hn::ShiftRight<24>(words);
  if (j < 3) byte = hn::And(byte, hn::Set(DU(), 255u));
  return hn::ConvertTo(DF(), hn::BitCast(DI(), byte));
}

// sum += a * b. Where the sums of a block need nearly all registers, GCC otherwise puts results into those of
// a or b and pays with moves.
HWY_INLINE void AddProduct(VF a, VF b, VF& sum) {
#if HWY_TARGET == HWY_AVX2 && HWY_COMPILER_GCC_ACTUAL
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum.raw) : "x"(a.raw), "x"(b.raw));
#else
  sum = hn::MulAdd(a, b, sum);
#endif
}

// Bytes that will be read next, brought near while others are worked on: the hardware does not look beyond a
// memory page, and the packed pages lie anywhere.
class Ahead {
 public:
  Ahead() = default;
  // Spread over `steps` calls of Next().
  Ahead(const uint8_t* begin, const uint8_t* end, int64_t steps)
      : at_(begin), end_(end), lines_((end - begin + steps * kLine - 1) / (steps * kLine)) {}

  HWY_INLINE void Next() {
    for (int64_t i = 0; i < lines_ && at_ < end_; ++i, at_ += kLine) hwy::Prefetch(at_);
  }

 private:
  static constexpr int64_t kLine = 64;
  const uint8_t* at_ = nullptr;
  const uint8_t* end_ = nullptr;
  int64_t lines_ = 0;
};

HWY_INLINE float Sum(VF v) {
  return hn::GetLane(hn::SumOfLanes(DF(), v));
}
HWY_INLINE float Max(VF v) {
  return hn::GetLane(hn::MaxOfLanes(DF(), v));
}

#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86
// Four vectors to one of four sums or maxima at once: a third of the instructions of four reductions.
template <class Op>
HWY_INLINE __m128 ReduceRows(__m512 a, __m512 b, __m512 c, __m512 d, const Op& op) {
  const __m512d ab = _mm512_castps_pd(op(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  const __m512d cd = _mm512_castps_pd(op(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
  const __m512 rows =
      op(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  const __m512 half = op(rows, _mm512_shuffle_f32x4(rows, rows, 0x4e));
  return _mm512_castps512_ps128(op(half, _mm512_shuffle_f32x4(half, half, 0xb1)));
}

// out[kRows] = sum or maximum of each vector.
template <int kRows, class Op>
HWY_INLINE __m128 ReduceRows(const VF (&v)[kRows], const Op& op) {
  constexpr int kLast = kRows - 1;
  return ReduceRows(v[0].raw, v[HWY_MIN(1, kLast)].raw, v[HWY_MIN(2, kLast)].raw, v[kLast].raw, op);
}

HWY_INLINE __m512 AddOp(__m512 a, __m512 b) {
  return _mm512_add_ps(a, b);
}
HWY_INLINE __m512 MaxOp(__m512 a, __m512 b) {
  return _mm512_max_ps(a, b);
}
#endif

#if HWY_TARGET == HWY_AVX2
// The same for vectors of 8 lanes.
template <int kRows, class Op>
HWY_INLINE __m128 ReduceRows(const VF (&v)[kRows], const Op& op) {
  constexpr int kLast = kRows - 1;
  const __m256 a = v[0].raw, b = v[HWY_MIN(1, kLast)].raw, c = v[HWY_MIN(2, kLast)].raw, d = v[kLast].raw;
  const __m256d ab = _mm256_castps_pd(op(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
  const __m256d cd = _mm256_castps_pd(op(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
  const __m256 rows =
      op(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
  const __m256 swapped = _mm256_permute2f128_ps(rows, rows, 1);
  return _mm256_castps256_ps128(op(rows, swapped));
}

HWY_INLINE __m256 AddOp(__m256 a, __m256 b) {
  return _mm256_add_ps(a, b);
}
HWY_INLINE __m256 MaxOp(__m256 a, __m256 b) {
  return _mm256_max_ps(a, b);
}
#endif

// n * ln 2 is subtracted in two parts, the first exact in float.
constexpr float kLog2E = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;

// e^r = 1 + r + r^2 g(r) from the highest power down, g = (e^r - 1 - r) / r^2 interpolated in Chebyshev nodes
// of |r| <= ln(2) / 2.
constexpr float kExp[7] = {
    1.392621346632e-3f, 8.363202971576e-3f, 4.1666554437686e-2f, 0.16666576845994f, 0.5f, 1.0f, 1.0f};

// e^x for x <= 88, within 1 ulp where the result is normal, about 0 where it is not; NaN stays NaN.
#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86
HWY_INLINE VF Exp(VF x) {
  const DF df;
  // Scaling by 2^n flushes to 0 by itself; the bound keeps -inf from becoming NaN, and lets NaN pass.
  x = VF{_mm512_max_ps(_mm512_set1_ps(-104.5f), x.raw)};
  const VF scaled = hn::Mul(x, hn::Set(df, kLog2E));
  const VF n{_mm512_roundscale_ps(scaled.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  VF r = hn::NegMulAdd(n, hn::Set(df, kLn2High), x);
  r = hn::NegMulAdd(n, hn::Set(df, kLn2Low), r);
  VF p = hn::MulAdd(hn::Set(df, kExp[0]), r, hn::Set(df, kExp[1]));
  MOEND_UNROLL for (int k = 2; k < 7; ++k) p = hn::MulAdd(p, r, hn::Set(df, kExp[k]));
  return VF{_mm512_scalef_ps(p.raw, n.raw)};
}
#else
// Of several vectors in step: one after the other, the dependent instructions of each would fill the
// scheduler and wait for their own chain.
template <int kVectors>
HWY_INLINE void ExpInStep(VF (&x)[kVectors]) {
  const DF df;
  const DI di;
  const VF lowest = hn::Set(df, -87.33f);
  hn::Vec<DI> n[kVectors];
  VF r[kVectors], p[kVectors];
  MOEND_UNROLL for (int i = 0; i < kVectors; ++i) n[i] =
      hn::NearestInt(hn::Mul(hn::Max(x[i], lowest), hn::Set(df, kLog2E)));
  MOEND_UNROLL for (int i = 0; i < kVectors; ++i) p[i] = hn::ConvertTo(df, n[i]);
  MOEND_UNROLL for (int i = 0; i < kVectors; ++i) r[i] = hn::NegMulAdd(p[i], hn::Set(df, kLn2High), x[i]);
  MOEND_UNROLL for (int i = 0; i < kVectors; ++i) r[i] = hn::NegMulAdd(p[i], hn::Set(df, kLn2Low), r[i]);
  MOEND_UNROLL for (int i = 0; i < kVectors; ++i) n[i] = hn::ShiftLeft<23>(hn::Add(n[i], hn::Set(di, 127)));
  MOEND_UNROLL for (int i = 0; i < kVectors; ++i) p[i] =
      hn::MulAdd(hn::Set(df, kExp[0]), r[i], hn::Set(df, kExp[1]));
  MOEND_UNROLL for (int k = 2; k < 7; ++k) {
    MOEND_UNROLL for (int i = 0; i < kVectors; ++i) p[i] = hn::MulAdd(p[i], r[i], hn::Set(df, kExp[k]));
  }
  MOEND_UNROLL for (int i = 0; i < kVectors; ++i) x[i] =
      hn::IfThenZeroElse(hn::Lt(x[i], lowest), hn::Mul(p[i], hn::BitCast(df, n[i])));
}

HWY_INLINE VF Exp(VF x) {
  VF one[1] = {x};
  ExpInStep(one);
  return one[0];
}
#endif

// Lanes whose token is in `live`; vector v of the page's 64 tokens.
HWY_INLINE auto LiveLanes(uint64_t live, int v) {
  const DU du;
  const VU bits = hn::Set(du, static_cast<uint32_t>(live >> (v * kLanes) & 0xffffu));
  const VU lane = hn::BitCast(du, hn::Iota(DI(), 0));
  return hn::RebindMask(DF(), hn::TestBit(bits, hn::Shl(hn::Set(du, 1u), lane)));
}

constexpr uint64_t kAllLive = ~uint64_t{0};

// The first n of 64 tokens.
constexpr uint64_t FirstLive(int64_t n) {
  return n >= kPageTokens ? kAllLive : n <= 0 ? 0 : (uint64_t{1} << n) - 1;
}

// The oldest raw token that a row sees through its window; below 0 if that is all of them, n_raw or more if
// none.
HWY_INLINE int64_t OldestRaw(const StreamView& kv, const QueryRows& q, int64_t row) {
  return kv.n_raw + q.behind + row / q.group - q.window;
}

// Where raw tokens, 64 at a time, begin to matter to `row` and those behind it.
HWY_INLINE int64_t FirstRawPage(const StreamView& kv, const QueryRows& q, int64_t row) {
  if (q.window == 0) return 0;
  return HWY_MAX(OldestRaw(kv, q, row), int64_t{0}) / kPageTokens * kPageTokens;
}

// One past the last token in `live`.
constexpr int64_t LiveEnd(uint64_t live) {
  return 64 - std::countl_zero(live);
}

// Calls block(integral_constant<n>, first row) for blocks of at most kMax rows, as even as possible: seven
// rows are 4 + 3.
template <int kMax, class Block>
HWY_INLINE void ForRowBlocks(int64_t rows, const Block& block) {
  int64_t blocks = (rows + kMax - 1) / kMax;
  for (int64_t r = 0; r < rows; --blocks) {
    const int64_t n = (rows - r + blocks - 1) / blocks;
    if (n == 1) block(std::integral_constant<int, 1>(), r);
    if (n == 2) block(std::integral_constant<int, 2>(), r);
    if constexpr (kMax > 2) {
      if (n == 3) block(std::integral_constant<int, 3>(), r);
    }
    if constexpr (kMax > 3) {
      if (n == 4) block(std::integral_constant<int, 4>(), r);
    }
    if constexpr (kMax > 4) {
      if (n == 5) block(std::integral_constant<int, 5>(), r);
      if (n == 6) block(std::integral_constant<int, 6>(), r);
    }
    r += n;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace moend::simd
HWY_AFTER_NAMESPACE();

#endif  // MOEND_ATTENTION_SIMD_COMMON_INL_H_
