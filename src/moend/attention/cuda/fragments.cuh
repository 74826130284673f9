// Codes of packed pages as operands of mma.m16n8k16 (f16 in, f32 sums), without a multiplication or a shift a
// code: a field of n bits at bit b of a half float's significand, everything else 0, *is* the subnormal
// number code * 2^(b - 24), and tensor cores multiply subnormal numbers exactly. So one AND makes two
// operands, and 2^(24 - b) goes into the sums (K, where a field belongs to a tile of tokens) or into the
// probabilities (V, where it belongs to a step of the summed axis).
//
// Lane = 4 * g + t. Operand A has rows g and g + 8 and, of the summed axis, slots (2t, 2t + 1) and
// (2t + 8, 2t + 9). The order along both axes is free as long as both operands agree, and is chosen so that a
// 32-bit word of a page, four neighbours of the summed axis, feeds one lane: the first pair of slots is
// neighbours 0 and 2, the second 1 and 3.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace moend::cuda {

__device__ __forceinline__ void Mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t LowHalves(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x5410);
}
__device__ __forceinline__ uint32_t HighHalves(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x7632);
}
__device__ __forceinline__ __half2 AsHalf2(uint32_t x) {
  return *reinterpret_cast<__half2*>(&x);
}
__device__ __forceinline__ uint32_t AsWord(__half2 x) {
  return *reinterpret_cast<uint32_t*>(&x);
}

// Four rows of half floats whose neighbours along the other axis share a word: a transpose in registers.
__device__ __forceinline__ void HalfTile(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3,
                                         uint32_t (&a)[4]) {
  a[0] = LowHalves(w0, w2);
  a[1] = HighHalves(w0, w2);
  a[2] = LowHalves(w1, w3);
  a[3] = HighHalves(w1, w3);
}

// Fields of kBits at bit kShift of every byte of rows g (w0) and g + 8 (w1).
template <int kBits, int kShift>
__device__ __forceinline__ void FieldTile(uint32_t w0, uint32_t w1, uint32_t (&a)[4]) {
  constexpr uint32_t kMask = ((1u << kBits) - 1u) * 0x00010001u << kShift;
  a[0] = w0 & kMask;
  a[1] = w1 & kMask;
  a[2] = (w0 >> 8) & kMask;
  a[3] = (w1 >> 8) & kMask;
}

// Three bits: two at bit 2 * kField of the bytes of w, the third at bit kField of the bytes of h.
template <int kField>
__device__ __forceinline__ void ThreeBitTile(uint32_t w0, uint32_t w1, uint32_t h0, uint32_t h1,
                                             uint32_t (&a)[4]) {
  constexpr uint32_t kLow = 0x00030003u << 2 * kField, kHigh = 0x00040004u << 2 * kField;
  a[0] = (w0 & kLow) | (h0 << (kField + 2) & kHigh);
  a[1] = (w1 & kLow) | (h1 << (kField + 2) & kHigh);
  a[2] = (w0 >> 8 & kLow) | (h0 >> (6 - kField) & kHigh);
  a[3] = (w1 >> 8 & kLow) | (h1 >> (6 - kField) & kHigh);
}

// Where a lane's tokens are in a unit of 64: tile x has tokens base + (x / 2) * far + (x % 2) * near and the
// one behind it, in rows g and g + 8.
struct TokenMap {
  int base, far, near;
  __device__ __forceinline__ int token(int x) const { return base + (x >> 1) * far + (x & 1) * near; }
};

__device__ __forceinline__ TokenMap MapTokens(int k_bits, int g) {
  if (k_bits == 16) return {8 * g, 4, 2};
  if (k_bits == 8) return {16 * (g / 4) + 4 * (g % 4), 32, 2};
  if (k_bits == 4) return {32 * (g / 4) + 4 * (g % 4), 16, 2};
  return {2 * g, 32, 16};
}

// Parts of a page (its K, its V) travel in chunks of whole steps, each no larger than a slot of shared
// memory. A step is what one multiplication sums or yields: 16 channels of K, 16 channels of packed V, 16
// tokens of V of 16 bits.
__host__ __device__ constexpr int SlotBytes(int steps) {
  return (steps < 4 ? 4 : steps) * 512;
}
__device__ constexpr int StepBytes(int bits) {
  return bits == 3 ? 384 : bits * 128;
}
// Steps a chunk: as many as fit a slot.
__device__ constexpr int ChunkSteps(int bits, int steps) {
  const int whole = steps < 4 ? 4 : steps;
  return bits == 16 ? whole / 4 : bits == 8 ? whole / 2 : whole;
}
__device__ constexpr int KeyChunks(int bits, int steps) {
  return bits < 8 ? 1 : (steps + ChunkSteps(bits, steps) - 1) / ChunkSteps(bits, steps);
}
__device__ constexpr int ValueChunks(int bits, int steps) {
  return bits == 16 ? 4 : KeyChunks(bits, steps);
}

// How a part travels. Cells of 16 bytes are put where readers meet no bank conflicts: cell `lane` of the
// 512-byte row i goes to lane ^ 2 * (lane >> near & mask), and by far[k] bytes for every bit k of i.
struct __align__(16) Part {
  int offset, chunk, bytes, chunks;  // in a page; of a chunk; of the part; of the part
  int far[3];
  int near;  // shift, and mask << 8
};

__device__ __forceinline__ Part MakePart(bool is_k, int bits, int steps, int offset) {
  Part p{offset,
         ChunkSteps(bits, steps) * StepBytes(bits),
         steps * StepBytes(bits),
         is_k ? KeyChunks(bits, steps) : ValueChunks(bits, steps),
         {0, 0, 0},
         0};
  if (bits != 16) {
    p.near = is_k && bits == 8 ? 4 | 1 << 8 : is_k && bits == 4 ? 3 | 3 << 8 : 3 | 1 << 8;
    if (is_k && bits == 8) p.far[0] = 64;
  } else if (is_k) {
    p.far[0] = 32, p.far[1] = 64;
  } else {
    p.chunk = steps * 512;
    // Tokens that lanes read at once are 4 apart.
    if (steps == 4) p.far[0] = 32, p.far[1] = 64;
    if (steps == 8) p.far[1] = 32, p.far[2] = 64;
  }
  return p;
}

// 16 bytes, if `in`; there is no branch, so that copies of a row after the other go out at once.
__device__ __forceinline__ void CopyAsync(uint32_t to, const uint8_t* from, bool in) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16; }" ::"r"(to),
      "l"(from), "r"(static_cast<int>(in))
      : "memory");
}
// 16 bytes, of which `bytes` (0 or 16) are there; the rest becomes 0.
__device__ __forceinline__ void FillAsync(uint32_t to, const uint8_t* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

template <class T>
__device__ __forceinline__ T At(const uint8_t* p) {
  return *reinterpret_cast<const T*>(p);
}

// K of 16 channels (a step of the summed axis: lane t has quad t) for 64 tokens, in four tiles. `from`: the
// step in its slot.
template <int kBits>
struct KeyStep;

template <>
struct KeyStep<16> {
  uint4 w[4];
  __device__ __forceinline__ void Read(const uint8_t* from, const uint8_t* /*high*/, int /*step*/, int g,
                                       int t) {
#pragma unroll
    for (int j = 0; j < 4; ++j) w[j] = At<uint4>(from + (t * 4 + j) * 128 + (g ^ 2 * t) * 16);
  }
  template <int kTile>
  __device__ __forceinline__ void Tile(uint32_t (&a)[4]) const {
    const auto at = [&](int j) {
      return kTile == 0 ? w[j].x : kTile == 1 ? w[j].y : kTile == 2 ? w[j].z : w[j].w;
    };
    HalfTile(at(0), at(1), at(2), at(3), a);
  }
  __device__ static constexpr float Scale(int) {
    return 1.0f;
  }
};

template <>
struct KeyStep<8> {
  uint4 w[2];
  __device__ __forceinline__ void Read(const uint8_t* from, const uint8_t* /*high*/, int /*step*/, int g,
                                       int t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) w[i] = At<uint4>(from + t * 256 + i * 128 + (g ^ 2 * t) * 16);
  }
  template <int kTile>
  __device__ __forceinline__ void Tile(uint32_t (&a)[4]) const {
    const uint4& v = w[kTile / 2];
    FieldTile<8, 0>(kTile % 2 ? v.z : v.x, kTile % 2 ? v.w : v.y, a);
  }
  __device__ static constexpr float Scale(int) {
    return 0x1p24f;
  }
};

template <>
struct KeyStep<4> {
  uint4 w;
  __device__ __forceinline__ void Read(const uint8_t* from, const uint8_t* /*high*/, int /*step*/, int g,
                                       int t) {
    w = At<uint4>(from + t * 128 + (g ^ 2 * t) * 16);
  }
  template <int kTile>
  __device__ __forceinline__ void Tile(uint32_t (&a)[4]) const {
    FieldTile<4, kTile / 2 * 4>(kTile % 2 ? w.z : w.x, kTile % 2 ? w.w : w.y, a);
  }
  __device__ static constexpr float Scale(int tile) { return tile / 2 ? 0x1p20f : 0x1p24f; }
};

// Eight bytes of row t of rows of 64 bytes; `flip`: the swizzle of the row.
__device__ __forceinline__ uint2 RowWords(const uint8_t* from, int row, int flip, int g) {
  return At<uint2>(from + row * 64 + (g / 2 ^ flip) * 16 + g % 2 * 8);
}

template <>
struct KeyStep<2> {
  uint2 w;
  __device__ __forceinline__ void Read(const uint8_t* from, const uint8_t* /*high*/, int /*step*/, int g,
                                       int t) {
    w = RowWords(from, t, t / 2 * 2, g);
  }
  template <int kTile>
  __device__ __forceinline__ void Tile(uint32_t (&a)[4]) const {
    FieldTile<2, kTile * 2>(w.x, w.y, a);
  }
  __device__ static constexpr float Scale(int tile) {
    return tile == 0 ? 0x1p24f : tile == 1 ? 0x1p22f : tile == 2 ? 0x1p20f : 0x1p18f;
  }
};

template <>
struct KeyStep<3> {
  uint2 w, h;
  __device__ __forceinline__ void Read(const uint8_t* from, const uint8_t* high, int step, int g, int t) {
    w = RowWords(from, t, t / 2 * 2, g);
    h = RowWords(high, t / 2, step % 2 * 2, g);
    h.x >>= t % 2 * 4;
    h.y >>= t % 2 * 4;
  }
  template <int kTile>
  __device__ __forceinline__ void Tile(uint32_t (&a)[4]) const {
    ThreeBitTile<kTile>(w.x, w.y, h.x, h.y, a);
  }
  __device__ static constexpr float Scale(int tile) { return KeyStep<2>::Scale(tile); }
};

// V of 16 channels (rows g and g + 8 are channels 2g and 2g + 1) for 64 tokens, in four steps of the summed
// axis. Lane t of step k has the four tokens of one quad; SlotOfQuad() says which.
template <int kBits>
struct ValueTile;

template <>
struct ValueTile<8> {
  uint2 w[4];
  __device__ __forceinline__ void Read(const uint8_t* from, const uint8_t* /*high*/, int /*tile*/, int g,
                                       int t) {
#pragma unroll
    for (int k = 0; k < 4; ++k) w[k] = RowWords(from, k * 4 + t, t / 2 * 2, g);
  }
  template <int kStep>
  __device__ __forceinline__ void Step(uint32_t (&a)[4]) const {
    FieldTile<8, 0>(w[kStep].x, w[kStep].y, a);
  }
  __device__ static constexpr int Shift(int) {
    return 0;
  }
};

template <>
struct ValueTile<4> {
  uint2 w[2];
  __device__ __forceinline__ void Read(const uint8_t* from, const uint8_t* /*high*/, int /*tile*/, int g,
                                       int t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) w[i] = RowWords(from, i * 4 + t, t / 2 * 2, g);
  }
  template <int kStep>
  __device__ __forceinline__ void Step(uint32_t (&a)[4]) const {
    FieldTile<4, kStep % 2 * 4>(w[kStep / 2].x, w[kStep / 2].y, a);
  }
  __device__ static constexpr int Shift(int step) {
    return step % 2 * 4;
  }
};

template <>
struct ValueTile<2> {
  uint2 w;
  __device__ __forceinline__ void Read(const uint8_t* from, const uint8_t* /*high*/, int /*tile*/, int g,
                                       int t) {
    w = RowWords(from, t, t / 2 * 2, g);
  }
  template <int kStep>
  __device__ __forceinline__ void Step(uint32_t (&a)[4]) const {
    FieldTile<2, kStep * 2>(w.x, w.y, a);
  }
  __device__ static constexpr int Shift(int step) { return step * 2; }
};

template <>
struct ValueTile<3> {
  uint2 w, h;
  __device__ __forceinline__ void Read(const uint8_t* from, const uint8_t* high, int tile, int g, int t) {
    w = RowWords(from, t, t / 2 * 2, g);
    h = RowWords(high, t / 2, tile % 2 * 2, g);
    h.x >>= t % 2 * 4;
    h.y >>= t % 2 * 4;
  }
  template <int kStep>
  __device__ __forceinline__ void Step(uint32_t (&a)[4]) const {
    ThreeBitTile<kStep>(w.x, w.y, h.x, h.y, a);
  }
  __device__ static constexpr int Shift(int step) { return step * 2; }
};

// Where quad `quad` of a unit's 64 tokens lies among the probabilities: slot 4 * step + t.
__device__ __forceinline__ int SlotOfQuad(int v_bits, int quad) {
  if (v_bits >= 8) return quad;
  if (v_bits == 4) return (quad & 8) | (quad & 1) << 2 | (quad >> 1 & 3);
  return (quad & 3) << 2 | quad >> 2;
}

// Raw tokens, whose layout only these functions know. They travel in chunks of 16 tokens, [head_size][16] of
// K and [16][head_size] of V; a word is two neighbouring tokens of K or channels of V.
__device__ __forceinline__ const uint8_t* RawKeyChunk(const uint16_t* raw_k, int64_t token, int head_size) {
  return reinterpret_cast<const uint8_t*>(raw_k + token * head_size);
}
__device__ __forceinline__ const uint8_t* RawValueChunk(const uint16_t* raw_v, int64_t token, int head_size) {
  return reinterpret_cast<const uint8_t*>(raw_v + token * head_size);
}
__device__ __forceinline__ uint32_t RawKeyWord(const uint8_t* chunk, int token, int channel) {
  return At<uint32_t>(chunk + channel * 32 + token * 2);
}

}  // namespace moend::cuda
