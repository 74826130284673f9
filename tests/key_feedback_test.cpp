// Rounding of keys for the queries that will meet them: factors against closed forms, and what the rounding
// saves.
#include "moend/cache/key_feedback.h"

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <cmath>
#include <cstring>
#include <random>

#include "moend/attention/rotation.h"
#include "moend/cache/codec.h"
#include "moend/cache/layer_cache.h"

namespace moend {
namespace {

// Queries whose channels move together: a few directions hold most of their length.
struct Queries {
  Queries(int64_t head_size, int64_t count, uint64_t seed) : d(head_size), n(count) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    const auto size = static_cast<std::size_t>(d);
    std::vector<float> directions(size * 6);
    for (float& x : directions) x = normal(random);
    for (int64_t i = 0; i < n; ++i) {
      std::vector<float> one(size);
      for (float& x : one) x = 0.2f * normal(random);
      for (std::size_t j = 0; j < 6; ++j) {
        const float weight = normal(random);
        for (std::size_t c = 0; c < size; ++c) one[c] += weight * directions[j * size + c];
      }
      q.insert(q.end(), one.begin(), one.end());
    }
  }
  std::vector<float> Moment() const {
    std::vector<float> m(static_cast<std::size_t>(d * d), 0.0f);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t a = 0; a < d; ++a)
        for (int64_t b = 0; b < d; ++b)
          m[static_cast<std::size_t>(a * d + b)] +=
              q[static_cast<std::size_t>(i * d + a)] * q[static_cast<std::size_t>(i * d + b)];
    return m;
  }
  // Mean square of q.(k - rounded k) over queries and the 64 tokens of a page.
  double Error(const PageLayout& layout, const std::vector<float>& k,
               const std::vector<uint8_t>& page) const {
    std::vector<float> rounded(k.size());
    UnpackKeys(layout, page.data(), rounded.data());
    double sum = 0;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t t = 0; t < kPageTokens; ++t) {
        double dot = 0;
        for (int64_t c = 0; c < d; ++c) {
          const auto at = static_cast<std::size_t>(c * kPageTokens + t);
          dot += q[static_cast<std::size_t>(i * d + c)] * (double{k[at]} - rounded[at]);
        }
        sum += dot * dot;
      }
    return sum / static_cast<double>(n * kPageTokens);
  }
  int64_t d, n;
  std::vector<float> q;
};

std::vector<float> Keys(int64_t d, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> k(static_cast<std::size_t>(d * kPageTokens));
  for (float& x : k) x = 1 + normal(random);
  return k;
}

TEST(FeedbackFactors, TwoChannelsAsByHand) {
  // inverse(M) = (c, -b; -b, a) / det: U_01 / U_00 = inverse_01 / inverse_00 = -b / c.
  const float a = 3, b = 1.5f, c = 2, damped = c + 0.01f * (a + c) / 2;
  const auto factors = FeedbackFactors(std::vector<float>{a, b, b, c}, 2, nullptr);
  ASSERT_EQ(factors.size(), 4u);
  EXPECT_NEAR(factors[1], -b / damped, 1e-5);
  EXPECT_EQ(factors[0], 0);
  EXPECT_EQ(factors[2], 0);
  EXPECT_EQ(factors[3], 0);
}

TEST(FeedbackFactors, TheyAreConditionalMeans) {
  // Given the channels behind c, the best linear guess of q_c is -sum over j of F_cj q_j; the normal
  // equations say that what is left is orthogonal to them: M_ci + sum over j > c of F_cj M_ji = 0 for i > c.
  const Queries queries(16, 200, 3);
  std::vector<float> m = queries.Moment();
  double trace = 0;
  for (std::size_t i = 0; i < 16; ++i) trace += m[i * 17];
  const auto factors = FeedbackFactors(m, 16, nullptr);
  for (std::size_t i = 0; i < 16; ++i) m[i * 17] += static_cast<float>(0.01 * trace / 16);
  for (std::size_t c = 0; c < 16; ++c)
    for (std::size_t i = c + 1; i < 16; ++i) {
      double sum = m[c * 16 + i];
      for (std::size_t j = c + 1; j < 16; ++j) sum += double{factors[c * 16 + j]} * m[j * 16 + i];
      EXPECT_NEAR(sum, 0, 1e-4 * trace) << c << " " << i;
    }
}

TEST(FeedbackFactors, MomentsWithoutMeaningGivePlainRounding) {
  const std::vector<float> zeros(64 * 64, 0.0f), bad(64 * 64, NAN), huge(64 * 64, INFINITY);
  for (const auto* moment : {&zeros, &bad, &huge})
    EXPECT_EQ(FeedbackFactors(*moment, 64, nullptr), std::vector<float>(64 * 64, 0.0f));
  for (const int bits : {8, 4, 3, 2}) {
    const PageLayout layout = *MakePageLayout(64, bits, 16);
    std::vector<uint8_t> plain(static_cast<std::size_t>(layout.bytes)), fed(plain);
    std::vector<float> k = Keys(64, 5);
    PackKeys(layout, k.data(), ~uint64_t{0}, plain.data());
    PackKeysFeedback(layout, k.data(), zeros.data(), fed.data());
    EXPECT_EQ(plain, fed) << bits;
  }
}

TEST(PackKeysFeedback, SavesMostOfTheErrorOnEveryInstructionSet) {
  for (const int64_t d : {16, 64, 80, 128, 256})
    for (const int bits : {8, 4, 3, 2}) {
      const Queries queries(d, 100, 7);
      const std::vector<float> k = Keys(d, 8), factors = FeedbackFactors(queries.Moment(), d, nullptr);
      const PageLayout layout = *MakePageLayout(d, bits, 16);
      const auto size = static_cast<std::size_t>(layout.bytes);
      std::vector<uint8_t> plain(size), reference(size), page(size);
      PackKeys(layout, k.data(), ~uint64_t{0}, plain.data());
      std::vector<float> scratch = k;
      reference::PackKeysFeedback(layout, scratch.data(), factors.data(), reference.data());
      const double before = queries.Error(layout, k, plain), after = queries.Error(layout, k, reference);
      EXPECT_LT(after, 0.6 * before) << d << " at " << bits << " bits";
      for (int64_t left = hwy::SupportedTargets(); left; left &= left - 1) {
        SCOPED_TRACE(hwy::TargetName(left & -left));
        hwy::SetSupportedTargetsForTest(left & -left);
        scratch = k;
        PackKeysFeedback(layout, scratch.data(), factors.data(), page.data());
        hwy::SetSupportedTargetsForTest(0);
        // The scales are the same; a code half way between two may fall to either side, and changes what
        // follows.
        EXPECT_EQ(std::memcmp(page.data() + layout.k_scale, reference.data() + layout.k_scale,
                              static_cast<std::size_t>(layout.k_codes - layout.k_scale)),
                  0);
        EXPECT_NEAR(queries.Error(layout, k, page), after, 0.1 * after) << d << " at " << bits << " bits";
      }
    }
}

TEST(PackKeysFeedback, KeysThatAreNoNumbersDoNoHarmToOthers) {
  const Queries queries(64, 100, 9);
  const auto factors = FeedbackFactors(queries.Moment(), 64, nullptr);
  const PageLayout layout = *MakePageLayout(64, 4, 16);
  std::vector<float> k = Keys(64, 10), back(k.size());
  k[5 * kPageTokens + 3] = NAN;
  k[6 * kPageTokens + 4] = INFINITY;
  std::vector<uint8_t> page(static_cast<std::size_t>(layout.bytes));
  std::vector<float> scratch = k;
  PackKeysFeedback(layout, scratch.data(), factors.data(), page.data());
  UnpackKeys(layout, page.data(), back.data());
  for (int64_t c = 0; c < 64; ++c)
    for (int64_t t = 0; t < kPageTokens; ++t) {
      const float x = back[static_cast<std::size_t>(c * kPageTokens + t)];
      ASSERT_TRUE(std::isfinite(x));
    }
}

// A rotated cache filled with feedback: the factors are those of the rotated channels.
TEST(PackKeysFeedback, FillsRotatedCaches) {
  constexpr int64_t d = 64, n = 4 + 64 * 3 + 28;
  const Queries queries(d, 100, 11);
  std::vector<float> balance(static_cast<std::size_t>(d), 1.0f);
  for (std::size_t c = 0; c < balance.size(); c += 2) balance[c] = 0.25f;
  const auto rotations = *KeyRotations::Create({1, d}, balance);
  const int64_t blocks = (n + kPageTokens - 1) / kPageTokens;
  std::vector<float> k(static_cast<std::size_t>(blocks * d * kPageTokens), 0.0f);
  std::mt19937_64 random(12);
  std::normal_distribution<float> normal;
  for (float& x : k) x = normal(random);
  std::vector<uint16_t> k_half(k.size()), v_half(static_cast<std::size_t>(n * d), 0);
  FloatsToHalves(k.data(), std::ssize(k), k_half.data());
  const DenseView view{d, k_half.data(), v_half.data(), n};
  const auto factors = FeedbackFactors(queries.Moment(), d, rotations->head(0));
  const auto error = [&](const float* feedback) {
    auto cache = LayerCache::Create(nullptr, {1, d}, {1.0, 2, 2}, {4, 28}, false, rotations);
    EXPECT_TRUE(cache && cache->BeginFill(n, n) && cache->FillHead(0, view, {}, nullptr, feedback) &&
                cache->EndFill());
    const StreamView stream = cache->view(0);
    double sum = 0;
    for (int64_t page = 0; page < stream.n_pages; ++page) {
      std::vector<float> back(static_cast<std::size_t>(d * kPageTokens));
      UnpackKeys(stream.layout, stream.pages[page], back.data());
      simd::RotateLanes(back.data(), d, nullptr, rotations->head(0)->inverse);
      for (int64_t t = 0; t < kPageTokens; ++t) {
        const int64_t position = 4 + page * kPageTokens + t;
        for (int64_t i = 0; i < queries.n; ++i) {
          double dot = 0;
          for (int64_t c = 0; c < d; ++c)
            dot += queries.q[static_cast<std::size_t>(i * d + c)] *
                   (double{back[static_cast<std::size_t>(c * kPageTokens + t)]} -
                    k[static_cast<std::size_t>(position / 64 * 64 * d + c * 64 + position % 64)]);
          sum += dot * dot;
        }
      }
    }
    return sum;
  };
  EXPECT_LT(error(factors.data()), 0.6 * error(nullptr));
}

}  // namespace
}  // namespace moend
