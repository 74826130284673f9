// Vectorized packing and unpacking: bit for bit what codec_reference.cpp defines.
#include "moend/cache/codec.h"

#include "moend/attention/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "moend/cache/simd/codec.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include "moend/cache/codecs.h"
#include "moend/cache/simd/groups-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moend::codec_simd {
namespace HWY_NAMESPACE {

constexpr int64_t kMaxRows = 256;
constexpr uint64_t kAllLive = ~uint64_t{0};

struct alignas(64) CodeRows {
  uint8_t bytes[kMaxRows * kRowBytes];
};

HWY_INLINE uint16_t* Halves(uint8_t* page, int64_t offset) {
  return reinterpret_cast<uint16_t*>(page + offset);
}
HWY_INLINE const uint16_t* Halves(const uint8_t* page, int64_t offset) {
  return reinterpret_cast<const uint16_t*>(page + offset);
}

// Codes of four groups, interleaved as bytes of words. x(j) points to group j's values; its parameters are at
// index(j).
template <class X, class Index>
HWY_INLINE VU EncodeFour(const Groups& g, VF last, X x, Index index) {
  const DF df;
  const auto codes = [&](int j) HWY_ATTR {
    return Encode(x(j), hn::Set(df, g.min[index(j)]), hn::Set(df, g.inverse[index(j)]), last);
  };
  const VU low = hn::Or(codes(0), hn::ShiftLeft<8>(codes(1)));
  const VU high = hn::Or(hn::ShiftLeft<16>(codes(2)), hn::ShiftLeft<24>(codes(3)));
  return hn::Or(low, high);
}

void EncodeKeys(const PageLayout& layout, const float* HWY_RESTRICT k, uint64_t live, int max_code,
                uint8_t* page, uint8_t* HWY_RESTRICT rows) {
  Groups groups;
  for (int64_t c = 0; c < layout.head_size; ++c) {
    const float* x = k + c * kPageTokens;
    if (live == kAllLive) {
      FindRange<false>(x, kPageTokens, live, groups.low[c], groups.high[c]);
    } else {
      FindRange<true>(x, kPageTokens, live, groups.low[c], groups.high[c]);
    }
  }
  ChooseScales(groups, layout.head_size, max_code, Halves(page, layout.k_scale), Halves(page, layout.k_min));
  const VF last = hn::Set(DF(), static_cast<float>(max_code));
  for (int64_t c = 0; c < layout.head_size; c += 4) {
    for (int64_t t = 0; t < kPageTokens; t += kLanes) {
      const auto x = [&](int j) { return k + (c + j) * kPageTokens + t; };
      VU words = EncodeFour(groups, last, x, [&](int j) { return c + j; });
      words = hn::IfThenElseZero(hn::RebindMask(DU(), LiveLanes(live, t)), words);
      StoreWords(words, rows + (c * kPageTokens / 4 + t) * 4);
    }
  }
}

// The groups of V for which a narrowed range is better get it. `scales` and `mins` are those of the whole
// ranges.
void NarrowValueScales(const PageLayout& layout, const float* HWY_RESTRICT v, uint64_t live, int max_code,
                       Groups& groups, uint16_t* HWY_RESTRICT scales, uint16_t* HWY_RESTRICT mins) {
  const int64_t hs = layout.head_size, width = hs / layout.v_groups, n = layout.v_groups * kPageTokens;
  Groups narrow;
  uint16_t narrow_scales[kMaxGroups], narrow_mins[kMaxGroups];
  NarrowRanges(groups, n, narrow);
  ChooseScales(narrow, n, max_code, narrow_scales, narrow_mins);
  const VF last = hn::Set(DF(), static_cast<float>(max_code));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t t = i % kPageTokens;
    if (!(live >> t & 1)) continue;
    const float* x = v + t * hs + i / kPageTokens * width;
    const GroupScale whole{scales[i], mins[i]}, other{narrow_scales[i], narrow_mins[i]};
    const int32_t whole_sum = ResidualSum(x, width, groups.min[i], groups.inverse[i], last);
    const int32_t other_sum = ResidualSum(x, width, narrow.min[i], narrow.inverse[i], last);
    if (!PreferNarrow(whole, other, groups.low[i], groups.high[i], max_code, whole_sum, other_sum)) continue;
    scales[i] = other.scale;
    mins[i] = other.min;
    groups.min[i] = narrow.min[i];
    groups.inverse[i] = narrow.inverse[i];
  }
}

void EncodeValues(const PageLayout& layout, const float* HWY_RESTRICT v, uint64_t live, int max_code,
                  uint8_t* page, uint8_t* HWY_RESTRICT rows) {
  const int64_t hs = layout.head_size, width = hs / layout.v_groups;
  Groups groups;
  for (int64_t group = 0; group < layout.v_groups; ++group) {
    for (int64_t t = 0; t < kPageTokens; ++t) {
      const int64_t i = group * kPageTokens + t;
      if (live >> t & 1) {
        FindRange<false>(v + t * hs + group * width, width, live, groups.low[i], groups.high[i]);
      } else {
        groups.low[i] = 1.0f;
        groups.high[i] = -1.0f;
      }
    }
  }
  ChooseScales(groups, layout.v_groups * kPageTokens, max_code, Halves(page, layout.v_scale),
               Halves(page, layout.v_min));
  if (max_code <= kNarrowedMaxCode)
    NarrowValueScales(layout, v, live, max_code, groups, Halves(page, layout.v_scale),
                      Halves(page, layout.v_min));
  const VF last = hn::Set(DF(), static_cast<float>(max_code));
  for (int64_t t = 0; t < kPageTokens; t += 4) {
    // Byte j of a word belongs to token t + j.
    uint32_t live_bytes = 0;
    for (int64_t j = 0; j < 4; ++j) live_bytes |= (live >> (t + j) & 1) ? 255u << (8 * j) : 0u;
    for (int64_t c = 0; c < hs; c += kLanes) {
      const auto x = [&](int j) { return v + (t + j) * hs + c; };
      VU words = EncodeFour(groups, last, x, [&](int j) { return c / width * kPageTokens + t + j; });
      words = hn::And(words, hn::Set(DU(), live_bytes));
      StoreWords(words, rows + (c / 16 * 16 + t / 4) * kRowBytes + c % 16 * 4);
    }
  }
}

void PackCodes(int bits, const uint8_t* rows, int64_t head_size, uint8_t* packed) {
  WithRows<VectorPlanes>(bits, [&]<class Rows>(Rows) { Rows::Pack(rows, head_size, packed); });
}

void UnpackCodes(int bits, const uint8_t* packed, int64_t head_size, uint8_t* rows) {
  WithRows<VectorPlanes>(bits, [&]<class Rows>(Rows) { Rows::Unpack(packed, head_size, rows); });
}

void FloatsToHalves(const float* HWY_RESTRICT floats, int64_t n, uint16_t* HWY_RESTRICT halves) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    StoreHalfBits(HalfBitsFromFloat(ClampToHalfRange(hn::LoadU(DF(), floats + i))), halves + i);
  for (; i < n; ++i) halves[i] = FloatToFiniteHalf(floats[i]);
}

void HalvesToFloats(const uint16_t* HWY_RESTRICT halves, int64_t n, float* HWY_RESTRICT floats) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(LoadHalves(halves + i), DF(), floats + i);
  for (; i < n; ++i) floats[i] = HalfToFloat(halves[i]);
}

void PackKeys(const PageLayout& layout, const float* k, uint64_t live, uint8_t* page) {
  const int64_t hs = layout.head_size;
  if (layout.k_bits == 16) {
    for (int64_t c = 0; c < hs; ++c) {
      for (int64_t t = 0; t < kPageTokens; t += kLanes) {
        const VF x = hn::IfThenElseZero(LiveLanes(live, t), hn::LoadU(DF(), k + c * kPageTokens + t));
        StoreHalfBits(HalfBitsFromFloat(ClampToHalfRange(x)),
                      Halves(page, layout.k_codes) + c * kPageTokens + t);
      }
    }
    return;
  }
  WithRows<VectorPlanes>(layout.k_bits, [&]<class Rows>(Rows) {
    CodeRows rows;
    EncodeKeys(layout, k, live, Rows::kMaxCode, page, rows.bytes);
    Rows::Pack(rows.bytes, hs, page + layout.k_codes);
  });
}

// A channel's codes to `words` (of four channels, byte `j` is this one's), its errors to those behind it.
void RoundChannel(int64_t c, int64_t hs, float min, float scale, float inverse, VF last,
                  const float* HWY_RESTRICT factors, float* HWY_RESTRICT k, uint32_t* HWY_RESTRICT words) {
  const DF df;
  const DU du;
  alignas(64) float error[kPageTokens];
  const auto shift = static_cast<int>(c % 4 * 8);
  for (int64_t t = 0; t < kPageTokens; t += kLanes) {
    const float* x = k + c * kPageTokens + t;
    const VU code = Encode(x, hn::Set(df, min), hn::Set(df, inverse), last);
    const VF value =
        hn::MulAdd(hn::ConvertTo(df, hn::BitCast(DI(), code)), hn::Set(df, scale), hn::Set(df, min));
    hn::Store(hn::Sub(ClampToHalfRange(hn::LoadU(df, x)), value), df, error + t);
    const VU placed = hn::ShiftLeftSame(code, shift);
    hn::StoreU(shift == 0 ? placed : hn::Or(hn::LoadU(du, words + t), placed), du, words + t);
  }
  for (int64_t j = c + 1; j < hs; ++j) {
    const VF factor = hn::Set(df, factors[c * hs + j]);
    float* HWY_RESTRICT to = k + j * kPageTokens;
    for (int64_t t = 0; t < kPageTokens; t += kLanes)
      hn::StoreU(hn::NegMulAdd(factor, hn::Load(df, error + t), hn::LoadU(df, to + t)), df, to + t);
  }
}

void PackKeysFeedback(const PageLayout& layout, float* HWY_RESTRICT k, const float* HWY_RESTRICT factors,
                      uint8_t* page) {
  const int64_t hs = layout.head_size;
  WithRows<VectorPlanes>(layout.k_bits, [&]<class Rows>(Rows) {
    CodeRows rows;
    Groups groups;
    for (int64_t c = 0; c < hs; ++c)
      FindRange<false>(k + c * kPageTokens, kPageTokens, kAllLive, groups.low[c], groups.high[c]);
    ChooseScales(groups, hs, Rows::kMaxCode, Halves(page, layout.k_scale), Halves(page, layout.k_min));
    alignas(64) float scale[kMaxRows];
    HalvesToFloats(Halves(page, layout.k_scale), hs, scale);
    const VF last = hn::Set(DF(), static_cast<float>(Rows::kMaxCode));
    alignas(64) uint32_t words[kPageTokens];
    for (int64_t c = 0; c < hs; ++c) {
      RoundChannel(c, hs, groups.min[c], scale[c], groups.inverse[c], last, factors, k, words);
      if (c % 4 < 3) continue;
      for (int64_t t = 0; t < kPageTokens; t += kLanes)
        StoreWords(hn::Load(DU(), words + t), rows.bytes + (c / 4 * kPageTokens + t) * 4);
    }
    Rows::Pack(rows.bytes, hs, page + layout.k_codes);
  });
}

void PackValues(const PageLayout& layout, const float* v, uint64_t live, uint8_t* page) {
  const int64_t hs = layout.head_size;
  if (layout.v_bits == 16) {
    for (int64_t t = 0; t < kPageTokens; ++t) {
      uint16_t* to = Halves(page, layout.v_codes) + t * hs;
      if (live >> t & 1) {
        FloatsToHalves(v + t * hs, hs, to);
      } else {
        for (int64_t c = 0; c < hs; ++c) to[c] = 0;
      }
    }
    return;
  }
  WithRows<VectorPlanes>(layout.v_bits, [&]<class Rows>(Rows) {
    CodeRows rows;
    EncodeValues(layout, v, live, Rows::kMaxCode, page, rows.bytes);
    Rows::Pack(rows.bytes, hs, page + layout.v_codes);
  });
}

void DecodeKeys(const PageLayout& layout, const uint8_t* page, const uint8_t* HWY_RESTRICT rows,
                float* HWY_RESTRICT k) {
  alignas(64) float scale[kMaxRows], min[kMaxRows];
  HalvesToFloats(Halves(page, layout.k_scale), layout.head_size, scale);
  HalvesToFloats(Halves(page, layout.k_min), layout.head_size, min);
  for (int64_t c = 0; c < layout.head_size; c += 4) {
    for (int64_t t = 0; t < kPageTokens; t += kLanes) {
      const VU words = LoadWords(rows + (c * kPageTokens / 4 + t) * 4);
      float* to = k + c * kPageTokens + t;
      hn::StoreU(Decode<0>(words, min[c], scale[c]), DF(), to);
      hn::StoreU(Decode<1>(words, min[c + 1], scale[c + 1]), DF(), to + kPageTokens);
      hn::StoreU(Decode<2>(words, min[c + 2], scale[c + 2]), DF(), to + 2 * kPageTokens);
      hn::StoreU(Decode<3>(words, min[c + 3], scale[c + 3]), DF(), to + 3 * kPageTokens);
    }
  }
}

void DecodeValues(const PageLayout& layout, const uint8_t* page, const uint8_t* HWY_RESTRICT rows,
                  float* HWY_RESTRICT v) {
  const int64_t hs = layout.head_size, width = hs / layout.v_groups;
  alignas(64) float scale[kMaxGroups], min[kMaxGroups];
  HalvesToFloats(Halves(page, layout.v_scale), layout.v_groups * kPageTokens, scale);
  HalvesToFloats(Halves(page, layout.v_min), layout.v_groups * kPageTokens, min);
  for (int64_t t = 0; t < kPageTokens; t += 4) {
    for (int64_t c = 0; c < hs; c += kLanes) {
      const VU words = LoadWords(rows + (c / 16 * 16 + t / 4) * kRowBytes + c % 16 * 4);
      const int64_t g = c / width * kPageTokens + t;
      float* to = v + t * hs + c;
      hn::StoreU(Decode<0>(words, min[g], scale[g]), DF(), to);
      hn::StoreU(Decode<1>(words, min[g + 1], scale[g + 1]), DF(), to + hs);
      hn::StoreU(Decode<2>(words, min[g + 2], scale[g + 2]), DF(), to + 2 * hs);
      hn::StoreU(Decode<3>(words, min[g + 3], scale[g + 3]), DF(), to + 3 * hs);
    }
  }
}

void UnpackKeys(const PageLayout& layout, const uint8_t* page, float* k) {
  if (layout.k_bits == 16)
    return HalvesToFloats(Halves(page, layout.k_codes), layout.head_size * kPageTokens, k);
  CodeRows rows;
  UnpackCodes(layout.k_bits, page + layout.k_codes, layout.head_size, rows.bytes);
  DecodeKeys(layout, page, rows.bytes, k);
}

void UnpackValues(const PageLayout& layout, const uint8_t* page, float* v) {
  if (layout.v_bits == 16)
    return HalvesToFloats(Halves(page, layout.v_codes), layout.head_size * kPageTokens, v);
  CodeRows rows;
  UnpackCodes(layout.v_bits, page + layout.v_codes, layout.head_size, rows.bytes);
  DecodeValues(layout, page, rows.bytes, v);
}

}  // namespace HWY_NAMESPACE
}  // namespace moend::codec_simd
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moend {
namespace codec_simd {
HWY_EXPORT(PackKeys);
HWY_EXPORT(PackValues);
HWY_EXPORT(PackKeysFeedback);
HWY_EXPORT(UnpackKeys);
HWY_EXPORT(UnpackValues);
HWY_EXPORT(PackCodes);
HWY_EXPORT(UnpackCodes);
HWY_EXPORT(HalvesToFloats);
HWY_EXPORT(FloatsToHalves);
}  // namespace codec_simd

void PackKeys(const PageLayout& layout, const float* k, uint64_t live, uint8_t* page) {
  using namespace codec_simd;
  HWY_DYNAMIC_DISPATCH(PackKeys)(layout, k, live, page);
}
void PackValues(const PageLayout& layout, const float* v, uint64_t live, uint8_t* page) {
  using namespace codec_simd;
  HWY_DYNAMIC_DISPATCH(PackValues)(layout, v, live, page);
}
void PackKeysFeedback(const PageLayout& layout, float* k, const float* factors, uint8_t* page) {
  using namespace codec_simd;
  HWY_DYNAMIC_DISPATCH(PackKeysFeedback)(layout, k, factors, page);
}
void UnpackKeys(const PageLayout& layout, const uint8_t* page, float* k) {
  using namespace codec_simd;
  HWY_DYNAMIC_DISPATCH(UnpackKeys)(layout, page, k);
}
void UnpackValues(const PageLayout& layout, const uint8_t* page, float* v) {
  using namespace codec_simd;
  HWY_DYNAMIC_DISPATCH(UnpackValues)(layout, page, v);
}
void PackCodes(int bits, const uint8_t* rows, int64_t head_size, uint8_t* packed) {
  using namespace codec_simd;
  HWY_DYNAMIC_DISPATCH(PackCodes)(bits, rows, head_size, packed);
}
void UnpackCodes(int bits, const uint8_t* packed, int64_t head_size, uint8_t* rows) {
  using namespace codec_simd;
  HWY_DYNAMIC_DISPATCH(UnpackCodes)(bits, packed, head_size, rows);
}
void HalvesToFloats(const uint16_t* halves, int64_t n, float* floats) {
  using namespace codec_simd;
  HWY_DYNAMIC_DISPATCH(HalvesToFloats)(halves, n, floats);
}
void FloatsToHalves(const float* floats, int64_t n, uint16_t* halves) {
  using namespace codec_simd;
  HWY_DYNAMIC_DISPATCH(FloatsToHalves)(floats, n, halves);
}

}  // namespace moend
#endif  // HWY_ONCE
