// Score and value passes with 8-bit integer dot products (AVX-512 VNNI). The codes are multiplied as they
// are; the other factor, a float, becomes a fixed-point number of kPlanes signed bytes, each multiplied on
// its own. Three bytes keep 23 bits below the largest factor of a page, which is what float32 keeps.
#if defined(MOEND_ATTENTION_SIMD_VNNI_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOEND_ATTENTION_SIMD_VNNI_INL_H_
#undef MOEND_ATTENTION_SIMD_VNNI_INL_H_
#else
#define MOEND_ATTENTION_SIMD_VNNI_INL_H_
#endif

#include "moend/attention/simd/softmax-inl.h"
#include "moend/attention/simd/value_pass-inl.h"

#if MOEND_HAVE_VNNI
HWY_BEFORE_NAMESPACE();
#if HWY_COMPILER_GCC_ACTUAL
#pragma GCC target("avx512vnni")
#endif
namespace moend::simd {
namespace HWY_NAMESPACE {

// Signed bytes of a fixed-point number.
constexpr int kPlanes = 3;

// Rows of one pass over the codes: rows * 4 vectors * kPlanes accumulators fit into 32 registers.
constexpr int kFixedRows = 2;

// Largest fixed-point number. Digits to the base 256 reach a little further, which is room for rounding.
constexpr float kFixedMax = 127 << (8 * (kPlanes - 1));

// 16 floats times `inverse` as fixed point: 64 bytes [plane][16], the highest plane first.
HWY_INLINE void StoreFixed(VF x, VF inverse, uint8_t* HWY_RESTRICT to) {
  // Adding 128 to every digit makes the bytes of the sum the digits plus 128, which is a flipped top bit.
  const __m512i bias = _mm512_set1_epi32(0x808080);
  const __m512i fixed = _mm512_cvtps_epi32(hn::Mul(x, inverse).raw);
  const __m512i digits = _mm512_xor_si512(_mm512_add_epi32(fixed, bias), bias);
  alignas(64) static constexpr auto kTranspose = [] {
    struct Table {
      uint8_t at[64] = {};
    } table;
    for (int plane = 0; plane < kPlanes; ++plane)
      for (int i = 0; i < 16; ++i)
        table.at[plane * 16 + i] = static_cast<uint8_t>(i * 4 + kPlanes - 1 - plane);
    return table;
  }();
  _mm512_storeu_si512(to, _mm512_permutexvar_epi8(_mm512_load_si512(kTranspose.at), digits));
}

// The four digits that belong to one 32-bit word of codes.
HWY_INLINE __m512i LoadDigits(const uint8_t* HWY_RESTRICT fixed, int64_t word, int plane) {
  int digits = 0;
  std::memcpy(&digits, fixed + word / 4 * 64 + plane * 16 + word % 4 * 4, sizeof(digits));
  return _mm512_set1_epi32(digits);
}

// Sum of the planes' sums [kPlanes][16], each to its weight.
HWY_INLINE VF Combine(const int32_t* HWY_RESTRICT sums) {
  // No overflow: |middle * 256 + low| < 128 * 257 * 255 * 256 factors < 2^31.
  const __m512i middle = _mm512_slli_epi32(_mm512_load_si512(sums + 16), 8);
  const __m512i low = _mm512_add_epi32(middle, _mm512_load_si512(sums + 32));
  const VF high{_mm512_cvtepi32_ps(_mm512_load_si512(sums))};
  return hn::MulAdd(high, hn::Set(DF(), 65536.0f), VF{_mm512_cvtepi32_ps(low)});
}

// Fixed-point numbers of four rows whose factors are at most `largest`: factor = scale * fixed, fixed =
// factor * inverse; all 0 where that is nothing or not finite.
struct Fixed {
  alignas(16) float scale[4];
  alignas(16) float inverse[4];

  explicit HWY_INLINE Fixed(__m128 largest) {
    const __mmask8 valid = _mm_cmp_ps_mask(largest, _mm_set1_ps(1e-30f), _CMP_GT_OQ) &
                           _mm_cmp_ps_mask(largest, _mm_set1_ps(kInfinity), _CMP_LT_OQ);
    _mm_store_ps(scale, _mm_maskz_mul_ps(valid, largest, _mm_set1_ps(1.0f / kFixedMax)));
    _mm_store_ps(inverse, _mm_maskz_div_ps(valid, _mm_set1_ps(kFixedMax), largest));
  }
};

// Words of K codes: vector v of a page is tokens [16 v, 16 v + 16), word w channels [4 w, 4 w + 4).
template <int kBits>
class KWords {
 public:
  KWords(const uint8_t* codes, int64_t head_size) : low_(codes), high_(codes + head_size / 4 * kPageTokens) {}

  HWY_INLINE void Seek(int64_t word) {
    at_ = low_ + word * (kBits == 3 ? 2 : kBits) * 32;
    if constexpr (kBits == 3) {
      const __m512i count = _mm512_set1_epi32(static_cast<int>(word & 1) * 4);
      bits_ = _mm512_srlv_epi32(_mm512_loadu_si512(high_ + word / 2 * kPageTokens), count);
    }
  }

  HWY_INLINE __m512i operator[](int v) const {
    if constexpr (kBits == 3) {
      const __m512i low = PlaneWords<2>(at_, v, 0).raw;
      __m512i bit = bits_;  // moved from bit v to bit 2
      if (v == 0) bit = _mm512_slli_epi32(bit, 2);
      if (v == 1) bit = _mm512_slli_epi32(bit, 1);
      if (v == 3) bit = _mm512_srli_epi32(bit, 1);
      return JoinBit(low, bit);
    } else {
      return PlaneWords<kBits>(at_, v, 0).raw;
    }
  }

  // low | (bit & 4) in every byte
  static HWY_INLINE __m512i JoinBit(__m512i low, __m512i bit) {
    return _mm512_ternarylogic_epi32(low, bit, _mm512_set1_epi32(0x04040404), 0xf8);
  }

 private:
  const uint8_t* low_;
  const uint8_t* high_;  // the bit plane of 3-bit codes
  const uint8_t* at_ = nullptr;
  __m512i bits_;
};

// Words of V codes: vector v is channels [first + 16 v, first + 16 v + 16), word w tokens [4 w, 4 w + 4). The
// field of a byte depends on w, so it is shifted by a count in a register: with the loop over w unrolled
// instead, the packed words of several w would not fit into the registers.
template <int kBits>
class VWords {
 public:
  VWords(const uint8_t* codes, int64_t head_size, int64_t first)
      : low_(codes + first * 8 * kLowBits), high_(codes + head_size * 16 + first * 8) {}

  HWY_INLINE void Seek(int64_t word) {
    constexpr int kPerByte = 8 / kLowBits;
    at_ = low_ + word / kPerByte * kPageTokens;
    count_ = _mm512_set1_epi32(static_cast<int>(word % kPerByte) * kLowBits);
    if constexpr (kBits == 3) {
      bits_at_ = high_ + word / 8 * kPageTokens;
      rotate_ = _mm512_set1_epi32(static_cast<int>(word % 8) + 30);  // from bit word % 8 to bit 2
    }
  }

  HWY_INLINE __m512i operator[](int v) const {
    const __m512i packed = _mm512_loadu_si512(at_ + v * 128 * kLowBits);
    if constexpr (kBits == 8) return packed;
    const __m512i mask = _mm512_set1_epi32(0x01010101 * ((1 << kLowBits) - 1));
    const __m512i low = _mm512_and_si512(_mm512_srlv_epi32(packed, count_), mask);
    if constexpr (kBits != 3) return low;
    const __m512i bit = _mm512_rorv_epi32(_mm512_loadu_si512(bits_at_ + v * 128), rotate_);
    return KWords<3>::JoinBit(low, bit);
  }

 private:
  static constexpr int kLowBits = kBits == 3 ? 2 : kBits;
  const uint8_t* low_;
  const uint8_t* high_;  // the bit plane of 3-bit codes
  const uint8_t* at_ = nullptr;
  const uint8_t* bits_at_ = nullptr;
  __m512i count_, rotate_;
};

// sums[kRows][kVectors][kPlanes][16] = digits . codes over n words. Row r's digits are at fixed + r * stride.
//
// Not inlined, and the sums leave through memory: in one function with the arithmetic that follows, GCC 12
// spills the accumulators in every turn of the loop.
template <int kRows, int kVectors, class Words>
HWY_NOINLINE void DotFixed(Words words, int64_t n, const uint8_t* HWY_RESTRICT fixed, int64_t stride,
                           Ahead& ahead_of_all, int32_t* HWY_RESTRICT sums) {
  Ahead ahead = ahead_of_all;
  __m512i acc[kRows][kVectors][kPlanes];
  MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
    MOEND_UNROLL for (int v = 0; v < kVectors; ++v) {
      MOEND_UNROLL for (int p = 0; p < kPlanes; ++p) {
        acc[r][v][p] = _mm512_setzero_si512();
      }
    }
  }
  for (int64_t w = 0; w < n; ++w) {
    ahead.Next();
    words.Seek(w);
    __m512i code[kVectors];
    MOEND_UNROLL for (int v = 0; v < kVectors; ++v) {
      code[v] = words[v];
    }
    MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
      MOEND_UNROLL for (int p = 0; p < kPlanes; ++p) {
        const __m512i digits = LoadDigits(fixed + r * stride, w, p);
        MOEND_UNROLL for (int v = 0; v < kVectors; ++v) {
          acc[r][v][p] = _mm512_dpbusd_epi32(acc[r][v][p], code[v], digits);
        }
      }
    }
  }
  MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
    MOEND_UNROLL for (int v = 0; v < kVectors; ++v) {
      MOEND_UNROLL for (int p = 0; p < kPlanes; ++p) {
        _mm512_store_si512(sums + ((r * kVectors + v) * kPlanes + p) * 16, acc[r][v][p]);
      }
    }
  }
  ahead_of_all = ahead;
}

// As FoldKScale for kRows rows, but writes fixed-point numbers, [kRows][head_size / 16][64] bytes, and what
// to multiply them with.
template <int kRows>
HWY_INLINE void FoldKScaleFixed(const PageLayout& layout, const uint8_t* page, const float* HWY_RESTRICT q,
                                float* HWY_RESTRICT scaled, float* HWY_RESTRICT scale,
                                float* HWY_RESTRICT constant) {
  const DF df;
  const int64_t head_size = layout.head_size;
  const uint16_t* HWY_RESTRICT k_scale = AsHalves(page + layout.k_scale);
  const uint16_t* HWY_RESTRICT k_min = AsHalves(page + layout.k_min);
  VF total[kRows], magnitude[kRows];
  MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
    total[r] = magnitude[r] = hn::Zero(df);
  }
  for (int64_t c = 0; c < head_size; c += kLanes) {
    const VF channel_scale = LoadHalf(k_scale + c), channel_min = LoadHalf(k_min + c);
    MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
      const VF x = hn::LoadU(df, q + r * head_size + c);
      total[r] = hn::MulAdd(x, channel_min, total[r]);
      const VF y = hn::Mul(x, channel_scale);
      magnitude[r] = hn::Max(hn::Abs(y), magnitude[r]);
      hn::StoreU(y, df, scaled + r * head_size + c);
    }
  }
  constexpr __mmask8 kMask = (1 << kRows) - 1;
  const __m128 largest = ReduceRows<kRows>(magnitude, MaxOp);
  const Fixed f(largest);
  // Infinities and NaN have no fixed point.
  const __mmask8 bad = _mm_cmp_ps_mask(largest, _mm_set1_ps(kInfinity), _CMP_NLT_UQ);
  const __m128 nan = _mm_set1_ps(std::numeric_limits<float>::quiet_NaN());
  _mm_mask_storeu_ps(constant, kMask, _mm_mask_mov_ps(ReduceRows<kRows>(total, AddOp), bad, nan));
  _mm_mask_storeu_ps(scale, kMask, _mm_load_ps(f.scale));
  MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
    const VF inverse = hn::Set(df, f.inverse[r]);
    for (int64_t c = r * head_size; c < (r + 1) * head_size; c += kLanes) {
      StoreFixed(hn::LoadU(df, scaled + c), inverse, reinterpret_cast<uint8_t*>(scaled + c));
    }
  }
}

// scores[rows][64] = constant[rows] + scale[rows] * sums[rows][4][kPlanes][16]
HWY_NOINLINE inline void FinishScores(const int32_t* HWY_RESTRICT sums, int rows,
                                      const float* HWY_RESTRICT scale, const float* HWY_RESTRICT constant,
                                      float* HWY_RESTRICT scores) {
  const DF df;
  for (int r = 0; r < rows; ++r) {
    MOEND_UNROLL for (int v = 0; v < 4; ++v) {
      const VF sum = Combine(sums + (r * 4 + v) * kPlanes * 16);
      const VF score = hn::MulAdd(sum, hn::Set(df, scale[r]), hn::Set(df, constant[r]));
      hn::StoreU(score, df, scores + r * kPageTokens + v * kLanes);
    }
  }
}

template <int kBits>
HWY_INLINE void ScoreRowsFixed(const uint8_t* codes, int64_t head_size, const float* scaled,
                               const float* scale, const float* constant, int64_t rows, Ahead ahead,
                               float* scores) {
  ForRowBlocks<kFixedRows>(rows, [&](auto n, int64_t r) {
    alignas(64) int32_t sums[n() * 4 * kPlanes * 16];
    const auto* fixed = reinterpret_cast<const uint8_t*>(scaled + r * head_size);
    DotFixed<n(), 4>(KWords<kBits>(codes, head_size), head_size / 4, fixed, head_size * 4, ahead, sums);
    FinishScores(sums, n(), scale + r, constant + r, scores + r * kPageTokens);
  });
}

// As ScorePageCodes; `scale` is scratch of a float a row. Not inlined: its caller is compiled without VNNI.
HWY_NOINLINE inline void ScorePageFixed(const PageLayout& layout, const uint8_t* page, const float* q,
                                        int64_t rows, float* scaled, float* scale, float* constant,
                                        Ahead ahead, float* scores) {
  const uint8_t* codes = page + layout.k_codes;
  const int64_t head = layout.head_size;
  ForRowBlocks<4>(rows, [&](auto n, int64_t r) {
    FoldKScaleFixed<n()>(layout, page, q + r * head, scaled + r * head, scale + r, constant + r);
  });
  if (layout.k_bits == 8) ScoreRowsFixed<8>(codes, head, scaled, scale, constant, rows, ahead, scores);
  if (layout.k_bits == 4) ScoreRowsFixed<4>(codes, head, scaled, scale, constant, rows, ahead, scores);
  if (layout.k_bits == 3) ScoreRowsFixed<3>(codes, head, scaled, scale, constant, rows, ahead, scores);
  if (layout.k_bits == 2) ScoreRowsFixed<2>(codes, head, scaled, scale, constant, rows, ahead, scores);
}

// As FoldVScale, but writes fixed-point numbers, [kRows][4][64] bytes, and what to multiply them with. No
// probability of a row is greater than its peak.
template <int kRows>
HWY_INLINE void FoldVScaleFixed(const VF (&scales)[4], const VF (&mins)[4], float largest_scale,
                                const float* HWY_RESTRICT p, const float* HWY_RESTRICT peak,
                                float* HWY_RESTRICT scaled, float* HWY_RESTRICT scale,
                                float* HWY_RESTRICT constant) {
  const DF df;
  constexpr __mmask8 kMask = (1 << kRows) - 1;
  const Fixed f(_mm_mul_ps(_mm_maskz_loadu_ps(kMask, peak), _mm_set1_ps(largest_scale)));
  _mm_mask_storeu_ps(scale, kMask, _mm_load_ps(f.scale));
  VF total[kRows];
  MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
    const VF inverse = hn::Set(df, f.inverse[r]);
    total[r] = hn::Zero(df);
    MOEND_UNROLL for (int v = 0; v < 4; ++v) {
      const VF x = hn::LoadU(df, p + r * kPageTokens + v * kLanes);
      total[r] = hn::MulAdd(x, mins[v], total[r]);
      StoreFixed(hn::Mul(x, scales[v]), inverse,
                 reinterpret_cast<uint8_t*>(scaled + r * kPageTokens + v * kLanes));
    }
  }
  _mm_mask_storeu_ps(constant, kMask, ReduceRows<kRows>(total, AddOp));
}

// out[r] = out[r] * factor[r] + constant[r] + scale[r] * sums[r] for kVectors vectors of channels.
template <int kVectors>
HWY_NOINLINE void FinishValues(const int32_t* HWY_RESTRICT sums, int n_rows, int64_t channel,
                               const float* HWY_RESTRICT scale, const ValueRows& rows) {
  const DF df;
  for (int r = 0; r < n_rows; ++r) {
    const VF factor = hn::Set(df, rows.factor[r]), constant = hn::Set(df, rows.constant[r]);
    const VF row_scale = hn::Set(df, scale[r]);
    float* HWY_RESTRICT out = rows.out + r * rows.head_size + channel;
    MOEND_UNROLL for (int v = 0; v < kVectors; ++v) {
      const VF sum = Combine(sums + (r * kVectors + v) * kPlanes * 16);
      const VF old = hn::MulAdd(hn::LoadU(df, out + v * kLanes), factor, constant);
      hn::StoreU(hn::MulAdd(sum, row_scale, old), df, out + v * kLanes);
    }
  }
}

template <int kBits>
HWY_INLINE void ValueRowsFixed(const uint8_t* codes, int64_t begin, int64_t end, const float* scaled,
                               const float* scale, const ValueRows& rows, int64_t n_rows, Ahead& ahead) {
  ForRowBlocks<kFixedRows>(n_rows, [&](auto n, int64_t r) {
    const auto* fixed = reinterpret_cast<const uint8_t*>(scaled + r * kPageTokens);
    ForChannelBlocks(begin, end, [&](auto vectors, int64_t c) {
      alignas(64) int32_t sums[n() * vectors() * kPlanes * 16];
      const VWords<kBits> words(codes, rows.head_size, c);
      DotFixed<n(), vectors()>(words, kPageTokens / 4, fixed, kPageTokens * 4, ahead, sums);
      FinishValues<vectors()>(sums, n(), c, scale + r, From(rows, r));
    });
  });
}

// As ValuePageCodes, in the manner of ScorePageFixed. weights: of the rows, from the softmax of this page.
HWY_NOINLINE inline void ValuePageFixed(const PageLayout& layout, const uint8_t* page, const float* p,
                                        const PageWeights& weights, int64_t rows, float* scaled, float* scale,
                                        float* constant, Ahead ahead, float* out) {
  const uint8_t* codes = page + layout.v_codes;
  const ValueRows block{p, weights.factor, constant, out, layout.head_size};
  const int64_t width = layout.head_size / layout.v_groups;
  for (int64_t g = 0; g < layout.v_groups; ++g) {
    VF scales[4], mins[4];
    MOEND_UNROLL for (int v = 0; v < 4; ++v) {
      const int64_t at = g * kPageTokens + v * kLanes;
      scales[v] = LoadHalf(AsHalves(page + layout.v_scale) + at);
      mins[v] = LoadHalf(AsHalves(page + layout.v_min) + at);
    }
    const float largest = Max(hn::Max(hn::Max(scales[0], scales[1]), hn::Max(scales[2], scales[3])));
    ForRowBlocks<4>(rows, [&](auto n, int64_t r) {
      FoldVScaleFixed<n()>(scales, mins, largest, p + r * kPageTokens, weights.peak + r,
                           scaled + r * kPageTokens, scale + r, constant + r);
    });
    const int64_t begin = g * width;
    const int64_t end = begin + width;
    if (layout.v_bits == 8) ValueRowsFixed<8>(codes, begin, end, scaled, scale, block, rows, ahead);
    if (layout.v_bits == 4) ValueRowsFixed<4>(codes, begin, end, scaled, scale, block, rows, ahead);
    if (layout.v_bits == 3) ValueRowsFixed<3>(codes, begin, end, scaled, scale, block, rows, ahead);
    if (layout.v_bits == 2) ValueRowsFixed<2>(codes, begin, end, scaled, scale, block, rows, ahead);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace moend::simd
HWY_AFTER_NAMESPACE();
#endif  // MOEND_HAVE_VNNI

#endif  // MOEND_ATTENTION_SIMD_VNNI_INL_H_
