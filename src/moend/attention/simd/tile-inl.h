// One page of K and V as float32, and its products with many rows: the matrix kernels of prefill.
#if defined(MOEND_ATTENTION_SIMD_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOEND_ATTENTION_SIMD_TILE_INL_H_
#undef MOEND_ATTENTION_SIMD_TILE_INL_H_
#else
#define MOEND_ATTENTION_SIMD_TILE_INL_H_
#endif

#include "moend/attention/simd/codes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moend::simd {
namespace HWY_NAMESPACE {

// Register tile: kTileRows x kTileVectors accumulators, a row of vectors and a broadcast.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kManyRegisters ? 4 : 2;

// With 8 lanes a tile is cut into slabs of 16 tokens (K) or channels (V), the width of a register tile: 4 or
// 8 KiB that all rows of a block meet before the next slab. As one matrix it would fill the first-level cache
// alone, and columns of it would fall into few of its sets.
constexpr int64_t kSlab = kLanes == 8 ? kTileVectors * kLanes : 0;
constexpr int64_t kKStride = kSlab ? kSlab : kPageTokens;  // floats from a channel to the next
constexpr int64_t VStride(int64_t head_size) {             // floats from a token to the next
  return kSlab ? kSlab : head_size;
}

// Where a tile has K of channel c and token t, and V of token t and channel c.
constexpr int64_t KAt(int64_t head_size, int64_t c, int64_t t) {
  return kSlab ? t / 16 * head_size * kSlab + c * kSlab + t % 16 : c * kPageTokens + t;
}
constexpr int64_t VAt(int64_t head_size, int64_t t, int64_t c) {
  return kSlab ? c / 16 * kPageTokens * kSlab + t * kSlab + c % 16 : t * head_size + c;
}

// f16 [head_size][64] to float32, in the order of KAt.
HWY_INLINE void WidenK(const uint16_t* HWY_RESTRICT from, int64_t head_size, float* HWY_RESTRICT to) {
  for (int64_t c = 0; c < head_size; ++c)
    MOEND_UNROLL for (int64_t t = 0; t < kPageTokens; t += kLanes)
        hn::StoreU(LoadHalf(from + c * kPageTokens + t), DF(), to + KAt(head_size, c, t));
}

// f16 [tokens][head_size] to float32, in the order of VAt.
HWY_INLINE void WidenV(const uint16_t* HWY_RESTRICT from, int64_t tokens, int64_t head_size,
                       float* HWY_RESTRICT to) {
  const int64_t width = kSlab ? kSlab : head_size;
  for (int64_t c = 0; c < head_size; c += width) {
    const int64_t end = HWY_MIN(c + width, head_size);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = c; i < end; i += kLanes)
        hn::StoreU(LoadHalf(from + t * head_size + i), DF(), to + VAt(head_size, t, i));
  }
}

// f32 [tokens][head_size], in the order of VAt.
HWY_INLINE void ArrangeV(const float* HWY_RESTRICT from, int64_t tokens, int64_t head_size,
                         float* HWY_RESTRICT to) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t c = 0; c < head_size; c += kLanes)
      hn::StoreU(hn::LoadU(DF(), from + t * head_size + c), DF(), to + VAt(head_size, t, c));
}

// K of a page as float32, in the order of KAt.
template <int kBits>
HWY_NOINLINE void UnpackKCodes(const PageLayout& layout, const uint8_t* HWY_RESTRICT page,
                               float* HWY_RESTRICT to) {
  const DF df;
  const uint16_t* scale = AsHalves(page + layout.k_scale);
  const uint16_t* min = AsHalves(page + layout.k_min);
  for (int64_t c = 0; c < layout.head_size; c += 4) {
    float pair[2][16];
    for (int i = 0; i < 4; i += HWY_MIN(kLanes, 4)) {
      hn::StoreU(LoadHalf(scale + c + i), df, pair[0] + i);
      hn::StoreU(LoadHalf(min + c + i), df, pair[1] + i);
    }
    MOEND_UNROLL for (int t = 0; t < kPageTokens; t += kLanes) {
      const VU words = CodeWords<kBits>(page + layout.k_codes, layout.head_size, c + t / 16, t % 16);
      MOEND_UNROLL for (int j = 0; j < 4; ++j) {
        const VF x = hn::MulAdd(ByteToFloat(words, j), hn::Set(df, pair[0][j]), hn::Set(df, pair[1][j]));
        hn::StoreU(x, df, to + KAt(layout.head_size, c + j, t));
      }
    }
  }
}

// V of a page as float32, in the order of VAt.
template <int kBits>
HWY_NOINLINE void UnpackVCodes(const PageLayout& layout, const uint8_t* HWY_RESTRICT page,
                               float* HWY_RESTRICT to) {
  const DF df;
  const int64_t width = layout.head_size / layout.v_groups;
  for (int64_t g = 0; g < layout.v_groups; ++g) {
    float scale[kPageTokens], min[kPageTokens];
    for (int v = 0; v < kPageVectors; ++v) {
      const int64_t at = g * kPageTokens + v * kLanes;
      hn::StoreU(LoadHalf(AsHalves(page + layout.v_scale) + at), df, scale + v * kLanes);
      hn::StoreU(LoadHalf(AsHalves(page + layout.v_min) + at), df, min + v * kLanes);
    }
    for (int64_t c = g * width; c < (g + 1) * width; c += kLanes) {
      for (int64_t quad = 0; quad < 16; ++quad) {
        const VU words = CodeWords<kBits>(page + layout.v_codes, layout.head_size, (c & ~int64_t{15}) + quad,
                                          static_cast<int>(c & 15));
        MOEND_UNROLL for (int j = 0; j < 4; ++j) {
          const int64_t t = quad * 4 + j;
          const VF x = hn::MulAdd(ByteToFloat(words, j), hn::Set(df, scale[t]), hn::Set(df, min[t]));
          hn::StoreU(x, df, to + VAt(layout.head_size, t, c));
        }
      }
    }
  }
}

HWY_INLINE void UnpackK(const PageLayout& layout, const uint8_t* page, float* to) {
  if (layout.k_bits == 16) WidenK(AsHalves(page + layout.k_codes), layout.head_size, to);
  if (layout.k_bits == 8) UnpackKCodes<8>(layout, page, to);
  if (layout.k_bits == 4) UnpackKCodes<4>(layout, page, to);
  if (layout.k_bits == 3) UnpackKCodes<3>(layout, page, to);
  if (layout.k_bits == 2) UnpackKCodes<2>(layout, page, to);
}

HWY_INLINE void UnpackV(const PageLayout& layout, const uint8_t* page, float* to) {
  if (layout.v_bits == 16) WidenV(AsHalves(page + layout.v_codes), kPageTokens, layout.head_size, to);
  if (layout.v_bits == 8) UnpackVCodes<8>(layout, page, to);
  if (layout.v_bits == 4) UnpackVCodes<4>(layout, page, to);
  if (layout.v_bits == 3) UnpackVCodes<3>(layout, page, to);
  if (layout.v_bits == 2) UnpackVCodes<2>(layout, page, to);
}

// scores[kRows][64] = q[kRows][head_size] . k for kTileVectors vectors of tokens; k: of the first of them.
template <int kRows>
HWY_NOINLINE void ScoreTile(const float* HWY_RESTRICT q, const float* HWY_RESTRICT k, int64_t head_size,
                            float* HWY_RESTRICT scores) {
  const DF df;
  VF acc[kRows][kTileVectors];
  MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
    MOEND_UNROLL for (int v = 0; v < kTileVectors; ++v) acc[r][v] = hn::Zero(df);
  }
  for (int64_t c = 0; c < head_size; ++c) {
    VF kv[kTileVectors];
    MOEND_UNROLL for (int v = 0; v < kTileVectors; ++v) kv[v] = hn::LoadU(df, k + c * kKStride + v * kLanes);
    MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
      const VF qc = hn::Set(df, q[r * head_size + c]);
      MOEND_UNROLL for (int v = 0; v < kTileVectors; ++v) AddProduct(kv[v], qc, acc[r][v]);
    }
  }
  MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
    MOEND_UNROLL for (int v = 0; v < kTileVectors; ++v)
        hn::StoreU(acc[r][v], df, scores + r * kPageTokens + v * kLanes);
  }
}

// out[kRows][head_size] = out * factor[kRows] + p[kRows][64] . v for kVectors vectors of channels; v: of the
// first of them.
template <int kRows, int kVectors>
HWY_NOINLINE void ValueTileChannels(const float* HWY_RESTRICT p, const float* HWY_RESTRICT v, int64_t tokens,
                                    int64_t head_size, const float* HWY_RESTRICT factor,
                                    float* HWY_RESTRICT out) {
  const DF df;
  VF acc[kRows][kVectors];
  MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
    const VF f = hn::Set(df, factor[r]);
    MOEND_UNROLL for (int i = 0; i < kVectors; ++i) acc[r][i] =
        hn::Mul(hn::LoadU(df, out + r * head_size + i * kLanes), f);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    VF value[kVectors];
    MOEND_UNROLL for (int i = 0; i < kVectors; ++i) value[i] =
        hn::LoadU(df, v + t * VStride(head_size) + i * kLanes);
    MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
      const VF weight = hn::Set(df, p[r * kPageTokens + t]);
      MOEND_UNROLL for (int i = 0; i < kVectors; ++i) AddProduct(value[i], weight, acc[r][i]);
    }
  }
  MOEND_UNROLL for (int r = 0; r < kRows; ++r) {
    MOEND_UNROLL for (int i = 0; i < kVectors; ++i)
        hn::StoreU(acc[r][i], df, out + r * head_size + i * kLanes);
  }
}

template <int kRows>
HWY_INLINE void ValueTile(const float* HWY_RESTRICT p, const float* HWY_RESTRICT v, int64_t tokens,
                          int64_t head_size, const float* HWY_RESTRICT factor, float* HWY_RESTRICT out) {
  int64_t c = 0;
  for (; c + kTileVectors * kLanes <= head_size; c += kTileVectors * kLanes)
    ValueTileChannels<kRows, kTileVectors>(p, v + c, tokens, head_size, factor, out + c);
  for (; c < head_size; c += kLanes)
    ValueTileChannels<kRows, 1>(p, v + c, tokens, head_size, factor, out + c);
}

}  // namespace HWY_NAMESPACE
}  // namespace moend::simd
HWY_AFTER_NAMESPACE();

#endif  // MOEND_ATTENTION_SIMD_TILE_INL_H_
