#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "moend/cache/codec.h"
#include "moend/cache/codec_16/halves.h"
#include "moend/cache/codecs.h"
#include "moend/cache/group.h"

namespace moend {
namespace {

constexpr int64_t kMaxRows = 256;
using CodeRows = std::array<uint8_t, kMaxRows * kRowBytes>;

// Where the code of an element is among the code rows, see plan/layout.h.
int64_t KIndex(int64_t token, int64_t channel) {
  const int64_t row = channel / 4 * 4 + token / 16;
  return row * kRowBytes + token % 16 * 4 + channel % 4;
}
int64_t VIndex(int64_t token, int64_t channel) {
  const int64_t row = channel / 16 * 16 + token / 4;
  return row * kRowBytes + channel % 16 * 4 + token % 4;
}

uint16_t* Halves16(uint8_t* page, int64_t offset) {
  return reinterpret_cast<uint16_t*>(page + offset);
}
const uint16_t* Halves16(const uint8_t* page, int64_t offset) {
  return reinterpret_cast<const uint16_t*>(page + offset);
}

bool IsLive(uint64_t live, int64_t token) {
  return (live >> token) & 1;
}

// The scale of the live ones among the n values of x; of none it is 0.
GroupScale ScaleOf(const float* x, int64_t n, uint64_t live, int max_code) {
  float low = INFINITY, high = -INFINITY;
  for (int64_t i = 0; i < n; ++i) {
    if (!IsLive(live, i % kPageTokens)) continue;
    const float value = ClampToHalfRange(x[i]);
    low = std::min(low, value);
    high = std::max(high, value);
  }
  return low <= high ? ChooseScale(low, high, max_code) : GroupScale();
}

// The scale of a group of V.
GroupScale ValueScaleOf(const float* x, int64_t n, int max_code) {
  const GroupScale wide = ScaleOf(x, n, ~uint64_t{0}, max_code);
  if (max_code > kNarrowedMaxCode) return wide;
  float low = INFINITY, high = -INFINITY;
  for (int64_t i = 0; i < n; ++i) {
    low = std::min(low, ClampToHalfRange(x[i]));
    high = std::max(high, ClampToHalfRange(x[i]));
  }
  const GroupScale narrow = ChooseNarrowScale(low, high, max_code);
  return PreferNarrow(wide, narrow, low, high, max_code, ResidualSum(x, n, wide, max_code),
                      ResidualSum(x, n, narrow, max_code))
             ? narrow
             : wide;
}

void EncodeKeys(const PageLayout& layout, const float* k, uint64_t live, int max_code, uint8_t* page,
                uint8_t* rows) {
  for (int64_t c = 0; c < layout.head_size; ++c) {
    const float* x = k + c * kPageTokens;
    const GroupScale g = ScaleOf(x, kPageTokens, live, max_code);
    Halves16(page, layout.k_scale)[c] = g.scale;
    Halves16(page, layout.k_min)[c] = g.min;
    const float min = HalfToFloat(g.min), inverse = InverseScale(g.scale);
    for (int64_t t = 0; t < kPageTokens; ++t)
      rows[KIndex(t, c)] = IsLive(live, t) ? EncodeValue(x[t], min, inverse, max_code) : uint8_t{0};
  }
}

void EncodeValues(const PageLayout& layout, const float* v, uint64_t live, int max_code, uint8_t* page,
                  uint8_t* rows) {
  const int64_t width = layout.head_size / layout.v_groups;
  for (int64_t t = 0; t < kPageTokens; ++t) {
    for (int64_t group = 0; group < layout.v_groups; ++group) {
      const float* x = v + t * layout.head_size + group * width;
      const GroupScale g = IsLive(live, t) ? ValueScaleOf(x, width, max_code) : GroupScale();
      Halves16(page, layout.v_scale)[group * kPageTokens + t] = g.scale;
      Halves16(page, layout.v_min)[group * kPageTokens + t] = g.min;
      const float min = HalfToFloat(g.min), inverse = InverseScale(g.scale);
      for (int64_t c = 0; c < width; ++c)
        rows[VIndex(t, group * width + c)] =
            IsLive(live, t) ? EncodeValue(x[c], min, inverse, max_code) : uint8_t{0};
    }
  }
}

}  // namespace

namespace reference {

void PackCodes(int bits, const uint8_t* rows, int64_t head_size, uint8_t* packed) {
  WithRows<ScalarPlanes>(bits, [&]<class Rows>(Rows) { Rows::Pack(rows, head_size, packed); });
}

void UnpackCodes(int bits, const uint8_t* packed, int64_t head_size, uint8_t* rows) {
  WithRows<ScalarPlanes>(bits, [&]<class Rows>(Rows) { Rows::Unpack(packed, head_size, rows); });
}

void PackKeys(const PageLayout& layout, const float* k, uint64_t live, uint8_t* page) {
  if (layout.k_bits == 16) {
    for (int64_t i = 0; i < layout.head_size * kPageTokens; ++i)
      Halves16(page, layout.k_codes)[i] = Halves::Encode(IsLive(live, i % kPageTokens) ? k[i] : 0.0f);
    return;
  }
  WithRows<ScalarPlanes>(layout.k_bits, [&]<class Rows>(Rows) {
    CodeRows rows;
    EncodeKeys(layout, k, live, Rows::kMaxCode, page, rows.data());
    Rows::Pack(rows.data(), layout.head_size, page + layout.k_codes);
  });
}

void PackKeysFeedback(const PageLayout& layout, float* k, const float* factors, uint8_t* page) {
  WithRows<ScalarPlanes>(layout.k_bits, [&]<class Rows>(Rows) {
    CodeRows rows;
    // The codes are replaced below, the scales stay.
    EncodeKeys(layout, k, ~uint64_t{0}, Rows::kMaxCode, page, rows.data());
    for (int64_t c = 0; c < layout.head_size; ++c) {
      const uint16_t scale = Halves16(page, layout.k_scale)[c];
      const float min = HalfToFloat(Halves16(page, layout.k_min)[c]);
      for (int64_t t = 0; t < kPageTokens; ++t) {
        const float x = ClampToHalfRange(k[c * kPageTokens + t]);
        const uint8_t code = EncodeValue(x, min, InverseScale(scale), Rows::kMaxCode);
        rows[KIndex(t, c)] = code;
        const float error = x - DecodeValue(code, min, HalfToFloat(scale));
        for (int64_t j = c + 1; j < layout.head_size; ++j)
          k[j * kPageTokens + t] -= factors[c * layout.head_size + j] * error;
      }
    }
    Rows::Pack(rows.data(), layout.head_size, page + layout.k_codes);
  });
}

void PackValues(const PageLayout& layout, const float* v, uint64_t live, uint8_t* page) {
  if (layout.v_bits == 16) {
    for (int64_t i = 0; i < layout.head_size * kPageTokens; ++i)
      Halves16(page, layout.v_codes)[i] = Halves::Encode(IsLive(live, i / layout.head_size) ? v[i] : 0.0f);
    return;
  }
  WithRows<ScalarPlanes>(layout.v_bits, [&]<class Rows>(Rows) {
    CodeRows rows;
    EncodeValues(layout, v, live, Rows::kMaxCode, page, rows.data());
    Rows::Pack(rows.data(), layout.head_size, page + layout.v_codes);
  });
}

void UnpackKeys(const PageLayout& layout, const uint8_t* page, float* k) {
  if (layout.k_bits == 16) {
    for (int64_t i = 0; i < layout.head_size * kPageTokens; ++i)
      k[i] = Halves::Decode(Halves16(page, layout.k_codes)[i]);
    return;
  }
  CodeRows rows;
  UnpackCodes(layout.k_bits, page + layout.k_codes, layout.head_size, rows.data());
  for (int64_t c = 0; c < layout.head_size; ++c) {
    const float scale = HalfToFloat(Halves16(page, layout.k_scale)[c]);
    const float min = HalfToFloat(Halves16(page, layout.k_min)[c]);
    for (int64_t t = 0; t < kPageTokens; ++t)
      k[c * kPageTokens + t] = DecodeValue(rows[KIndex(t, c)], min, scale);
  }
}

void UnpackValues(const PageLayout& layout, const uint8_t* page, float* v) {
  const int64_t hs = layout.head_size, width = hs / layout.v_groups;
  if (layout.v_bits == 16) {
    for (int64_t i = 0; i < kPageTokens * hs; ++i) v[i] = Halves::Decode(Halves16(page, layout.v_codes)[i]);
    return;
  }
  CodeRows rows;
  UnpackCodes(layout.v_bits, page + layout.v_codes, hs, rows.data());
  for (int64_t t = 0; t < kPageTokens; ++t) {
    for (int64_t group = 0; group < layout.v_groups; ++group) {
      const float scale = HalfToFloat(Halves16(page, layout.v_scale)[group * kPageTokens + t]);
      const float min = HalfToFloat(Halves16(page, layout.v_min)[group * kPageTokens + t]);
      for (int64_t c = group * width; c < (group + 1) * width; ++c)
        v[t * hs + c] = DecodeValue(rows[VIndex(t, c)], min, scale);
    }
  }
}

void HalvesToFloats(const uint16_t* halves, int64_t n, float* floats) {
  for (int64_t i = 0; i < n; ++i) floats[i] = Halves::Decode(halves[i]);
}

void FloatsToHalves(const float* floats, int64_t n, uint16_t* halves) {
  for (int64_t i = 0; i < n; ++i) halves[i] = Halves::Encode(floats[i]);
}

}  // namespace reference

double RoundTripBound(int bits, double low, double high) {
  const double largest = std::max(std::abs(low), std::abs(high));
  const double clamped = std::max(0.0, largest - kMaxHalf);
  if (bits == 16) return std::max(largest * 0x1p-11, 0x1p-25) + clamped;
  const double limit = kMaxHalf;
  const int max_code = (1 << bits) - 1;
  const GroupScale g = ChooseScale(static_cast<float>(std::clamp(low, -limit, limit)),
                                   static_cast<float>(std::clamp(high, -limit, limit)), max_code);
  // Half a step, and the float roundings of encoding (in steps) and of decoding.
  return HalfToFloat(g.scale) * (0.5 + max_code * 0x1p-21) + largest * 0x1p-23 + clamped;
}

}  // namespace moend
