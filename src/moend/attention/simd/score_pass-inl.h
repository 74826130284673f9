// Scores of a few rows against the K side of one page, read from its packed form: a lane is a token. The K
// scale of a channel is folded into the query and the K minimum into one constant a row, so that codes are
// multiplied as they are.
#if defined(MOEND_ATTENTION_SIMD_SCORE_PASS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOEND_ATTENTION_SIMD_SCORE_PASS_INL_H_
#undef MOEND_ATTENTION_SIMD_SCORE_PASS_INL_H_
#else
#define MOEND_ATTENTION_SIMD_SCORE_PASS_INL_H_
#endif

#include "moend/attention/simd/codes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moend::simd {
namespace HWY_NAMESPACE {

// Half-float K of up to 64 tokens: channel c of token 16 * i + t is at tokens16[i][c * channel_stride + t].
struct HalfK {
  const uint16_t* tokens16[4];
  int64_t channel_stride;
};

// Vectors of tokens that one pass over the channels accumulates: the whole page where a vector has 16 lanes,
// else what the registers hold next to kScoreRows times as many accumulators.
constexpr int kPassVectors = kManyRegisters ? 4 : kLanes == 1 ? 16 : 2;
constexpr int kScoreRows = 4;

template <int kRows, int kVectors>
HWY_INLINE void StoreScores(const VF (&acc)[kRows][kVectors], int token, float* HWY_RESTRICT scores) {
  MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
    MOEND_UNROLL for (int v = 0; v < kVectors; ++v) {
      hn::StoreU(acc[r][v], DF(), scores + r * kPageTokens + token + v * kLanes);
    }
  }
}

// Vectors of a pass over half floats. With 8 lanes, eight sums would just do for two multiply-adds a cycle
// that take four cycles each, if nothing ever came late; codes, which need registers to be unpacked in, must
// be content with that.
constexpr int kHalfVectors = kLanes == 8 ? 3 : kPassVectors;

// scores[r][64] = q[r] . k for kVectors vectors of tokens.
template <int kRows, int kVectors>
HWY_NOINLINE void ScoreHalf(const HalfK& k, int64_t head_size, int token, const float* HWY_RESTRICT q,
                            Ahead& ahead_of_all, float* HWY_RESTRICT scores) {
  const DF df;
  Ahead ahead = ahead_of_all;
  const uint16_t* HWY_RESTRICT from[kVectors];
  VF acc[kRows][kVectors];
  MOEND_UNROLL for (int v = 0; v < kVectors; ++v) {
    const int t = token + v * kLanes;
    from[v] = k.tokens16[t / 16] + t % 16;
    MOEND_UNROLL for (int r = 0; r < kRows; ++r) acc[r][v] = hn::Zero(df);
  }
  for (int64_t c = 0; c < head_size; ++c) {
    ahead.Next();
    VF kv[kVectors];
    MOEND_UNROLL for (int v = 0; v < kVectors; ++v) kv[v] = LoadHalf(from[v] + c * k.channel_stride);
    MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
      const VF qc = hn::Set(df, q[r * head_size + c]);
      MOEND_UNROLL for (int v = 0; v < kVectors; ++v) acc[r][v] = hn::MulAdd(kv[v], qc, acc[r][v]);
    }
  }
  StoreScores(acc, token, scores);
  ahead_of_all = ahead;
}

// scores[r][64] = constant[r] + q[r] . codes, q already times the K scale.
template <int kBits, int kRows>
void ScoreCodes(const uint8_t* HWY_RESTRICT codes, int64_t head_size, const float* HWY_RESTRICT q,
                const float* HWY_RESTRICT constant, Ahead& ahead, float* HWY_RESTRICT scores) {
  const DF df;
  for (int token = 0; token < kPageTokens; token += kPassVectors * kLanes) {
    VF acc[kRows][kPassVectors];
    MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
      MOEND_UNROLL for (int v = 0; v < kPassVectors; ++v) acc[r][v] = hn::Set(df, constant[r]);
    }
    for (int64_t c = 0; c < head_size; c += 4) {
      ahead.Next();
      VU words[kPassVectors];
      MOEND_UNROLL for (int v = 0; v < kPassVectors; ++v) {
        const int t = kLanes == 16 ? v * kLanes : token + v * kLanes;
        words[v] = CodeWords<kBits>(codes, head_size, c + t / 16, t % 16);
      }
      MOEND_UNROLL for (int j = 0; j < 4; ++j) {
        VF code[kPassVectors];
        MOEND_UNROLL for (int v = 0; v < kPassVectors; ++v) {
          code[v] = ByteToFloat(words[v], j);
        }
        MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
          const VF qc = hn::Set(df, q[r * head_size + c + j]);
          MOEND_UNROLL for (int v = 0; v < kPassVectors; ++v) {
            acc[r][v] = hn::MulAdd(code[v], qc, acc[r][v]);
          }
        }
      }
    }
    StoreScores(acc, token, scores);
  }
}

// scaled[rows][head_size] = q * k_scale; constant[rows] = q . k_min. `scales` holds 2 * head_size floats.
HWY_INLINE void FoldKScale(const PageLayout& layout, const uint8_t* page, const float* HWY_RESTRICT q,
                           int64_t rows, float* HWY_RESTRICT scaled, float* HWY_RESTRICT constant) {
  const DF df;
  const uint16_t* scale = AsHalves(page + layout.k_scale);
  const uint16_t* min = AsHalves(page + layout.k_min);
  for (int64_t r = 0; r < rows; ++r) {
    VF total = hn::Zero(df);
    const float* HWY_RESTRICT from = q + r * layout.head_size;
    float* HWY_RESTRICT to = scaled + r * layout.head_size;
    for (int64_t c = 0; c < layout.head_size; c += kLanes) {
      const VF x = hn::LoadU(df, from + c);
      total = hn::MulAdd(x, LoadHalf(min + c), total);
      hn::StoreU(hn::Mul(x, LoadHalf(scale + c)), df, to + c);
    }
    constant[r] = Sum(total);
  }
}

HWY_INLINE void ScoreHalfRows(const HalfK& k, int64_t head_size, const float* q, int64_t rows, Ahead ahead,
                              float* scores) {
  ForRowBlocks<kScoreRows>(rows, [&](auto n, int64_t r) {
    const auto pass = [&](auto vectors, int token) {
      ScoreHalf<n(), vectors()>(k, head_size, token, q + r * head_size, ahead, scores + r * kPageTokens);
    };
    if constexpr (kLanes == 8) {
      ForRowBlocks<kHalfVectors>(
          kPageVectors, [&](auto vectors, int64_t v) { pass(vectors, static_cast<int>(v) * kLanes); });
    } else {
      for (int token = 0; token < kPageTokens; token += kHalfVectors * kLanes)
        pass(std::integral_constant<int, kHalfVectors>(), token);
    }
  });
}

// Of the 16 tokens of block `block` of the 64 only.
HWY_INLINE void ScoreHalfBlock(const HalfK& k, int64_t block, int64_t head_size, const float* q, int64_t rows,
                               float* scores) {
  Ahead none;
  ForRowBlocks<kScoreRows>(rows, [&](auto n, int64_t r) {
    ScoreHalf<n(), 16 / kLanes>(k, head_size, static_cast<int>(block) * 16, q + r * head_size, none,
                                scores + r * kPageTokens);
  });
}

template <int kBits>
HWY_INLINE void ScoreCodeRows(const uint8_t* codes, int64_t head_size, const float* scaled,
                              const float* constant, int64_t rows, Ahead ahead, float* scores) {
  ForRowBlocks<kScoreRows>(rows, [&](auto n, int64_t r) {
    ScoreCodes<kBits, n()>(codes, head_size, scaled + r * head_size, constant + r, ahead,
                           scores + r * kPageTokens);
  });
}

HWY_INLINE HalfK PageHalfK(const uint16_t* k) {
  return HalfK{{k, k + 16, k + 32, k + 48}, kPageTokens};
}

// scores[rows][64] of one page with codes of at most 8 bits. scaled: rows * head_size floats of scratch,
// constant: rows.
HWY_INLINE void ScorePageCodes(const PageLayout& layout, const uint8_t* page, const float* q, int64_t rows,
                               float* scaled, float* constant, Ahead ahead, float* scores) {
  const int64_t head_size = layout.head_size;
  const uint8_t* codes = page + layout.k_codes;
  FoldKScale(layout, page, q, rows, scaled, constant);
  if (layout.k_bits == 8) ScoreCodeRows<8>(codes, head_size, scaled, constant, rows, ahead, scores);
  if (layout.k_bits == 4) ScoreCodeRows<4>(codes, head_size, scaled, constant, rows, ahead, scores);
  if (layout.k_bits == 3) ScoreCodeRows<3>(codes, head_size, scaled, constant, rows, ahead, scores);
  if (layout.k_bits == 2) ScoreCodeRows<2>(codes, head_size, scaled, constant, rows, ahead, scores);
}

}  // namespace HWY_NAMESPACE
}  // namespace moend::simd
HWY_AFTER_NAMESPACE();

#endif  // MOEND_ATTENTION_SIMD_SCORE_PASS_INL_H_
