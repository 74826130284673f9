// The two passes over a unit of 64 tokens, by one warp: scores (K times queries) and sums (V times
// probabilities). Queries and probabilities are operand B, so that a warp's rows are the 8 columns of a tile
// and sums stay in registers: o[n][v][i] is channel 2g or 2g + 1 (i >= 2) of V's tile v and row 2t + i % 2 of
// query tile n.
#pragma once

#include "moend/attention/cuda/feed.cuh"

namespace moend::cuda {

inline constexpr int kProbabilityStride = 80;  // halves a row of 64: rows 32 bytes apart in banks

// Head sizes that are known when compiled (kExact), or any up to 16 * kSteps. kTiles: query tiles a warp.
template <int kSteps_, bool kExact_, int kTiles_>
struct Shape {
  static constexpr int kSteps = kSteps_, kTiles = kTiles_;
  static constexpr bool kExact = kExact_;
  static constexpr int kMaxGroups = !kExact || kSteps % 4 == 0 ? kSteps / 4 : 1;  // groups of V's scales
  int steps;
  __device__ __forceinline__ int Steps() const { return kExact ? kSteps : steps; }
  __device__ __forceinline__ bool Has(int step) const { return kExact || step < steps; }
  __device__ __forceinline__ int Groups() const {
    if constexpr (kExact) return kMaxGroups;
    return steps % 4 == 0 ? steps / 4 : 1;
  }
};

template <class S>
using Scores = float[S::kTiles][4][4];
template <class S>
using Sums = float[S::kTiles][S::kSteps][4];

// Calls f(integral constant) for 0, 1, 2, 3: tiles are template arguments, so that masks are immediates.
template <int kIndex>
struct Constant {
  static constexpr int value = kIndex;
};
template <class F>
__device__ __forceinline__ void ForFour(const F& f) {
  f(Constant<0>{});
  f(Constant<1>{});
  f(Constant<2>{});
  f(Constant<3>{});
}

// s = K q in units of the rows' scales. q: shared, [tile][step][lane], two half floats each for channels
// (0, 2) and (1, 3) of the lane's quad: what a half float holds of the query, then the rest. scales (of
// packed pages): shared, 16 bytes a quad: minima and scales of channels (0, 2), then of (1, 3).
//
// The product of query and scale is split once more into two half floats: with one, its rounding would be the
// largest error of all.
// `slot` is the first acquired chunk; the last one is left acquired.
template <int kBits, class S>
__device__ __forceinline__ void ScorePass(const S& shape, Feed<S>& feed, const uint8_t* slot, const uint4* q,
                                          const uint8_t* scales, int lane, Scores<S>& s) {
  constexpr int kBatch = ChunkSteps(kBits, S::kSteps);
  const int g = lane / 4, t = lane % 4, steps = shape.Steps();
  const int batch = S::kExact ? kBatch : ChunkSteps(kBits, steps);
  float constant[S::kTiles][4] = {};
#pragma unroll
  for (int i = 0; i < S::kTiles * 16; ++i) s[i / 16][i / 4 % 4][i % 4] = 0.0f;
#pragma unroll 1
  for (int begin = 0;;) {
#pragma unroll 4
    for (int j = 0; j < kBatch; ++j) {
      const int step = begin + j;
      if (!(S::kExact && S::kSteps % kBatch == 0) && (j >= batch || step >= steps)) continue;
      KeyStep<kBits> k;
      k.Read(slot + j * (kBits == 3 ? 256 : kBits * 128), slot + steps * 256 + j * 128, j, g, t);
      uint4 b[S::kTiles];
#pragma unroll
      for (int n = 0; n < S::kTiles; ++n) b[n] = q[(n * steps + step) * 32 + lane];
      if constexpr (kBits != 16) {
        const uint4 scale = At<uint4>(scales + (step * 4 + t) * 16);
        const uint32_t a[4] = {scale.x, scale.y, scale.z,
                               scale.w};  // rows g: minima; rows g + 8 are not used
        const __half2 s0 = AsHalf2(scale.y), s1 = AsHalf2(scale.w);
#pragma unroll
        for (int n = 0; n < S::kTiles; ++n) {
          Mma(constant[n], a, b[n].x, b[n].y);
          Mma(constant[n], a, b[n].z, b[n].w);
          const __half2 high0 = __hmul2_rn(AsHalf2(b[n].x), s0), high1 = __hmul2_rn(AsHalf2(b[n].y), s1);
          const __half2 rest0 = __hfma2(AsHalf2(b[n].x), s0, __hneg2(high0));
          const __half2 rest1 = __hfma2(AsHalf2(b[n].y), s1, __hneg2(high1));
          b[n].z = AsWord(__hfma2(AsHalf2(b[n].z), s0, rest0));
          b[n].w = AsWord(__hfma2(AsHalf2(b[n].w), s1, rest1));
          b[n].x = AsWord(high0);
          b[n].y = AsWord(high1);
        }
      }
      // One tile after the other waits least for sums to come out.
      uint32_t a[4][4];
      ForFour([&](auto tile) { k.template Tile<decltype(tile)::value>(a[decltype(tile)::value]); });
#pragma unroll
      for (int n = 0; n < S::kTiles; ++n) {
#pragma unroll
        for (int x = 0; x < 4; ++x) Mma(s[n][x], a[x], b[n].x, b[n].y);
#pragma unroll
        for (int x = 0; x < 4; ++x) Mma(s[n][x], a[x], b[n].z, b[n].w);
      }
    }
    begin += batch;
    if (kBits < 8 || begin >= steps) break;
    feed.Release();
    slot = feed.Acquire();
  }
  if constexpr (kBits != 16) {
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
      for (int x = 0; x < 4; ++x)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          s[n][x][i] = fmaf(s[n][x][i], KeyStep<kBits>::Scale(x), constant[n][i % 2]);
  }
}

// The same over a block of 16 raw tokens: tile 0, the others see nothing. What is behind the last token is
// left for Hide().
template <class S>
__device__ __forceinline__ void RawScorePass(const S& shape, const uint8_t* slot, const uint4* q, int lane,
                                             Scores<S>& s) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < S::kTiles * 16; ++i) s[i / 16][i / 4 % 4][i % 4] = i / 4 % 4 == 0 ? 0.0f : -INFINITY;
#pragma unroll 4
  for (int step = 0; step < shape.Steps(); ++step) {
    const int channel = step * 16 + t * 4;
    uint32_t a[4];
    HalfTile(RawKeyWord(slot, 2 * g, channel), RawKeyWord(slot, 2 * g, channel + 1),
             RawKeyWord(slot, 2 * g, channel + 2), RawKeyWord(slot, 2 * g, channel + 3), a);
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n) {
      const uint4 b = q[(n * shape.Steps() + step) * 32 + lane];
      Mma(s[n][0], a, b.x, b.y);
      Mma(s[n][0], a, b.z, b.w);
    }
  }
}

// Operand B of a step from the probabilities of one group of channels: shared, [tile][8 rows][stride]. Every
// second pair of rows has its 16 bytes swapped in twos, or rows that are written at once would share banks.
__device__ __forceinline__ uint2 Probabilities(const __half* p, int tile, int step, int g, int t) {
  const uint2 w =
      *reinterpret_cast<const uint2*>(p + (tile * 8 + g) * kProbabilityStride + (step * 4 + (t ^ g & 2)) * 4);
  return {LowHalves(w.x, w.y), HighHalves(w.x, w.y)};
}

// `slot` is the first acquired chunk; the last one is left acquired.
template <int kBits, class S>
__device__ __forceinline__ void ValuePass(const S& shape, Feed<S>& feed, const uint8_t* slot, const __half* p,
                                          int lane, Sums<S>& o) {
  using Tile = ValueTile<kBits>;
  const int g = lane / 4, t = lane % 4, steps = shape.Steps(), batch = ChunkSteps(kBits, steps);
  uint2 b[S::kTiles][4];
#pragma unroll
  for (int tile = 0; tile < S::kSteps; ++tile) {
    if (!shape.Has(tile)) continue;
    if (kBits >= 8 && tile > 0 && tile % batch == 0) {
      feed.Release();
      slot = feed.Acquire();
    }
    if (tile == 0 || (tile % 4 == 0 && tile / 4 < shape.Groups())) {
#pragma unroll
      for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          b[n][step] = Probabilities(p + tile / 4 * S::kTiles * 8 * kProbabilityStride, n, step, g, t);
          if (Tile::Shift(step) != 0) {
            const __half2 unit = __float2half2_rn(1.0f / static_cast<float>(1 << Tile::Shift(step)));
            b[n][step].x = AsWord(__hmul2(AsHalf2(b[n][step].x), unit));
            b[n][step].y = AsWord(__hmul2(AsHalf2(b[n][step].y), unit));
          }
        }
    }
    Tile v;
    const int at = kBits >= 8 ? tile % batch : tile;
    v.Read(slot + at * (kBits == 3 ? 256 : kBits * 128), slot + steps * 256 + at * 128, tile, g, t);
    ForFour([&](auto index) {
      constexpr int step = decltype(index)::value;
      uint32_t a[4];
      v.template Step<step>(a);
#pragma unroll
      for (int n = 0; n < S::kTiles; ++n) Mma(o[n][tile], a, b[n][step].x, b[n][step].y);
    });
  }
}

// Tiles [first, first + kWords) of half float V from kWords neighbouring words of each of a lane's four
// tokens.
template <int kWords, class S>
__device__ __forceinline__ void HalfTiles(const uint32_t (&w)[4][kWords], int first,
                                          const uint2 (&b)[S::kTiles], Sums<S>& o) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    uint32_t a[4];
    HalfTile(w[0][i], w[1][i], w[2][i], w[3][i], a);
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n) Mma(o[n][first + i], a, b[n].x, b[n].y);
  }
}

// V of 16 bits lies token major, so that a lane can take up to 16 bytes of a token: tiles share their
// channels otherwise than those of packed V do. WideChannel() undoes it.
template <class S>
__device__ __forceinline__ int WideChannel(int tile, int g) {
  if (S::kExact && tile / 4 * 4 + 4 <= S::kSteps) return tile / 4 * 64 + 8 * g + tile % 4 * 2;
  if (S::kExact && S::kSteps % 4 == 2) return tile / 4 * 64 + 4 * g + tile % 4 * 2;
  return tile * 16 + 2 * g;
}

// Where a cell of 16 bytes of a token's V lies in a chunk of 16 tokens (MakePart()).
template <class S>
__device__ __forceinline__ const uint8_t* ValueCell(const S& shape, const uint8_t* slot, int token,
                                                    int cell) {
  const int steps = shape.Steps();
  const bool swizzled = steps == 4 || steps == 8;
  return slot + token * steps * 32 + (swizzled ? cell ^ token / 4 * 2 : cell) * 16;
}

// V of 16 bits, 16 * n_steps tokens, a chunk for each step; `slot` as above.
template <class S>
__device__ __forceinline__ void HalfValuePass(const S& shape, Feed<S>& feed, const uint8_t* slot,
                                              const __half* p, int lane, bool wide, int n_steps, Sums<S>& o) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int step = 0;;) {
    uint2 b[S::kTiles];
#pragma unroll
    for (int m = 0; m < S::kTiles; ++m) b[m] = Probabilities(p, m, step, g, t);
    if (wide) {
#pragma unroll
      for (int tile = 0; tile + 4 <= S::kSteps; tile += 4) {
        uint32_t w[4][4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint4 v = At<uint4>(ValueCell(shape, slot, t * 4 + j, tile * 2 + g));
          w[j][0] = v.x, w[j][1] = v.y, w[j][2] = v.z, w[j][3] = v.w;
        }
        HalfTiles<4, S>(w, tile, b, o);
      }
      if constexpr (S::kSteps % 4 == 2) {
        uint32_t w[4][2];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint2 v = At<uint2>(ValueCell(shape, slot, t * 4 + j, S::kSteps / 4 * 8 + g / 2) + g % 2 * 8);
          w[j][0] = v.x, w[j][1] = v.y;
        }
        HalfTiles<2, S>(w, S::kSteps / 4 * 4, b, o);
      }
    }
#pragma unroll
    for (int tile = 0; tile < S::kSteps; ++tile) {
      if (!shape.Has(tile) || (wide && (S::kSteps % 4 == 2 || tile < S::kSteps / 4 * 4))) continue;
      uint32_t w[4][1];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        w[j][0] = At<uint32_t>(ValueCell(shape, slot, t * 4 + j, tile * 2 + g / 4) + g % 4 * 4);
      HalfTiles<1, S>(w, tile, b, o);
    }
    if (++step == n_steps) break;
    feed.Release();
    slot = feed.Acquire();
  }
}

}  // namespace moend::cuda
