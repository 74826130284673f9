#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "moend/cache/codec.h"
#include "moend/cache/codec_16/halves.h"
#include "moend/cache/codec_2/rows.h"
#include "moend/cache/codec_3/rows.h"
#include "moend/cache/codec_4/rows.h"
#include "moend/cache/codec_8/rows.h"
#include "moend/cache/group.h"

namespace moend {
namespace {

constexpr int64_t kMaxRows = 256;
using CodeRows = std::array<uint8_t, kMaxRows * kRowBytes>;

// Calls f with the row packer of a width below 16.
template <class F>
void WithRows(int bits, F f) {
  switch (bits) {
    case 8:
      return f(Rows8());
    case 4:
      return f(Rows4());
    case 3:
      return f(Rows3());
    default:
      return f(Rows2());
  }
}

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

// The scale of the live values among x(0), ..., x(n - 1); of none it is 0.
template <class Live, class Value>
GroupScale ScaleOf(int64_t n, int max_code, Live live, Value x) {
  float low = INFINITY, high = -INFINITY;
  for (int64_t i = 0; i < n; ++i) {
    if (!live(i)) continue;
    const float value = ClampToHalfRange(x(i));
    low = std::min(low, value);
    high = std::max(high, value);
  }
  return low <= high ? ChooseScale(low, high, max_code) : GroupScale();
}

bool IsLive(uint64_t live, int64_t token) {
  return (live >> token) & 1;
}

void PackK(const PageLayout& layout, const float* k, uint64_t live, int max_code, uint8_t* page,
           uint8_t* rows) {
  for (int64_t c = 0; c < layout.head_size; ++c) {
    const auto at = [&](int64_t t) { return k[t * layout.head_size + c]; };
    const GroupScale g = ScaleOf(
        kPageTokens, max_code, [&](int64_t t) { return IsLive(live, t); }, at);
    Halves16(page, layout.k_scale)[c] = g.scale;
    Halves16(page, layout.k_min)[c] = g.min;
    const float min = HalfToFloat(g.min), inverse = InverseScale(g.scale);
    for (int64_t t = 0; t < kPageTokens; ++t)
      rows[KIndex(t, c)] = IsLive(live, t) ? EncodeValue(at(t), min, inverse, max_code) : uint8_t{0};
  }
}

void PackV(const PageLayout& layout, const float* v, uint64_t live, int max_code, uint8_t* page,
           uint8_t* rows) {
  const int64_t width = layout.head_size / layout.v_groups;
  for (int64_t t = 0; t < kPageTokens; ++t) {
    for (int64_t group = 0; group < layout.v_groups; ++group) {
      const float* x = v + t * layout.head_size + group * width;
      const GroupScale g = ScaleOf(
          width, max_code, [&](int64_t) { return IsLive(live, t); }, [&](int64_t c) { return x[c]; });
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

void PackPage(const PageLayout& layout, const float* k, const float* v, uint64_t live, uint8_t* page) {
  CodeRows rows;
  const int64_t hs = layout.head_size;
  if (layout.k_bits == 16) {
    for (int64_t c = 0; c < hs; ++c)
      for (int64_t t = 0; t < kPageTokens; ++t)
        Halves16(page, layout.k_codes)[c * kPageTokens + t] =
            Halves::Encode(IsLive(live, t) ? k[t * hs + c] : 0);
  } else {
    WithRows(layout.k_bits, [&]<class Rows>(Rows) {
      PackK(layout, k, live, Rows::kMaxCode, page, rows.data());
      Rows::Pack(rows.data(), hs, page + layout.k_codes);
    });
  }
  if (layout.v_bits == 16) {
    for (int64_t t = 0; t < kPageTokens; ++t)
      for (int64_t c = 0; c < hs; ++c)
        Halves16(page, layout.v_codes)[t * hs + c] = Halves::Encode(IsLive(live, t) ? v[t * hs + c] : 0);
  } else {
    WithRows(layout.v_bits, [&]<class Rows>(Rows) {
      PackV(layout, v, live, Rows::kMaxCode, page, rows.data());
      Rows::Pack(rows.data(), hs, page + layout.v_codes);
    });
  }
}

void UnpackPage(const PageLayout& layout, const uint8_t* page, float* k, float* v) {
  CodeRows rows;
  const int64_t hs = layout.head_size;
  if (k && layout.k_bits == 16) {
    for (int64_t c = 0; c < hs; ++c)
      for (int64_t t = 0; t < kPageTokens; ++t)
        k[t * hs + c] = Halves::Decode(Halves16(page, layout.k_codes)[c * kPageTokens + t]);
  } else if (k) {
    WithRows(layout.k_bits, [&]<class Rows>(Rows) { Rows::Unpack(page + layout.k_codes, hs, rows.data()); });
    for (int64_t c = 0; c < hs; ++c) {
      const float scale = HalfToFloat(Halves16(page, layout.k_scale)[c]);
      const float min = HalfToFloat(Halves16(page, layout.k_min)[c]);
      for (int64_t t = 0; t < kPageTokens; ++t) k[t * hs + c] = DecodeValue(rows[KIndex(t, c)], min, scale);
    }
  }
  if (v && layout.v_bits == 16) {
    for (int64_t i = 0; i < kPageTokens * hs; ++i) v[i] = Halves::Decode(Halves16(page, layout.v_codes)[i]);
  } else if (v) {
    WithRows(layout.v_bits, [&]<class Rows>(Rows) { Rows::Unpack(page + layout.v_codes, hs, rows.data()); });
    const int64_t width = hs / layout.v_groups;
    for (int64_t t = 0; t < kPageTokens; ++t) {
      for (int64_t c = 0; c < hs; ++c) {
        const int64_t group = c / width * kPageTokens + t;
        v[t * hs + c] = DecodeValue(rows[VIndex(t, c)], HalfToFloat(Halves16(page, layout.v_min)[group]),
                                    HalfToFloat(Halves16(page, layout.v_scale)[group]));
      }
    }
  }
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
