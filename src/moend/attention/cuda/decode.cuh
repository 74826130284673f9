// Decode attention over packed pages: one launch for all contexts, KV heads and page ranges of a layer, of
// any widths side by side. A block takes items (work.h) one after the other; its warps take units of 64
// tokens by turns, each with its own softmax state; the block merges its warps, and the last block of an
// output merges the blocks. There is no barrier between units: loads of some warps run under the arithmetic
// of others.
#pragma once

#include "moend/attention/cuda/passes.cuh"
#include "moend/attention/cuda/work.h"

namespace moend::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kNoScore = -INFINITY;
// Sums of 16-bit V are in units of 2^-14, so that probabilities fill the range of half floats.
inline constexpr float kHalfUnit = 0x1p-14f;

template <class S, int kWarps_, int kBlocks_, int kMaxRows_>
struct Config : S {
  using Shape = S;
  static constexpr int kWarps = kWarps_, kThreads = kWarps * 32;
  static constexpr int kBlocks = kBlocks_;    // on a multiprocessor
  static constexpr int kMaxRows = kMaxRows_;  // of an item
  static constexpr int kWarpRows = S::kTiles * 8;
};

__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float MaxOverTokens(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 4));
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 8));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 16));
}
__device__ __forceinline__ float SumOverTokens(float x) {
  x += __shfl_xor_sync(~0u, x, 4);
  x += __shfl_xor_sync(~0u, x, 8);
  return x + __shfl_xor_sync(~0u, x, 16);
}

// Shared memory of a block, in this order: operands of the queries for pages and for raw tokens, the stream,
// scales, maxima and sums of rows; then for every warp its slots, two headers and probabilities. `rows` are
// those of an item, in whole query tiles.
struct SharedLayout {
  int head_size, rows, warps, warp_rows, groups;
  __host__ __device__ int QueryBytes() const { return rows * head_size * 4; }
  __host__ __device__ int HeaderBytes() const { return (head_size * 2 + 63) / 64 * 128 + groups * 256; }
  __host__ __device__ int FeedBytes() const { return kSlots * SlotBytes(head_size / 16) + 2 * HeaderBytes(); }
  __host__ __device__ int WarpBytes() const {
    const int pass = FeedBytes() + groups * warp_rows * kProbabilityStride * 2;
    const int sums = warp_rows * head_size * 4;
    return (pass > sums ? pass + 127 : sums + 127) / 128 * 128;
  }
  __host__ __device__ int TaskBytes() const { return (static_cast<int>(sizeof(Task)) + 127) / 128 * 128; }
  __host__ __device__ int RowBytes() const {
    return (rows * 8 + warps * warp_rows * 8 + 16 + 127) / 128 * 128;
  }
  __host__ __device__ int Bytes() const {
    return 2 * QueryBytes() + TaskBytes() + RowBytes() + warps * WarpBytes();
  }
};

// The softmax state of a warp's rows. A lane has rows 2t and 2t + 1 of each query tile, and its own part of
// the sums over tokens (sum, low).
template <class S>
struct State {
  Sums<S> o;
  float max[S::kTiles][2];
  float sum[S::kTiles][2];
  float low[S::kTiles][S::kMaxGroups][2];  // V's minima, weighted
  float unit;                              // of o

  __device__ __forceinline__ void Reset() {
    unit = kHalfUnit;
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        max[n][i] = kNoScore, sum[n][i] = 0.0f;
#pragma unroll
        for (int group = 0; group < S::kMaxGroups; ++group) low[n][group][i] = 0.0f;
      }
#pragma unroll
      for (int v = 0; v < S::kSteps; ++v)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[n][v][i] = 0.0f;
    }
  }
  __device__ __forceinline__ void ChangeUnit(float to) {
    const float factor = unit / to;
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
      for (int v = 0; v < S::kSteps; ++v)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[n][v][i] *= factor;
    unit = to;
  }
  // Scores of 64 tokens become weights; scale: of the rows' scores, in powers of two.
  __device__ __forceinline__ void Softmax(Scores<S>& s, const float (&scale)[S::kTiles][2]) {
    float next[S::kTiles][2];
    bool moved = false;
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float m = fmaxf(s[n][0][i], s[n][0][i + 2]);
#pragma unroll
        for (int x = 1; x < 4; ++x) m = fmaxf(m, fmaxf(s[n][x][i], s[n][x][i + 2]));
        next[n][i] = fmaxf(max[n][i], MaxOverTokens(m) * scale[n][i]);
        moved |= next[n][i] > max[n][i];
      }
    if (__any_sync(~0u, moved)) {
#pragma unroll
      for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float factor = next[n][i] == max[n][i] ? 1.0f : Exp2(max[n][i] - next[n][i]);
          max[n][i] = next[n][i];
          sum[n][i] *= factor;
#pragma unroll
          for (int group = 0; group < S::kMaxGroups; ++group) low[n][group][i] *= factor;
#pragma unroll
          for (int v = 0; v < S::kSteps; ++v) {
            o[n][v][i] *= factor;
            o[n][v][i + 2] *= factor;
          }
        }
    }
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float base = max[n][i] == kNoScore ? 0.0f : max[n][i];
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          s[n][x][i] = Exp2(fmaf(s[n][x][i], scale[n][i], -base));
          s[n][x][i + 2] = Exp2(fmaf(s[n][x][i + 2], scale[n][i], -base));
          sum[n][i] += s[n][x][i] + s[n][x][i + 2];
        }
      }
  }
};

// Where the probabilities of a lane's tokens go: offsets in a row of half floats, a byte for each tile, with
// the swizzle that Probabilities() undoes.
__device__ __forceinline__ uint32_t ProbabilityOffsets(const TokenMap& map, int v_bits, int lane) {
  uint32_t packed = 0;
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    const int token = map.token(x);
    packed |= static_cast<uint32_t>((SlotOfQuad(v_bits, token / 4) * 4 + token % 4) ^ lane % 2 * 8) << 8 * x;
  }
  return packed;
}

// Weights go to shared memory as half floats, [tile][8 rows][stride], for V of 16 bits.
template <class S>
__device__ __forceinline__ void StoreWeights(const Scores<S>& s, uint32_t offsets, int lane,
                                             const State<S>& state, __half* p) {
  const float unit = 1.0f / state.unit;
  p += 2 * (lane % 4) * kProbabilityStride;
#pragma unroll
  for (int x = 0; x < 4; ++x)
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        *reinterpret_cast<__half2*>(p + (n * 8 + i) * kProbabilityStride + (offsets >> 8 * x & 255)) =
            __floats2half2_rn(s[n][x][i] * unit, s[n][x][i + 2] * unit);
}

// The same times the scales of packed V, [group][tile][8 rows][stride]. scales: shared, scales [groups][64],
// then minima.
template <class S>
__device__ __forceinline__ void StoreScaledWeights(const S& shape, const Scores<S>& s, const TokenMap& map,
                                                   uint32_t offsets, const __half* v_scale,
                                                   const __half* v_min, int lane, State<S>& state,
                                                   __half* p) {
  const __half2 unit = __float2half2_rn(0x1p24f / state.unit);
  p += 2 * (lane % 4) * kProbabilityStride;
#pragma unroll
  for (int group = 0; group < S::kMaxGroups; ++group) {
    if (!S::kExact && group >= shape.Groups()) break;
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const int at = group * 64 + map.token(x);
      // Exact: a power of two, and the product is at most 2^14.
      const float2 scale = __half22float2(__hmul2(*reinterpret_cast<const __half2*>(v_scale + at), unit));
      const float2 min = __half22float2(*reinterpret_cast<const __half2*>(v_min + at));
#pragma unroll
      for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float w0 = s[n][x][i], w1 = s[n][x][i + 2];
          __half* row = p + ((group * S::kTiles + n) * 8 + i) * kProbabilityStride;
          *reinterpret_cast<__half2*>(row + (offsets >> 8 * x & 255)) =
              __floats2half2_rn(w0 * scale.x, w1 * scale.y);
          state.low[n][group][i] = fmaf(w0, min.x, fmaf(w1, min.y, state.low[n][group][i]));
        }
    }
  }
}

// Scores that a lane's rows must not see become -inf. visible(n, i, token): row 2t + i of tile n.
template <class S, class Visible>
__device__ __forceinline__ void Hide(Scores<S>& s, const TokenMap& map, const Visible& visible) {
#pragma unroll
  for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
    for (int x = 0; x < 4; ++x)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (!visible(n, i % 2, map.token(x) + i / 2)) s[n][x][i] = kNoScore;
}

// Operands of a block's queries for pages or for raw tokens, and the scales of the rows' scores; shared.
struct Operands {
  const uint4* q;
  const float* unit;
};

template <class S>
struct WarpWork {
  const Batch& batch;
  const Task& task;
  S shape;
  int first_row;  // of this warp, within the item
  int lane;
  __half* p;  // probabilities, shared, of this warp

  __device__ __forceinline__ int Token(int n, int i) const {
    return (task.item.row_begin + first_row + n * 8 + lane % 4 * 2 + i) / task.stream.group;
  }

  // Interleaves K's scales and minima as ScorePass() wants them and returns the largest scale of V.
  __device__ __forceinline__ float PrepareHeader(uint8_t* header) const {
    const Stream& s = task.stream;
    if (s.k_bits != 16) {
      constexpr int kMost = (S::kSteps * 2 + 31) / 32;
      uint4 scale[kMost], min[kMost];
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        const int cell = i * 32 + lane;
        if (cell >= shape.Steps() * 2) continue;
        scale[i] = At<uint4>(header + cell * 16);
        min[i] = At<uint4>(header + s.k_min + cell * 16);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        const int cell = i * 32 + lane;
        if (cell >= shape.Steps() * 2) continue;
        uint4* to = reinterpret_cast<uint4*>(header + cell * 32);
        to[0] = {LowHalves(min[i].x, min[i].y), LowHalves(scale[i].x, scale[i].y),
                 HighHalves(min[i].x, min[i].y), HighHalves(scale[i].x, scale[i].y)};
        to[1] = {LowHalves(min[i].z, min[i].w), LowHalves(scale[i].z, scale[i].w),
                 HighHalves(min[i].z, min[i].w), HighHalves(scale[i].z, scale[i].w)};
      }
    }
    uint32_t largest = 0;
    if (s.v_bits != 16)
      for (int group = 0; group < shape.Groups(); ++group)
        largest = __vmaxu2(largest, At<uint32_t>(header + s.v_scale + group * 128 + lane * 4));
    __syncwarp();
    largest = __reduce_max_sync(~0u, max(largest >> 16, largest & 0xFFFFu));
    return __half2float(__ushort_as_half(static_cast<unsigned short>(largest & 0x7FFFu)));
  }

  __device__ __forceinline__ void CapScores(Scores<S>& s, float (&scale)[S::kTiles][2]) const {
    if (batch.soft_cap <= 0.0f) return;
    const float cap = batch.soft_cap * kLog2E;
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n) {
#pragma unroll
      for (int x = 0; x < 4; ++x)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][x][i] = cap * tanhf(s[n][x][i] * scale[n][i % 2] / cap);
      scale[n][0] = scale[n][1] = 1.0f;
    }
  }

  __device__ __forceinline__ void LoadUnits(const float* unit, float (&scale)[S::kTiles][2]) const {
#pragma unroll
    for (int n = 0; n < S::kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) scale[n][i] = unit[first_row + n * 8 + lane % 4 * 2 + i];
  }

  __device__ __forceinline__ const uint4* Queries(const uint4* q) const {
    return q + first_row / 8 * shape.Steps() * 32;
  }

  __device__ __forceinline__ void Page(Feed<S>& feed, const Operands& rows, const TokenMap& map,
                                       uint32_t offsets, int index, uint64_t live, State<S>& state) const {
    const Stream& stream = task.stream;
    if (live == 0) {  // what it holds may be anything, and 0 * NaN is not 0
      feed.SkipPage();
      return;
    }
    Scores<S> s;
    float scale[S::kTiles][2];
    const uint4* q = Queries(rows.q);
    const uint8_t* slot = feed.Acquire();
    uint8_t* header = feed.header();
    const float largest = PrepareHeader(header);
    switch (stream.k_bits) {
      case 16:
        ScorePass<16>(shape, feed, slot, q, header, lane, s);
        break;
      case 8:
        ScorePass<8>(shape, feed, slot, q, header, lane, s);
        break;
      case 4:
        ScorePass<4>(shape, feed, slot, q, header, lane, s);
        break;
      case 3:
        ScorePass<3>(shape, feed, slot, q, header, lane, s);
        break;
      default:
        ScorePass<2>(shape, feed, slot, q, header, lane, s);
        break;
    }
    feed.Release();
    LoadUnits(rows.unit, scale);
    CapScores(s, scale);
    if (~live != 0) Hide<S>(s, map, [&](int, int, int token) { return (live >> token & 1) != 0; });
    state.Softmax(s, scale);

    if (stream.v_bits == 16) {
      StoreWeights<S>(s, offsets, lane, state, p);
    } else {
      // The power of two above the largest scale, so that products of weights and scales stay below 2^14.
      // Scales below 1/4 do not ask for their own, for 2^24 / unit must be a half float.
      const uint32_t above = (__float_as_uint(fmaxf(largest, 0x1p-2f)) >> 23) + 1;
      const float unit = __uint_as_float(above << 23) * 0x1p10f;
      if (unit > state.unit) state.ChangeUnit(unit);
      StoreScaledWeights<S>(shape, s, map, offsets, reinterpret_cast<const __half*>(header + stream.v_scale),
                            reinterpret_cast<const __half*>(header + stream.v_min), lane, state, p);
    }
    slot = feed.Acquire();
    switch (stream.v_bits) {
      case 16:
        HalfValuePass(shape, feed, slot, p, lane, S::kExact, 4, state.o);
        break;
      case 8:
        ValuePass<8>(shape, feed, slot, p, lane, state.o);
        break;
      case 4:
        ValuePass<4>(shape, feed, slot, p, lane, state.o);
        break;
      case 3:
        ValuePass<3>(shape, feed, slot, p, lane, state.o);
        break;
      default:
        ValuePass<2>(shape, feed, slot, p, lane, state.o);
        break;
    }
    feed.Release();
    feed.NextHeader();
  }

  // Comes before pages: state.unit is still that of half floats.
  __device__ __forceinline__ void Raw(Feed<S>& feed, const Operands& rows, int first, State<S>& state) const {
    const Stream& stream = task.stream;
    Scores<S> s;
    RawScorePass(shape, feed.Acquire(), Queries(rows.q), lane, s);
    feed.Release();
    float scale[S::kTiles][2];
    LoadUnits(rows.unit, scale);
    CapScores(s, scale);
    const TokenMap map = MapTokens(2, lane / 4);
    const int own = stream.own, end = task.item.raw_end;
    Hide<S>(s, map, [&](int n, int i, int token) {
      const int at = first + token;
      return token < kRawUnitTokens && at < end && at >= stream.first_raw + Token(n, i) &&
             (own == 0 || at < stream.n_raw - own + 1 + Token(n, i));
    });
    state.Softmax(s, scale);
    StoreWeights<S>(s, ProbabilityOffsets(map, 16, lane), lane, state, p);
    HalfValuePass(shape, feed, feed.Acquire(), p, lane, S::kExact && stream.v_bits == 16, 1, state.o);
    feed.Release();
  }
};

}  // namespace moend::cuda
