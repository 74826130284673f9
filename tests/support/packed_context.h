// A K/V context of one KV head for tests of the attention kernels, packed by a second implementation of
// plan/layout.h (on purpose independent of src/moend/cache), together with the values a kernel must see.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "moend/attention/params.h"

namespace moend::test {

// Round to nearest even, finite values in the half range only.
inline uint16_t ToHalf(double x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double a = std::fabs(x);
  if (a < std::ldexp(1.0, -14)) return static_cast<uint16_t>(sign | std::lrint(std::ldexp(a, 24)));
  int exponent = 0;
  const double fraction = std::frexp(a, &exponent);  // [0.5, 1)
  const long mantissa = std::lrint(std::ldexp(fraction, 11));
  return static_cast<uint16_t>(sign | (((exponent + 13) << 10) + mantissa));
}

inline double FromHalf(uint16_t h) {
  const int exponent = (h >> 10) & 31;
  const double a = exponent == 0 ? std::ldexp(h & 1023, -24) : std::ldexp((h & 1023) | 1024, exponent - 25);
  return h & 0x8000 ? -a : a;
}

inline PageLayout Layout(int64_t head_size, int k_bits, int v_bits) {
  PageLayout l;
  l.head_size = head_size;
  l.k_bits = k_bits;
  l.v_bits = v_bits;
  l.v_groups = VGroups(head_size);
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t offset = at;
    at += (bytes + 63) / 64 * 64;
    return offset;
  };
  if (k_bits != 16) {
    l.k_scale = take(head_size * 2);
    l.k_min = take(head_size * 2);
  }
  if (v_bits != 16) {
    l.v_scale = take(l.v_groups * 128);
    l.v_min = take(l.v_groups * 128);
  }
  l.k_codes = take(head_size * 8 * k_bits);
  l.v_codes = take(head_size * 8 * v_bits);
  l.refs = take(64);
  l.bytes = at;
  return l;
}

// rows of 64 bytes, one code each, to the packed form.
inline void PackRows(const std::vector<uint8_t>& rows, int bits, uint8_t* to) {
  const size_t per_byte = static_cast<size_t>(8 / bits);
  for (size_t i = 0; i < rows.size() / 64 / per_byte; ++i)
    for (size_t b = 0; b < 64; ++b) {
      unsigned packed = 0;
      for (size_t s = 0; s < per_byte; ++s)
        packed |= static_cast<unsigned>(rows[(i * per_byte + s) * 64 + b]) << (s * static_cast<size_t>(bits));
      to[i * 64 + b] = static_cast<uint8_t>(packed);
    }
}

inline void PackCodes(const std::vector<uint8_t>& rows, int bits, uint8_t* to) {
  if (bits != 3) return PackRows(rows, bits, to);
  std::vector<uint8_t> low(rows), high(rows);
  for (uint8_t& c : low) c &= 3;
  for (uint8_t& c : high) c = static_cast<uint8_t>(c >> 2);
  PackRows(low, 2, to);
  PackRows(high, 1, to + rows.size() / 4);
}

struct Affine {
  uint16_t scale, min;
};

inline Affine Fit(double low, double high, int bits) {
  return {ToHalf((high - low) / ((1 << bits) - 1)), ToHalf(low)};
}

inline uint8_t Encode(double x, Affine a, int bits) {
  const double scale = FromHalf(a.scale);
  const double code = scale > 0 ? std::round((x - FromHalf(a.min)) / scale) : 0.0;
  return static_cast<uint8_t>(std::clamp(code, 0.0, static_cast<double>((1 << bits) - 1)));
}

inline double Decode(uint8_t code, Affine a) {
  return FromHalf(a.min) + FromHalf(a.scale) * code;
}

// Random numbers as attention sees them: K channels of different spread and offset, one of them `outlier`
// times as large.
class PackedContext {
 public:
  PackedContext(int64_t head_size, int k_bits, int v_bits, int64_t n_pages, int64_t n_raw, double live_share,
                uint32_t seed, double outlier = 1)
      : layout_(Layout(head_size, k_bits, v_bits)), random_(seed) {
    std::uniform_real_distribution<double> uniform(0, 1);
    for (int64_t c = 0; c < head_size; ++c) {
      spread_.push_back(0.2 + 2 * uniform(random_) * uniform(random_));
      offset_.push_back(2 * uniform(random_) - 1);
    }
    spread_[5] *= outlier;
    offset_[5] *= outlier;
    for (int64_t p = 0; p < n_pages; ++p) {
      uint64_t live = 0;
      for (int t = 0; t < 64; ++t) live |= static_cast<uint64_t>(uniform(random_) < live_share) << t;
      live_.push_back(live);
      AddPage(live);
    }
    for (const auto& page : pages_) page_pointers_.push_back(page.data());
    raw_k_.assign(static_cast<size_t>((n_raw + 15) / 16 * 16 * head_size), 0x7e00);  // NaN where no token is
    raw_v_.resize(static_cast<size_t>(n_raw * head_size));
    for (int64_t t = 0; t < n_raw; ++t) {
      for (int64_t c = 0; c < head_size; ++c) {
        const uint16_t k = ToHalf(RandomK(c)), v = ToHalf(normal_(random_));
        raw_k_[static_cast<size_t>(t / 16 * 16 * head_size + c * 16 + t % 16)] = k;
        raw_v_[static_cast<size_t>(t * head_size + c)] = v;
        k_.push_back(FromHalf(k));
        v_.push_back(FromHalf(v));
      }
      slot_.push_back(-1);
    }
  }

  // The last raw block gets room for `tail` tokens only, as a short cache's has.
  void NarrowLastBlock(int64_t tail) {
    const int64_t head_size = layout_.head_size, n_raw = std::ssize(raw_v_) / head_size;
    const int64_t begin = (n_raw - 1) / 16 * 16 * head_size;
    for (int64_t c = 0; c < head_size; ++c)
      for (int64_t t = 0; t < tail; ++t)
        raw_k_[static_cast<size_t>(begin + c * tail + t)] = raw_k_[static_cast<size_t>(begin + c * 16 + t)];
    raw_k_.resize(static_cast<size_t>(begin + head_size * tail));
    raw_k_.resize(raw_k_.size() + static_cast<size_t>(16 - tail), 0x7e00);  // of no use, but can be read
    raw_k_.shrink_to_fit();  // so that the address sanitizer sees a read behind it
    tail_ = tail;
  }

  StreamView view() const {
    StreamView view;
    view.layout = layout_;
    view.pages = page_pointers_.data();
    view.live = live_.data();
    view.n_pages = static_cast<int64_t>(pages_.size());
    view.raw_k = raw_k_.data();
    view.raw_v = raw_v_.data();
    view.raw_tail = tail_;
    view.n_raw = layout_.head_size == 0 ? 0 : static_cast<int64_t>(raw_v_.size()) / layout_.head_size;
    return view;
  }

  // Live tokens, pages first: their values as stored, and where they are (page * 64 + slot, or -1 for raw).
  int64_t tokens() const { return static_cast<int64_t>(slot_.size()); }
  const double* k(int64_t token) const { return k_.data() + token * layout_.head_size; }
  const double* v(int64_t token) const { return v_.data() + token * layout_.head_size; }
  int64_t slot(int64_t token) const { return slot_[static_cast<size_t>(token)]; }

 private:
  double RandomK(int64_t c) {
    return offset_[static_cast<size_t>(c)] + spread_[static_cast<size_t>(c)] * normal_(random_);
  }

  void AddPage(uint64_t live) {
    const int64_t head = layout_.head_size;
    const auto size = static_cast<size_t>(head);
    std::vector<double> k(64 * size), v(64 * size);
    for (size_t i = 0; i < k.size(); ++i) {
      k[i] = RandomK(static_cast<int64_t>(i) % head);
      v[i] = normal_(random_);
    }
    std::vector<uint8_t> page(static_cast<size_t>(layout_.bytes), 0xa5);
    PackK(k, page.data());
    PackV(v, page.data());
    for (size_t t = 0; t < 64; ++t) {
      if ((live >> t & 1) == 0) continue;
      k_.insert(k_.end(), k.begin() + static_cast<int64_t>(t * size),
                k.begin() + static_cast<int64_t>((t + 1) * size));
      v_.insert(v_.end(), v.begin() + static_cast<int64_t>(t * size),
                v.begin() + static_cast<int64_t>((t + 1) * size));
      slot_.push_back(static_cast<int64_t>(pages_.size() * 64 + t));
    }
    pages_.push_back(std::move(page));
  }

  // Both replace the values by what a reader of the page gets.
  void PackK(std::vector<double>& k, uint8_t* page) {
    const auto head = static_cast<size_t>(layout_.head_size);
    const int bits = layout_.k_bits;
    std::vector<uint8_t> rows(head * 64);
    for (size_t c = 0; c < head; ++c) {
      double low = k[c], high = k[c];
      for (size_t t = 0; t < 64; ++t) {
        low = std::min(low, k[t * head + c]);
        high = std::max(high, k[t * head + c]);
      }
      const Affine a = bits == 16 ? Affine{} : Fit(low, high, bits);
      for (size_t t = 0; t < 64; ++t) {
        double& x = k[t * head + c];
        if (bits == 16) {
          const uint16_t h = ToHalf(x);
          std::memcpy(page + layout_.k_codes + (c * 64 + t) * 2, &h, 2);
          x = FromHalf(h);
        } else {
          const uint8_t code = Encode(x, a, bits);
          rows[(c / 4 * 4 + t / 16) * 64 + t % 16 * 4 + c % 4] = code;
          x = Decode(code, a);
        }
      }
      if (bits == 16) continue;
      std::memcpy(page + layout_.k_scale + c * 2, &a.scale, 2);
      std::memcpy(page + layout_.k_min + c * 2, &a.min, 2);
    }
    if (bits != 16) PackCodes(rows, bits, page + layout_.k_codes);
  }

  void PackV(std::vector<double>& v, uint8_t* page) {
    const auto head = static_cast<size_t>(layout_.head_size);
    const size_t width = head / static_cast<size_t>(layout_.v_groups);
    const int bits = layout_.v_bits;
    std::vector<uint8_t> rows(head * 64);
    for (size_t t = 0; t < 64; ++t) {
      for (size_t g = 0; g < head / width; ++g) {
        const auto begin = v.begin() + static_cast<int64_t>(t * head + g * width);
        const auto [low, high] = std::minmax_element(begin, begin + static_cast<int64_t>(width));
        const Affine a = bits == 16 ? Affine{} : Fit(*low, *high, bits);
        for (size_t c = g * width; c < (g + 1) * width; ++c) {
          double& x = v[t * head + c];
          if (bits == 16) {
            const uint16_t h = ToHalf(x);
            std::memcpy(page + layout_.v_codes + (t * head + c) * 2, &h, 2);
            x = FromHalf(h);
          } else {
            const uint8_t code = Encode(x, a, bits);
            rows[(c / 16 * 16 + t / 4) * 64 + c % 16 * 4 + t % 4] = code;
            x = Decode(code, a);
          }
        }
        if (bits == 16) continue;
        std::memcpy(page + layout_.v_scale + (g * 64 + t) * 2, &a.scale, 2);
        std::memcpy(page + layout_.v_min + (g * 64 + t) * 2, &a.min, 2);
      }
    }
    if (bits != 16) PackCodes(rows, bits, page + layout_.v_codes);
  }

  PageLayout layout_;
  std::mt19937 random_;
  std::normal_distribution<double> normal_;
  std::vector<double> spread_, offset_;  // of K's channels
  std::vector<std::vector<uint8_t>> pages_;
  std::vector<const uint8_t*> page_pointers_;
  std::vector<uint64_t> live_;
  std::vector<uint16_t> raw_k_, raw_v_;
  int64_t tail_ = 16;
  std::vector<double> k_, v_;
  std::vector<int64_t> slot_;
};

// [rows][head] normally distributed queries whose scores against such keys spread by about `gain`.
inline std::vector<float> Queries(int64_t rows, int64_t head, double gain, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> q(static_cast<size_t>(rows * head));
  for (float& x : q) x = static_cast<float>(gain / std::sqrt(static_cast<double>(head))) * normal(random);
  return q;
}

}  // namespace moend::test
