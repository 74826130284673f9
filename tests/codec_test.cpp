#include "moend/cache/codec.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "moend/base/half.h"
#include "tests/support/each_target.h"

namespace moend {
namespace {

using test::ForEachTarget;

constexpr int64_t kHeadSizes[] = {16, 48, 64, 80, 96, 128, 192, 256};
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

double Half(const uint8_t* page, int64_t offset, int64_t i) {
  uint16_t h;
  std::memcpy(&h, page + offset + i * 2, 2);
  return HalfToFloat(h);
}

// One code of a packed part, straight from the formulas in plan/layout.h.
int CodeAt(const uint8_t* part, int64_t head_size, int bits, int64_t row, int64_t byte) {
  if (bits == 3) {
    const int low = part[row / 4 * 64 + byte] >> (row % 4 * 2) & 3;
    const int high = part[head_size / 4 * 64 + row / 8 * 64 + byte] >> (row % 8) & 1;
    return low + 4 * high;
  }
  const int64_t m = 8 / bits;
  return part[row / m * 64 + byte] >> (row % m * bits) & ((1 << bits) - 1);
}
int KCode(const PageLayout& l, const uint8_t* page, int64_t token, int64_t channel) {
  const int64_t quad = channel / 4, j = channel % 4, tv = token / 16, lane = token % 16;
  return CodeAt(page + l.k_codes, l.head_size, l.k_bits, quad * 4 + tv, lane * 4 + j);
}
int VCode(const PageLayout& l, const uint8_t* page, int64_t token, int64_t channel) {
  const int64_t quad = token / 4, j = token % 4, cv = channel / 16, lane = channel % 16;
  return CodeAt(page + l.v_codes, l.head_size, l.v_bits, cv * 16 + quad, lane * 4 + j);
}
double DecodeK(const PageLayout& l, const uint8_t* page, int64_t t, int64_t c) {
  if (l.k_bits == 16) return Half(page, l.k_codes, c * 64 + t);
  return Half(page, l.k_min, c) + Half(page, l.k_scale, c) * KCode(l, page, t, c);
}
double DecodeV(const PageLayout& l, const uint8_t* page, int64_t t, int64_t c) {
  if (l.v_bits == 16) return Half(page, l.v_codes, t * l.head_size + c);
  const int64_t group = c / (l.head_size / l.v_groups) * 64 + t;
  return Half(page, l.v_min, group) + Half(page, l.v_scale, group) * VCode(l, page, t, c);
}

struct Tokens {
  std::vector<float> k, v;  // [64][head_size]
};

using Fill = std::function<float(std::mt19937_64&, int64_t token, int64_t channel)>;

Tokens Make(int64_t head_size, uint64_t seed, const Fill& fill) {
  std::mt19937_64 random(seed);
  Tokens x{std::vector<float>(64 * head_size), std::vector<float>(64 * head_size)};
  for (int64_t i = 0; i < 64 * head_size; ++i) {
    x.k[i] = fill(random, i / head_size, i % head_size);
    x.v[i] = fill(random, i / head_size, i % head_size);
  }
  return x;
}

// Close to a normal distribution, and quick: a sum of 12 uniform numbers.
float Normal(std::mt19937_64& random) {
  float sum = -6.0f;
  for (int i = 0; i < 3; ++i)
    for (uint64_t bits = random(), j = 0; j < 4; ++j)
      sum += static_cast<float>(bits >> (16 * j) & 0xFFFF) * 0x1p-16f;
  return sum;
}

const std::vector<std::pair<std::string, Fill>>& Fills() {
  static const std::vector<std::pair<std::string, Fill>> fills = {
      {"normal", [](auto& r, int64_t, int64_t) { return Normal(r); }},
      {"zero", [](auto&, int64_t, int64_t) { return 0.0f; }},
      {"constant", [](auto&, int64_t, int64_t) { return 3.14159f; }},
      {"constant by channel", [](auto&, int64_t, int64_t c) { return -0.1f * static_cast<float>(c + 1); }},
      {"outlier channel", [](auto& r, int64_t, int64_t c) { return Normal(r) + (c == 5 ? 300.0f : 0.0f); }},
      {"outlier token", [](auto& r, int64_t t, int64_t) { return Normal(r) * (t == 9 ? 1000.0f : 1.0f); }},
      {"offset", [](auto& r, int64_t, int64_t) { return 100.0f + 0.01f * Normal(r); }},
      {"tiny", [](auto& r, int64_t, int64_t) { return 1e-7f * Normal(r); }},
      {"vanishing", [](auto& r, int64_t, int64_t) { return 1e-12f * Normal(r); }},
      {"subnormal steps", [](auto& r, int64_t, int64_t) { return 1e-4f * Normal(r); }},
      {"huge", [](auto& r, int64_t, int64_t) { return 30000.0f * Normal(r); }},
      {"beyond half", [](auto& r, int64_t, int64_t) { return 1e9f * Normal(r); }},
      {"largest", [](auto& r, int64_t, int64_t) { return r() % 2 ? kMaxHalf : -kMaxHalf; }},
      {"mixed sizes", [](auto& r, int64_t,
                         int64_t) { return Normal(r) * std::ldexp(1.0f, static_cast<int>(r() % 40) - 24); }},
  };
  return fills;
}

// Every element of live tokens within the bound of its group; every dead one with code 0.
void CheckPage(const PageLayout& l, const Tokens& x, uint64_t live, const uint8_t* page) {
  const int64_t hs = l.head_size, width = hs / l.v_groups;
  const auto is_live = [&](int64_t t) { return (live >> t & 1) != 0; };
  for (int64_t c = 0; c < hs; ++c) {
    double low = INFINITY, high = -INFINITY;
    for (int64_t t = 0; t < 64; ++t) {
      if (!is_live(t)) continue;
      low = std::min<double>(low, x.k[t * hs + c]);
      high = std::max<double>(high, x.k[t * hs + c]);
    }
    for (int64_t t = 0; t < 64; ++t) {
      if (is_live(t)) {
        const double bound = l.k_bits == 16 ? RoundTripBound(16, x.k[t * hs + c], x.k[t * hs + c])
                                            : RoundTripBound(l.k_bits, low, high);
        ASSERT_LE(std::abs(DecodeK(l, page, t, c) - x.k[t * hs + c]), bound)
            << "K token " << t << " channel " << c << " of " << x.k[t * hs + c];
      } else if (l.k_bits == 16) {
        ASSERT_EQ(DecodeK(l, page, t, c), 0);
      } else {
        ASSERT_EQ(KCode(l, page, t, c), 0);
      }
    }
  }
  for (int64_t t = 0; t < 64; ++t) {
    double low = INFINITY, high = -INFINITY;
    for (int64_t c = 0; c < hs; ++c) {
      if (c % width == 0) {
        low = INFINITY, high = -INFINITY;
        for (int64_t i = c; i < c + width; ++i) {
          low = std::min<double>(low, x.v[t * hs + i]);
          high = std::max<double>(high, x.v[t * hs + i]);
        }
      }
      if (is_live(t)) {
        const double bound = l.v_bits == 16 ? RoundTripBound(16, x.v[t * hs + c], x.v[t * hs + c])
                                            : RoundTripBound(l.v_bits, low, high);
        ASSERT_LE(std::abs(DecodeV(l, page, t, c) - x.v[t * hs + c]), bound)
            << "V token " << t << " channel " << c << " of " << x.v[t * hs + c];
      } else if (l.v_bits == 16) {
        ASSERT_EQ(DecodeV(l, page, t, c), 0);
      } else {
        ASSERT_EQ(VCode(l, page, t, c), 0);
      }
    }
  }
}

TEST(Half, RoundTripsEveryHalf) {
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const float f = HalfToFloat(static_cast<uint16_t>(h));
    if (std::isnan(f)) {
      EXPECT_GT(h & 0x7FFF, 0x7C00u);
      EXPECT_TRUE(std::isnan(HalfToFloat(FloatToHalf(f))));
    } else {
      ASSERT_EQ(FloatToHalf(f), h);
    }
  }
}

TEST(Half, DecodesByTheDefinition) {
  for (uint32_t h = 0; h < 0x7C00; ++h) {
    const int exponent = static_cast<int>(h >> 10), mantissa = static_cast<int>(h & 1023);
    const double expected =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    ASSERT_EQ(HalfToFloat(static_cast<uint16_t>(h)), expected);
    ASSERT_EQ(HalfToFloat(static_cast<uint16_t>(h | 0x8000)), -expected);
  }
}

TEST(Half, RoundsToNearestEven) {
  for (uint32_t h = 0; h + 1 < 0x7C00; ++h) {
    const float a = HalfToFloat(static_cast<uint16_t>(h)), b = HalfToFloat(static_cast<uint16_t>(h + 1));
    const float middle = (a + b) / 2;  // exact: one bit more than a half float has
    const uint32_t even = h % 2 == 0 ? h : h + 1;
    ASSERT_EQ(FloatToHalf(middle), even);
    ASSERT_EQ(FloatToHalf(-middle), even | 0x8000);
    ASSERT_EQ(FloatToHalf(std::nextafter(middle, 0.0f)), h);
    ASSERT_EQ(FloatToHalf(std::nextafter(middle, kInfinity)), h + 1);
    ASSERT_EQ(HalfBelow(middle), h);
    ASSERT_EQ(HalfBelow(-middle), (h + 1) | 0x8000);
  }
  EXPECT_EQ(FloatToHalf(65519.0f), 0x7BFF);
  EXPECT_EQ(FloatToHalf(65520.0f), 0x7C00);
  EXPECT_EQ(FloatToHalf(-1e30f), 0xFC00);
  EXPECT_EQ(FloatToHalf(1e-30f), 0);
  EXPECT_EQ(FloatToFiniteHalf(kInfinity), 0x7BFF);
  EXPECT_EQ(FloatToFiniteHalf(-1e30f), 0xFBFF);
  EXPECT_EQ(FloatToFiniteHalf(kNan), 0);
  EXPECT_EQ(FiniteHalf(0x7C00), 0x7BFF);
  EXPECT_EQ(FiniteHalf(0xFC00), 0xFBFF);
  EXPECT_EQ(FiniteHalf(0xFC01), 0);
  EXPECT_EQ(FiniteHalf(0x8123), 0x8123);
}

TEST(Codec, RoundTripIsWithinTheBound) {
  std::mt19937_64 random(3);
  for (int k_bits : kBitWidths) {
    for (const auto& [name, fill] : Fills()) {
      for (int round = 0; round < 4; ++round) {
        const int64_t hs = kHeadSizes[random() % std::size(kHeadSizes)];
        const int v_bits = kBitWidths[random() % kBitWidths.size()];
        const PageLayout l = *MakePageLayout(hs, k_bits, v_bits);
        const Tokens x = Make(hs, random(), fill);
        std::vector<uint8_t> page(l.bytes, 0xAB);
        const uint64_t live = random() % 2 ? ~uint64_t{0} : random() & random();
        PackPage(l, x.k.data(), x.v.data(), live, page.data());
        SCOPED_TRACE(name + " K" + std::to_string(k_bits) + " V" + std::to_string(v_bits));
        CheckPage(l, x, live, page.data());
        if (HasFatalFailure()) return;
      }
    }
  }
}

// The bound itself must be no wider than half a step of the ideal quantizer plus the roundings to half
// floats.
TEST(Codec, BoundIsTight) {
  std::mt19937_64 random(4);
  for (int round = 0; round < 20000; ++round) {
    double low = Normal(random) * std::ldexp(1.0, static_cast<int>(random() % 20) - 8);
    double high = Normal(random) * std::ldexp(1.0, static_cast<int>(random() % 20) - 8);
    if (low > high) std::swap(low, high);
    const double largest = std::max(std::abs(low), std::abs(high));
    for (int bits : {8, 4, 3, 2}) {
      const int max_code = (1 << bits) - 1;
      const double ideal = (high - low) / max_code / 2;
      const double rounding = std::max(std::abs(low) * 0x1p-10, 0x1p-24) / max_code / 2;
      EXPECT_GE(RoundTripBound(bits, low, high), ideal * (1 - 0x1p-11) - 0x1p-25);
      EXPECT_LE(RoundTripBound(bits, low, high), (ideal + rounding) * 1.002 + 0x1p-24 + largest * 0x1p-22);
    }
    EXPECT_LE(RoundTripBound(16, low, high), largest * 0x1p-11 + 0x1p-25);
  }
}

TEST(Codec, UsesAllCodes) {
  for (int bits : {8, 4, 3, 2}) {
    const PageLayout l = *MakePageLayout(64, bits, bits);
    const int max_code = (1 << bits) - 1;
    const Tokens x = Make(64, 5, [&](auto&, int64_t t, int64_t c) {
      return -1.0f + 0.25f * static_cast<float>((t * 7 + c * 3) % (max_code + 1));
    });
    std::vector<uint8_t> page(l.bytes);
    PackPage(l, x.k.data(), x.v.data(), ~uint64_t{0}, page.data());
    const int64_t reached = std::min(64, max_code + 1);
    for (int64_t t = 0; t < 64; ++t) {
      for (int64_t c = 0; c < 64; ++c) {
        const int64_t code = (t * 7 + c * 3) % (max_code + 1);
        if (reached == max_code + 1) {
          ASSERT_EQ(KCode(l, page.data(), t, c), code);
          ASSERT_EQ(VCode(l, page.data(), t, c), code);
        }
        ASSERT_NEAR(DecodeK(l, page.data(), t, c), x.k[t * 64 + c], RoundTripBound(bits, -1, 63));
      }
    }
  }
}

TEST(Codec, UnpackGivesWhatThePageSays) {
  std::mt19937_64 random(6);
  for (int64_t hs : kHeadSizes) {
    for (int k_bits : kBitWidths) {
      for (int v_bits : kBitWidths) {
        const PageLayout l = *MakePageLayout(hs, k_bits, v_bits);
        const Tokens x = Make(hs, random(), Fills()[0].second);
        std::vector<uint8_t> page(l.bytes);
        PackPage(l, x.k.data(), x.v.data(), random() | random(), page.data());
        std::vector<float> k(64 * hs), v(64 * hs), only_k(64 * hs), only_v(64 * hs);
        UnpackPage(l, page.data(), k.data(), v.data());
        for (int64_t t = 0; t < 64; ++t) {
          for (int64_t c = 0; c < hs; ++c) {
            ASSERT_EQ(k[t * hs + c], static_cast<float>(DecodeK(l, page.data(), t, c)));
            ASSERT_EQ(v[t * hs + c], static_cast<float>(DecodeV(l, page.data(), t, c)));
          }
        }
        UnpackPage(l, page.data(), only_k.data(), nullptr);
        UnpackPage(l, page.data(), nullptr, only_v.data());
        EXPECT_EQ(only_k, k);
        EXPECT_EQ(only_v, v);
      }
    }
  }
}

TEST(Codec, EveryInstructionSetGivesTheBytesOfTheReference) {
  ForEachTarget([] {
    std::mt19937_64 random(10);
    for (int bits : kBitWidths) {
      for (const auto& [name, fill] : Fills()) {
        for (int round = 0; round < 2; ++round) {
          const int64_t hs = kHeadSizes[random() % std::size(kHeadSizes)];
          SCOPED_TRACE(name + " bits " + std::to_string(bits) + " head size " + std::to_string(hs));
          const PageLayout l = *MakePageLayout(hs, bits, bits);
          Tokens x = Make(hs, random(), fill);
          if (random() % 4 == 0) {
            for (auto* side : {&x.k, &x.v})
              for (float bad : {kNan, kInfinity, -kInfinity, -0.0f}) (*side)[random() % side->size()] = bad;
          }
          const uint64_t live = random() % 2 ? ~uint64_t{0} : random() % 8 ? random() : 0;
          std::vector<uint8_t> page(l.bytes, 0xCD), expected(l.bytes, 0xCD);
          PackKeys(l, x.k.data(), live, page.data());
          PackValues(l, x.v.data(), live, page.data());
          reference::PackKeys(l, x.k.data(), live, expected.data());
          reference::PackValues(l, x.v.data(), live, expected.data());
          ASSERT_EQ(page, expected);
          std::vector<float> values(64 * hs, -1), expected_values(64 * hs, -2);
          UnpackKeys(l, page.data(), values.data());
          reference::UnpackKeys(l, page.data(), expected_values.data());
          ASSERT_EQ(values, expected_values);
          UnpackValues(l, page.data(), values.data());
          reference::UnpackValues(l, page.data(), expected_values.data());
          ASSERT_EQ(values, expected_values);
        }
      }
    }
  });
}

TEST(Codec, EveryInstructionSetConvertsHalvesAlike) {
  std::vector<uint16_t> halves(0x10000 + 5);
  for (std::size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  std::vector<float> expected(halves.size());
  reference::HalvesToFloats(halves.data(), std::ssize(halves), expected.data());
  // Values around every half float and every middle between two.
  std::vector<float> floats = {kNan,   kInfinity, -kInfinity, 1e30f,    -1e30f,
                               1e-30f, 65519.0f,  65520.0f,   -70000.0f};
  for (uint32_t h = 0; h + 1 < 0x7C00; ++h) {
    const float a = HalfToFloat(static_cast<uint16_t>(h)), b = HalfToFloat(static_cast<uint16_t>(h + 1));
    for (float f :
         {a, (a + b) / 2, std::nextafter((a + b) / 2, 0.0f), std::nextafter((a + b) / 2, kInfinity)}) {
      floats.push_back(f);
      floats.push_back(-f);
    }
  }
  std::vector<uint16_t> expected_halves(floats.size());
  reference::FloatsToHalves(floats.data(), std::ssize(floats), expected_halves.data());
  ForEachTarget([&] {
    std::vector<float> to_floats(halves.size());
    HalvesToFloats(halves.data(), std::ssize(halves), to_floats.data());
    for (std::size_t i = 0; i < halves.size(); ++i) {
      // NaN has many bit patterns.
      if (!std::isnan(expected[i]) || !std::isnan(to_floats[i])) {
        ASSERT_EQ(std::bit_cast<uint32_t>(to_floats[i]), std::bit_cast<uint32_t>(expected[i])) << i;
      }
    }
    std::vector<uint16_t> to_halves(floats.size());
    FloatsToHalves(floats.data(), std::ssize(floats), to_halves.data());
    for (std::size_t i = 0; i < floats.size(); ++i) ASSERT_EQ(to_halves[i], expected_halves[i]) << floats[i];
    for (int64_t n = 0; n < 40; ++n) {
      std::vector<float> some(n + 1, 77.0f);
      HalvesToFloats(halves.data() + 100, n, some.data());
      for (int64_t i = 0; i < n; ++i) ASSERT_EQ(some[i], expected[100 + i]);
      ASSERT_EQ(some[n], 77.0f);
    }
  });
}

TEST(Codec, PackingWhatWasUnpackedChangesNothing) {
  std::mt19937_64 random(7);
  for (int64_t hs : {64, 80, 128}) {
    for (int bits : kBitWidths) {
      const PageLayout l = *MakePageLayout(hs, bits, bits);
      const Tokens x = Make(hs, random(), Fills()[0].second);
      std::vector<uint8_t> once(l.bytes, 0), twice(l.bytes, 0);
      std::vector<float> k(64 * hs), v(64 * hs);
      PackPage(l, x.k.data(), x.v.data(), ~uint64_t{0}, once.data());
      UnpackPage(l, once.data(), k.data(), v.data());
      PackPage(l, k.data(), v.data(), ~uint64_t{0}, twice.data());
      EXPECT_EQ(once, twice) << bits;
    }
  }
}

TEST(Codec, BadValuesPoisonNothing) {
  for (int bits : kBitWidths) {
    const PageLayout l = *MakePageLayout(64, bits, bits);
    Tokens x = Make(64, 8, Fills()[0].second);
    for (auto* side : {&x.k, &x.v}) {
      (*side)[3 * 64 + 7] = kNan;
      (*side)[20 * 64 + 9] = kInfinity;
      (*side)[40 * 64 + 11] = -kInfinity;
    }
    std::vector<uint8_t> page(l.bytes);
    PackPage(l, x.k.data(), x.v.data(), ~uint64_t{0}, page.data());
    std::vector<float> k(64 * 64), v(64 * 64);
    UnpackPage(l, page.data(), k.data(), v.data());
    Tokens mended = x;
    for (auto* side : {&mended.k, &mended.v})
      for (float& value : *side) value = ClampToHalfRange(value);
    CheckPage(l, mended, ~uint64_t{0}, page.data());
    for (float value : k) ASSERT_TRUE(std::isfinite(value) && std::abs(value) <= 65536.0f * 1.01f);
    for (float value : v) ASSERT_TRUE(std::isfinite(value) && std::abs(value) <= 65536.0f * 1.01f);
    // Channels and tokens without a bad value are as before.
    EXPECT_NEAR(k[0], x.k[0], RoundTripBound(bits, -5, 5));
  }
}

TEST(Codec, DeadSlotsDoNotTouchTheScales) {
  std::mt19937_64 random(9);
  for (int bits : {8, 4, 3, 2}) {
    const PageLayout l = *MakePageLayout(96, bits, bits);
    Tokens x = Make(96, random(), Fills()[0].second);
    const uint64_t live = random();
    std::vector<uint8_t> page(l.bytes, 0), other(l.bytes, 0);
    PackPage(l, x.k.data(), x.v.data(), live, page.data());
    for (int64_t t = 0; t < 64; ++t)
      for (int64_t c = 0; c < 96; ++c)
        if (!(live >> t & 1)) x.k[t * 96 + c] = x.v[t * 96 + c] = t % 2 ? kNan : 1e6f;
    PackPage(l, x.k.data(), x.v.data(), live, other.data());
    EXPECT_EQ(page, other);
    PackPage(l, x.k.data(), x.v.data(), 0, page.data());
    EXPECT_EQ(page, std::vector<uint8_t>(l.bytes, 0));
  }
}

}  // namespace
}  // namespace moend
