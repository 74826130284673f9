// Code rows, see plan/layout.h: before packing, codes are bytes in rows of 64; packing joins rows. What a
// width does with its rows is in codec_<bits>/rows.h, on top of Join and Split, which are here as the
// definition and in simd/planes-inl.h vectorized.
#pragma once

#include <cstdint>

namespace moend {

inline constexpr int64_t kRowBytes = 64;

struct ScalarPlanes {
  // Rows of Bits-bit codes, taken from bits [Shift, Shift + Bits) of each byte, into n_rows * Bits / 8 packed
  // rows.
  template <int Bits, int Shift = 0>
  static void Join(const uint8_t* rows, int64_t n_rows, uint8_t* packed) {
    constexpr int kJoined = 8 / Bits;
    constexpr uint32_t kMask = (1u << Bits) - 1;
    for (int64_t i = 0; i < n_rows / kJoined; ++i) {
      for (int64_t b = 0; b < kRowBytes; ++b) {
        uint32_t joined = 0;
        for (int s = 0; s < kJoined; ++s)
          joined |= ((uint32_t{rows[(i * kJoined + s) * kRowBytes + b]} >> Shift) & kMask) << (s * Bits);
        packed[i * kRowBytes + b] = static_cast<uint8_t>(joined);
      }
    }
  }

  // The inverse; Add puts the bits on top of what the rows hold, else they replace it.
  template <int Bits, int Shift = 0, bool Add = false>
  static void Split(const uint8_t* packed, int64_t n_rows, uint8_t* rows) {
    constexpr int kJoined = 8 / Bits;
    constexpr uint32_t kMask = (1u << Bits) - 1;
    for (int64_t r = 0; r < n_rows; ++r) {
      for (int64_t b = 0; b < kRowBytes; ++b) {
        const uint32_t joined = packed[r / kJoined * kRowBytes + b];
        const uint32_t code = ((joined >> (r % kJoined * Bits)) & kMask) << Shift;
        uint8_t& out = rows[r * kRowBytes + b];
        out = static_cast<uint8_t>(Add ? out | code : code);
      }
    }
  }
};

}  // namespace moend
