// Adds the V side of one page, read from its packed form, to the outputs of a few rows: a lane is a channel.
// The V scale of a token is folded into its probability and the V minimum into one constant a row.
#if defined(MOEND_ATTENTION_SIMD_VALUE_PASS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOEND_ATTENTION_SIMD_VALUE_PASS_INL_H_
#undef MOEND_ATTENTION_SIMD_VALUE_PASS_INL_H_
#else
#define MOEND_ATTENTION_SIMD_VALUE_PASS_INL_H_
#endif

#include "moend/attention/simd/score_pass-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moend::simd {
namespace HWY_NAMESPACE {

// Rows of one call: out[r] = out[r] * factor[r] + constant[r] + p[r] . V over a range of channels.
// p: [rows][64]; out: [rows][head_size].
struct ValueRows {
  const float* p;
  const float* factor;
  const float* constant;
  float* out;
  int64_t head_size;
};

template <int kRows, int kVectors>
HWY_INLINE void LoadOut(const ValueRows& rows, int64_t channel, VF (&acc)[kRows][kVectors]) {
  const DF df;
  MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
    const VF factor = hn::Set(df, rows.factor[r]);
    const VF constant = hn::Set(df, rows.constant[r]);
    MOEND_UNROLL for (int v = 0; v < kVectors; ++v) {
      const VF out = hn::LoadU(df, rows.out + r * rows.head_size + channel + v * kLanes);
      acc[r][v] = hn::MulAdd(out, factor, constant);
    }
  }
}

template <int kRows, int kVectors>
HWY_INLINE void StoreOut(const VF (&acc)[kRows][kVectors], int64_t channel, const ValueRows& rows) {
  MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
    MOEND_UNROLL for (int v = 0; v < kVectors; ++v) {
      hn::StoreU(acc[r][v], DF(), rows.out + r * rows.head_size + channel + v * kLanes);
    }
  }
}

// v: f16 [tokens][head_size]
template <int kRows, int kVectors>
HWY_INLINE void ValueHalf(const uint16_t* HWY_RESTRICT v16, int64_t tokens, int64_t channel,
                          const ValueRows& rows, Ahead& ahead_of_all) {
  const DF df;
  Ahead ahead = ahead_of_all;
  VF acc[kRows][kVectors];
  LoadOut<kRows, kVectors>(rows, channel, acc);
  for (int64_t t = 0; t < tokens; ++t) {
    ahead.Next();
    const uint16_t* HWY_RESTRICT from = v16 + t * rows.head_size + channel;
    VF value[kVectors];
    MOEND_UNROLL for (int v = 0; v < kVectors; ++v) value[v] = LoadHalf(from + v * kLanes);
    MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
      const VF p = hn::Set(df, rows.p[r * kPageTokens + t]);
      MOEND_UNROLL for (int v = 0; v < kVectors; ++v) acc[r][v] = hn::MulAdd(value[v], p, acc[r][v]);
    }
  }
  StoreOut<kRows, kVectors>(acc, channel, rows);
  ahead_of_all = ahead;
}

// rows.p already times the V scale of the channel's group.
template <int kBits, int kRows, int kVectors>
HWY_INLINE void ValueCodes(const uint8_t* HWY_RESTRICT codes, int64_t channel, const ValueRows& rows,
                           Ahead& ahead) {
  const DF df;
  VF acc[kRows][kVectors];
  LoadOut<kRows, kVectors>(rows, channel, acc);
  for (int64_t quads = 0; quads < 16; quads += 4) {
    MOEND_UNROLL for (int i = 0; i < 4; ++i) {
      const int64_t quad = quads + i;
      ahead.Next();
      VU words[kVectors];
      MOEND_UNROLL for (int v = 0; v < kVectors; ++v) {
        const int64_t c = channel + v * kLanes;
        words[v] =
            CodeWords<kBits>(codes, rows.head_size, (c & ~int64_t{15}) + quad, static_cast<int>(c & 15));
      }
      MOEND_UNROLL for (int j = 0; j < 4; ++j) {
        VF code[kVectors];
        MOEND_UNROLL for (int v = 0; v < kVectors; ++v) {
          code[v] = ByteToFloat(words[v], j);
        }
        MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
          const VF p = hn::Set(df, rows.p[r * kPageTokens + quad * 4 + j]);
          MOEND_UNROLL for (int v = 0; v < kVectors; ++v) {
            acc[r][v] = hn::MulAdd(code[v], p, acc[r][v]);
          }
        }
      }
    }
  }
  StoreOut<kRows, kVectors>(acc, channel, rows);
}

constexpr int kValueVectors = kManyRegisters ? 4 : 2;

// Channels [begin, end) in blocks of kValueVectors vectors, then single ones. block(vectors, channel).
template <class Block>
HWY_INLINE void ForChannelBlocks(int64_t begin, int64_t end, const Block& block) {
  int64_t c = begin;
  for (; c + kValueVectors * kLanes <= end; c += kValueVectors * kLanes)
    block(std::integral_constant<int, kValueVectors>(), c);
  for (; c < end; c += kLanes) block(std::integral_constant<int, 1>(), c);
}

HWY_INLINE ValueRows From(const ValueRows& rows, int64_t r) {
  return ValueRows{rows.p + r * kPageTokens, rows.factor + r, rows.constant + r,
                   rows.out + r * rows.head_size, rows.head_size};
}

template <int kRows>
HWY_NOINLINE void ValueHalfBlock(const uint16_t* v16, int64_t tokens, const ValueRows& rows, Ahead& ahead) {
  const auto block = [&](auto n, int64_t c) { ValueHalf<kRows, n()>(v16, tokens, c, rows, ahead); };
  if constexpr (kLanes == 8) {
    ForRowBlocks<kHalfVectors>(rows.head_size / kLanes, [&](auto n, int64_t v) { block(n, v * kLanes); });
  } else {
    ForChannelBlocks(0, rows.head_size, block);
  }
}

template <int kBits, int kRows>
HWY_NOINLINE void ValueCodeBlock(const uint8_t* codes, int64_t begin, int64_t end, const ValueRows& rows,
                                 Ahead& ahead) {
  ForChannelBlocks(begin, end,
                   [&](auto n, int64_t c) { ValueCodes<kBits, kRows, n()>(codes, c, rows, ahead); });
}

HWY_INLINE void ValueHalfRows(const uint16_t* v16, int64_t tokens, const ValueRows& rows, int64_t n_rows,
                              Ahead ahead) {
  ForRowBlocks<4>(n_rows, [&](auto n, int64_t r) { ValueHalfBlock<n()>(v16, tokens, From(rows, r), ahead); });
}

template <int kBits>
HWY_INLINE void ValueCodeRows(const uint8_t* codes, int64_t begin, int64_t end, const ValueRows& rows,
                              int64_t n_rows, Ahead& ahead) {
  ForRowBlocks<4>(n_rows, [&](auto n, int64_t r) {
    ValueCodeBlock<kBits, n()>(codes, begin, end, From(rows, r), ahead);
  });
}

// scaled[rows][64] = p * v_scale; constant[rows] = p . v_min, for one group of channels.
HWY_INLINE void FoldVScale(const PageLayout& layout, const uint8_t* page, int64_t group,
                           const float* HWY_RESTRICT p, int64_t rows, float* HWY_RESTRICT scaled,
                           float* HWY_RESTRICT constant) {
  const DF df;
  const uint16_t* scale = AsHalves(page + layout.v_scale) + group * kPageTokens;
  const uint16_t* min = AsHalves(page + layout.v_min) + group * kPageTokens;
  for (int64_t r = 0; r < rows; ++r) {
    VF total = hn::Zero(df);
    MOEND_UNROLL for (int v = 0; v < kPageVectors; ++v) {
      const VF x = hn::LoadU(df, p + r * kPageTokens + v * kLanes);
      total = hn::MulAdd(x, LoadHalf(min + v * kLanes), total);
      hn::StoreU(hn::Mul(x, LoadHalf(scale + v * kLanes)), df, scaled + r * kPageTokens + v * kLanes);
    }
    constant[r] = Sum(total);
  }
}

// out[rows][head_size] = out * factor[rows] + p[rows][64] . V for codes of at most 8 bits. scaled: rows * 64
// floats of scratch, constant: rows.
HWY_INLINE void ValuePageCodes(const PageLayout& layout, const uint8_t* page, const float* p,
                               const float* factor, int64_t rows, float* scaled, float* constant, Ahead ahead,
                               float* out) {
  const uint8_t* codes = page + layout.v_codes;
  const ValueRows block{scaled, factor, constant, out, layout.head_size};
  const int64_t width = layout.head_size / layout.v_groups;
  for (int64_t g = 0; g < layout.v_groups; ++g) {
    FoldVScale(layout, page, g, p, rows, scaled, constant);
    const int64_t begin = g * width;
    const int64_t end = begin + width;
    if (layout.v_bits == 8) ValueCodeRows<8>(codes, begin, end, block, rows, ahead);
    if (layout.v_bits == 4) ValueCodeRows<4>(codes, begin, end, block, rows, ahead);
    if (layout.v_bits == 3) ValueCodeRows<3>(codes, begin, end, block, rows, ahead);
    if (layout.v_bits == 2) ValueCodeRows<2>(codes, begin, end, block, rows, ahead);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace moend::simd
HWY_AFTER_NAMESPACE();

#endif  // MOEND_ATTENTION_SIMD_VALUE_PASS_INL_H_
