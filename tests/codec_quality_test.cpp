// What the quantizers of a page make of values: errors in the mean, not only at most (codec_test.cpp).
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "moend/base/half.h"
#include "moend/cache/codec.h"
#include "moend/cache/group.h"

namespace moend {
namespace {

constexpr int64_t kHeadSizes[] = {16, 64, 80, 128, 256};
constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Fill = std::function<float(std::mt19937_64&, int64_t token, int64_t channel)>;

// [64][head_size]
std::vector<float> Make(int64_t head_size, uint64_t seed, const Fill& fill) {
  std::mt19937_64 random(seed);
  std::vector<float> x(64 * head_size);
  for (int64_t i = 0; i < 64 * head_size; ++i) x[i] = fill(random, i / head_size, i % head_size);
  return x;
}

// Close to a normal distribution and the same with every library: a sum of 12 uniform numbers.
float Normal(std::mt19937_64& random) {
  float sum = -6.0f;
  for (int i = 0; i < 12; ++i) sum += static_cast<float>(random() >> 40) * 0x1p-24f;
  return sum;
}

// A page's K and V as they come back.
struct RoundTrip {
  std::vector<float> k, v;
  RoundTrip(const PageLayout& l, const std::vector<float>& x) : k(x.size()), v(x.size()) {
    std::vector<uint8_t> page(l.bytes);
    PackPage(l, x.data(), x.data(), ~uint64_t{0}, page.data());
    UnpackPage(l, page.data(), k.data(), v.data());
  }
};

// Sum of squared errors of the n values of x when scale and minimum span their range.
double WholeRangeError(const float* x, int64_t n, int bits) {
  float low = kInfinity, high = -kInfinity;
  for (int64_t i = 0; i < n; ++i) {
    low = std::min(low, ClampToHalfRange(x[i]));
    high = std::max(high, ClampToHalfRange(x[i]));
  }
  const int max_code = (1 << bits) - 1;
  const GroupScale g = ChooseScale(low, high, max_code);
  const float min = HalfToFloat(g.min);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint8_t code = EncodeValue(x[i], min, InverseScale(g.scale), max_code);
    sum += std::pow(double{DecodeValue(code, min, HalfToFloat(g.scale))} - ClampToHalfRange(x[i]), 2);
  }
  return sum;
}

// V may get less than its range, but only where that is better (group.h).
TEST(CodecQuality, ValuesAreNeverWorseThanOverTheirWholeRange) {
  const std::pair<std::string, Fill> fills[] = {
      {"normal", [](auto& r, int64_t, int64_t) { return Normal(r); }},
      {"constant", [](auto&, int64_t, int64_t) { return 3.14159f; }},
      {"two values", [](auto& r, int64_t, int64_t) { return r() % 2 ? -1.0f : 2.0f; }},
      {"levels", [](auto& r, int64_t, int64_t) { return 0.25f * static_cast<float>(r() % 4); }},
      {"one stands out", [](auto& r, int64_t t, int64_t c) { return c == t % 16 ? 50.0f : Normal(r); }},
      {"offset", [](auto& r, int64_t, int64_t) { return 100.0f + 0.01f * Normal(r); }},
      {"subnormal steps", [](auto& r, int64_t, int64_t) { return 1e-6f * Normal(r); }},
      {"vanishing", [](auto& r, int64_t, int64_t) { return 1e-12f * Normal(r); }},
      {"huge", [](auto& r, int64_t, int64_t) { return 30000.0f * Normal(r); }},
      {"beyond half", [](auto& r, int64_t, int64_t) { return 1e9f * Normal(r); }},
      {"mixed sizes", [](auto& r, int64_t, int64_t) {
         return Normal(r) * std::ldexp(1.0f, static_cast<int>(r() % 40) - 24);
       }}};
  std::mt19937_64 random(11);
  for (int bits : {8, 4, 3, 2}) {
    for (const auto& [name, fill] : fills) {
      for (const int64_t hs : kHeadSizes) {
        SCOPED_TRACE(name + " V" + std::to_string(bits) + " head size " + std::to_string(hs));
        const PageLayout l = *MakePageLayout(hs, 16, bits);
        const std::vector<float> x = Make(hs, random(), fill);
        const RoundTrip packed(l, x);
        const int64_t width = hs / l.v_groups;
        for (int64_t begin = 0; begin < 64 * hs; begin += width) {
          double error = 0;
          for (int64_t i = begin; i < begin + width; ++i)
            error += std::pow(double{packed.v[i]} - ClampToHalfRange(x[i]), 2);
          const double whole = WholeRangeError(x.data() + begin, width, bits);
          // Errors are compared in units of a 256th of a step.
          ASSERT_LE(error, whole * 1.02) << "group at " << begin;
          if (bits > 2) {
            ASSERT_NEAR(error, whole, whole * 1e-4) << "group at " << begin;
          }
        }
      }
    }
  }
}

TEST(CodecQuality, TwoBitValuesAreBetterThanOverTheirWholeRange) {
  const PageLayout l = *MakePageLayout(64, 2, 2);
  double error = 0, whole = 0, k_error = 0, k_whole = 0;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const std::vector<float> x = Make(64, seed, [](auto& r, int64_t, int64_t) { return Normal(r); });
    const RoundTrip packed(l, x);
    for (int64_t i = 0; i < 64 * 64; ++i) {
      error += std::pow(double{packed.v[i]} - x[i], 2);
      k_error += std::pow(double{packed.k[i]} - x[i], 2);
    }
    for (int64_t g = 0; g < 64; ++g) {
      std::vector<float> channel(64);
      for (int64_t t = 0; t < 64; ++t) channel[t] = x[t * 64 + g];
      whole += WholeRangeError(x.data() + g * 64, 64, 2);
      k_whole += WholeRangeError(channel.data(), 64, 2);
    }
  }
  EXPECT_LT(error, 0.8 * whole);
  EXPECT_NEAR(k_error, k_whole, k_whole * 1e-4);  // K keeps the values that stand out
}

// Keys as Qwen2's first layer has them: a few channels with a large bias and tens of times the magnitude of
// the others, to which queries hardly respond. A scale for every channel leaves the rest untouched; a scale
// for every token, as the largest value wants it, rounds the rest to nothing.
TEST(CodecQuality, OutlierChannelsOfKeysDoNotHarmTheOthers) {
  constexpr int64_t kHeadSize = 64;
  const auto is_outlier = [](int64_t c) { return c == 6 || c == 7 || c == 38; };
  std::mt19937_64 random(12);
  for (const float size : {10.0f, 100.0f}) {
    const std::vector<float> x = Make(kHeadSize, random(), [&](auto& r, int64_t, int64_t c) {
      return Normal(r) * (is_outlier(c) ? size / 3 : 1.0f) + (is_outlier(c) ? size : 0.0f);
    });
    for (const auto& [bits, most] : {std::pair{8, 0.02}, {4, 0.2}, {3, 0.4}, {2, 0.8}}) {
      SCOPED_TRACE("outliers of " + std::to_string(size) + " at " + std::to_string(bits) + " bit");
      const PageLayout l = *MakePageLayout(kHeadSize, bits, 16);
      const std::vector<float> by_channel = RoundTrip(l, x).k;
      std::vector<float> by_token(64 * kHeadSize);
      const float reach = static_cast<float>(1 << (bits - 1)) - 1;
      for (int64_t t = 0; t < 64; ++t) {
        const float* k = x.data() + t * kHeadSize;
        float largest = 0;
        for (int64_t c = 0; c < kHeadSize; ++c) largest = std::max(largest, std::abs(k[c]));
        for (int64_t c = 0; c < kHeadSize; ++c)
          by_token[t * kHeadSize + c] = std::nearbyint(k[c] / largest * reach) * largest / reach;
      }
      // Errors of q.k against its spread over the tokens: what moves attention.
      double spread = 0, channel_error = 0, token_error = 0;
      for (int round = 0; round < 50; ++round) {
        std::vector<double> score(64), channel_score(64), token_score(64);
        std::vector<float> q(kHeadSize);
        for (int64_t c = 0; c < kHeadSize; ++c) q[c] = Normal(random) / (is_outlier(c) ? size : 1.0f);
        for (int64_t i = 0; i < 64 * kHeadSize; ++i) {
          const double weight = q[i % kHeadSize];
          score[i / kHeadSize] += weight * x[i];
          channel_score[i / kHeadSize] += weight * by_channel[i];
          token_score[i / kHeadSize] += weight * by_token[i];
        }
        const auto variance = [](const std::vector<double>& a, const std::vector<double>& b) {
          double sum = 0, squares = 0;
          for (int i = 0; i < 64; ++i) {
            sum += a[i] - b[i];
            squares += (a[i] - b[i]) * (a[i] - b[i]);
          }
          return squares / 64 - sum * sum / (64 * 64);
        };
        spread += variance(score, std::vector<double>(64));
        channel_error += variance(score, channel_score);
        token_error += variance(score, token_score);
      }
      EXPECT_LT(std::sqrt(channel_error / spread), most);
      if (bits > 4) continue;
      EXPECT_GT(token_error, 4 * channel_error);
      if (size == 100.0f) {
        EXPECT_GT(std::sqrt(token_error / spread), 0.7);
      }
    }
  }
}

}  // namespace
}  // namespace moend
