// Joins and splits code rows, 32-bit words at a time: codes do not cross bytes, so shifting words does it.
#if defined(MOEND_CACHE_SIMD_PLANES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOEND_CACHE_SIMD_PLANES_INL_H_
#undef MOEND_CACHE_SIMD_PLANES_INL_H_
#else
#define MOEND_CACHE_SIMD_PLANES_INL_H_
#endif

#include <cstring>

#include "moend/cache/rows.h"
#include "moend/cache/simd/halves-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moend::codec_simd {
namespace HWY_NAMESPACE {

constexpr int64_t kVectorBytes = kLanes * 4;

HWY_INLINE VU LoadWords(const uint8_t* from) {
#if HWY_TARGET == HWY_SCALAR
  uint32_t word;
  std::memcpy(&word, from, sizeof(word));
  return hn::Set(DU(), word);
#else
  return hn::BitCast(DU(), hn::LoadU(hn::Repartition<uint8_t, DU>(), from));
#endif
}
HWY_INLINE void StoreWords(VU words, uint8_t* to) {
#if HWY_TARGET == HWY_SCALAR
  const uint32_t word = hn::GetLane(words);
  std::memcpy(to, &word, sizeof(word));
#else
  const hn::Repartition<uint8_t, DU> d8;
  hn::StoreU(hn::BitCast(d8, words), d8, to);
#endif
}

struct VectorPlanes {
  template <int Bits, int Shift = 0>
  static HWY_NOINLINE void Join(const uint8_t* HWY_RESTRICT rows, int64_t n_rows,
                                uint8_t* HWY_RESTRICT packed) {
    constexpr int kJoined = 8 / Bits;
    const VU mask = hn::Set(DU(), ((1u << Bits) - 1) * 0x01010101u);
    for (int64_t i = 0; i < n_rows / kJoined; ++i) {
      for (int64_t b = 0; b < kRowBytes; b += kVectorBytes) {
        const uint8_t* from = rows + i * kJoined * kRowBytes + b;
        const auto field = [&](int s) HWY_ATTR {
          return hn::And(hn::ShiftRight<Shift>(LoadWords(from + s * kRowBytes)), mask);
        };
        VU joined = field(0);
        if constexpr (kJoined > 1) joined = hn::Or(joined, hn::ShiftLeft<Bits>(field(1)));
        if constexpr (kJoined > 2) {
          joined = hn::Or(joined, hn::ShiftLeft<2 * Bits>(field(2)));
          joined = hn::Or(joined, hn::ShiftLeft<3 * Bits>(field(3)));
        }
        if constexpr (kJoined > 4) {
          joined = hn::Or(joined, hn::ShiftLeft<4 * Bits>(field(4)));
          joined = hn::Or(joined, hn::ShiftLeft<5 * Bits>(field(5)));
          joined = hn::Or(joined, hn::ShiftLeft<6 * Bits>(field(6)));
          joined = hn::Or(joined, hn::ShiftLeft<7 * Bits>(field(7)));
        }
        StoreWords(joined, packed + i * kRowBytes + b);
      }
    }
  }

  template <int Bits, int Shift = 0, bool Add = false>
  static HWY_NOINLINE void Split(const uint8_t* HWY_RESTRICT packed, int64_t n_rows,
                                 uint8_t* HWY_RESTRICT rows) {
    constexpr int kJoined = 8 / Bits;
    const VU mask = hn::Set(DU(), ((1u << Bits) - 1) * 0x01010101u);
    for (int64_t i = 0; i < n_rows / kJoined; ++i) {
      for (int64_t b = 0; b < kRowBytes; b += kVectorBytes) {
        const VU joined = LoadWords(packed + i * kRowBytes + b);
        uint8_t* to = rows + i * kJoined * kRowBytes + b;
        const auto put = [&](int s, VU shifted) HWY_ATTR {
          VU codes = hn::ShiftLeft<Shift>(hn::And(shifted, mask));
          if (Add) codes = hn::Or(codes, LoadWords(to + s * kRowBytes));
          StoreWords(codes, to + s * kRowBytes);
        };
        put(0, joined);
        if constexpr (kJoined > 1) put(1, hn::ShiftRight<Bits>(joined));
        if constexpr (kJoined > 2) {
          put(2, hn::ShiftRight<2 * Bits>(joined));
          put(3, hn::ShiftRight<3 * Bits>(joined));
        }
        if constexpr (kJoined > 4) {
          put(4, hn::ShiftRight<4 * Bits>(joined));
          put(5, hn::ShiftRight<5 * Bits>(joined));
          put(6, hn::ShiftRight<6 * Bits>(joined));
          put(7, hn::ShiftRight<7 * Bits>(joined));
        }
      }
    }
  }
};

}  // namespace HWY_NAMESPACE
}  // namespace moend::codec_simd
HWY_AFTER_NAMESPACE();

#endif  // MOEND_CACHE_SIMD_PLANES_INL_H_
