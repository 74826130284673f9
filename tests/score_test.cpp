#include "moend/score/scorer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "moend/attention/attention.h"
#include "moend/base/half.h"
#include "moend/base/ledger.h"
#include "moend/cache/layer_cache.h"

namespace moend {
namespace {

// One KV head with the prefill's scratch, the same tokens in a cache, and queries.
class Head {
 public:
  Head(int64_t n, int64_t d, int64_t group, int64_t query_tokens, uint64_t seed)
      : n_(n), d_(d), group_(group), random_(seed) {
    k_.resize(static_cast<std::size_t>(RoundUp(std::max<int64_t>(n, 1), kPageTokens) * d), 0);
    v_.resize(static_cast<std::size_t>(n * d), 0);
    q_.resize(static_cast<std::size_t>(query_tokens * group * d), 0.0f);
    std::normal_distribution<float> normal;
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t c = 0; c < d; ++c) {
        K(t, c, normal(random_));
        v_[static_cast<std::size_t>(t * d + c)] = FloatToHalf(normal(random_));
      }
    }
    for (float& x : q_) x = normal(random_) / std::sqrt(static_cast<float>(d));
  }

  void K(int64_t t, int64_t c, float x) {
    k_[static_cast<std::size_t>((t / kPageTokens * d_ + c) * kPageTokens + t % kPageTokens)] = FloatToHalf(x);
  }
  float K(int64_t t, int64_t c) const {
    return HalfToFloat(
        k_[static_cast<std::size_t>((t / kPageTokens * d_ + c) * kPageTokens + t % kPageTokens)]);
  }
  void SetKey(int64_t t, const std::vector<float>& key) {
    for (int64_t c = 0; c < d_; ++c) K(t, c, key[static_cast<std::size_t>(c)]);
  }
  void SetValue(int64_t t, float x) {
    std::fill_n(v_.begin() + static_cast<std::ptrdiff_t>(t * d_), d_, FloatToHalf(x));
  }
  void SetQueries(const std::vector<float>& query) {
    for (std::size_t i = 0; i < q_.size(); ++i) q_[i] = query[i % static_cast<std::size_t>(d_)];
  }
  std::vector<float>& queries() { return q_; }
  std::vector<float>& accumulated() { return accumulated_; }

  DenseView view() const { return {d_, k_.data(), v_.data(), n_}; }
  QueryRows rows() const { return {q_.data(), static_cast<int64_t>(q_.size()) / d_, group_}; }

  std::vector<float> Prefill(const std::string& name) {
    const auto scorer = MakeScorer(name);
    EXPECT_TRUE(scorer);
    std::vector<float> scores(static_cast<std::size_t>(n_), std::nanf(""));
    PrefillScoreInput in;
    in.kv = view();
    in.observed = rows();
    in.accumulated = accumulated_.empty() ? nullptr : accumulated_.data();
    auto workspace = Buffer<float>::Create(nullptr, WorkspaceFloats(d_, std::max<int64_t>(1, rows().rows)));
    EXPECT_TRUE(workspace);
    in.workspace = workspace->data();
    (*scorer)->ScorePrefill(in, scores);
    return scores;
  }

  // Scores of the paged tokens by position, NaN elsewhere, of a cache that holds the tokens `kept` (empty:
  // all).
  std::vector<float> Cached(const std::string& name, const Expert& expert, const Protected& guard,
                            const std::vector<uint32_t>& kept = {}) {
    const auto scorer = MakeScorer(name);
    EXPECT_TRUE(scorer);
    auto cache = LayerCache::Create(std::make_shared<Ledger>(), {1, d_}, expert, guard,
                                    (*scorer)->needs().accumulated);
    EXPECT_TRUE(cache);
    const DenseView dense = view();
    const float* accumulated = accumulated_.empty() ? nullptr : accumulated_.data();
    const auto filled = cache->Fill({&dense, 1}, {&kept, 1}, {&accumulated, 1});
    EXPECT_TRUE(filled) << filled.error().message;
    CachedScoreInput in;
    in.kv = cache->view(0);
    in.positions = cache->positions(0);
    in.observed = rows();
    in.accumulated = cache->scores(0);
    in.tokens_seen = n_;
    auto workspace = Buffer<float>::Create(nullptr, WorkspaceFloats(d_, std::max<int64_t>(1, rows().rows)));
    EXPECT_TRUE(workspace);
    in.workspace = workspace->data();
    std::vector<float> slots(static_cast<std::size_t>(in.kv.n_pages * kPageTokens), std::nanf(""));
    (*scorer)->ScoreCached(in, slots);
    std::vector<float> scores(static_cast<std::size_t>(n_), std::nanf(""));
    std::size_t next = 0;
    for (int64_t p = 0; p < in.kv.n_pages; ++p) {
      for (int64_t t = 0; t < kPageTokens; ++t) {
        if (in.kv.live[p] >> t & 1)
          scores[in.positions[next++]] = slots[static_cast<std::size_t>(p * kPageTokens + t)];
      }
    }
    return scores;
  }

 private:
  int64_t n_, d_, group_;
  std::mt19937_64 random_;
  std::vector<uint16_t> k_, v_;
  std::vector<float> q_, accumulated_;
};

int64_t Best(const std::vector<float>& scores) {
  int64_t best = -1;
  for (std::size_t t = 0; t < scores.size(); ++t) {
    if (!std::isnan(scores[t]) && (best < 0 || scores[t] > scores[static_cast<std::size_t>(best)]))
      best = static_cast<int64_t>(t);
  }
  return best;
}

// Column sums of softmax attention by definition, for the newest `tokens` query tokens.
std::vector<double> SlowSums(const Head& head, int64_t tokens) {
  const DenseView kv = head.view();
  const QueryRows q = head.rows();
  std::vector<double> sums(static_cast<std::size_t>(kv.n_tokens), 0.0);
  for (int64_t r = q.rows - tokens * q.group; r < q.rows; ++r) {
    const int64_t seen = kv.n_tokens - (q.rows - 1 - r) / q.group;
    std::vector<double> p(static_cast<std::size_t>(seen));
    double sum = 0;
    for (int64_t t = 0; t < seen; ++t) {
      double s = 0;
      for (int64_t c = 0; c < kv.head_size; ++c)
        s += static_cast<double>(q.q[r * kv.head_size + c]) * head.K(t, c);
      sum += p[static_cast<std::size_t>(t)] = std::exp(s);
    }
    for (std::size_t t = 0; t < p.size(); ++t) sums[t] += p[t] / sum;
  }
  return sums;
}

TEST(ScorerTest, NamesAreListedWhenOneIsUnknown) {
  const auto names = ScorerNames();
  for (const char* name : {"reconstruct", "streaming", "snapkv", "h2o", "tova", "keydiff", "expected", "trig",
                           "knorm", "random"}) {
    EXPECT_NE(std::find(names.begin(), names.end(), name), names.end()) << name;
  }
  for (const auto& name : names) EXPECT_EQ((*MakeScorer(name))->name(), name);
  const auto unknown = MakeScorer("best");
  ASSERT_FALSE(unknown);
  EXPECT_EQ(unknown.error().code, ErrorCode::kNotFound);
  for (const auto& name : names) EXPECT_NE(unknown.error().message.find(name), std::string::npos);
}

TEST(ScorerTest, OneOfAListIsForEachLayer) {
  const auto scorer = MakeScorer("keydiff,expected,h2o");
  ASSERT_TRUE(scorer) << scorer.error().message;
  EXPECT_EQ((*scorer)->name(), "keydiff,expected,h2o");
  EXPECT_EQ((*scorer)->layers(), 3);
  const char* names[] = {"keydiff", "expected", "h2o"};
  ScorerNeeds all;
  for (int64_t l = 0; l < 3; ++l) {
    EXPECT_EQ((*scorer)->of_layer(l).name(), names[l]);
    all = Union(all, (*MakeScorer(names[l]))->needs());
  }
  EXPECT_EQ((*scorer)->needs().observed_queries, all.observed_queries);
  EXPECT_TRUE((*scorer)->needs().accumulated);
  EXPECT_EQ((*scorer)->needs().query_stats, all.query_stats);
  EXPECT_EQ(ShortScorerName("keydiff,expected,h2o"), "mixed");
  // A single one is for any layer.
  const auto one = MakeScorer("h2o");
  EXPECT_EQ((*one)->layers(), 0);
  EXPECT_EQ(&(*one)->of_layer(7), one->get());
  EXPECT_EQ(ShortScorerName("h2o"), "h2o");
  for (const char* wrong : {"keydiff,best", "keydiff,", ",keydiff", ","})
    EXPECT_EQ(MakeScorer(wrong).error().code, ErrorCode::kNotFound) << wrong;
}

TEST(ScorerTest, ScoresAreFiniteForAnyLength) {
  for (const auto& name : ScorerNames()) {
    for (const int64_t n : {0, 1, 2, 31, 32, 33, 63, 64, 65, 200}) {
      for (const int64_t query_tokens : {0, 1, 32, 128}) {
        Head head(n, 64, 3, std::min(n, query_tokens), 1);
        head.accumulated().assign(static_cast<std::size_t>(n), 0.5f);
        const auto scores = head.Prefill(name);
        for (std::size_t t = 0; t < scores.size(); ++t)
          ASSERT_TRUE(std::isfinite(scores[t])) << name << " n " << n << " t " << t;
      }
    }
  }
}

TEST(ScorerTest, NotANumberIsTheLeastImportant) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  for (const auto& name : ScorerNames()) {
    Head head(100, 32, 1, 40, 2);
    head.accumulated().assign(100, 1.0f);
    head.accumulated()[7] = kNan;
    for (float& x : head.queries()) x = kNan;
    for (const float s : head.Prefill(name)) EXPECT_TRUE(std::isfinite(s)) << name;
  }
}

TEST(ScorerTest, PlantedKeyIsFound) {
  // All queries look along one axis; one key lies on it.
  const int64_t n = 700, planted = 333, d = 64;
  std::vector<float> axis(static_cast<std::size_t>(d), 0.0f);
  axis[5] = 1;
  for (const char* name : {"snapkv", "tova", "expected"}) {
    Head head(n, d, 2, 128, 3);
    std::vector<float> key = axis;
    key[5] = 20;
    head.SetKey(planted, key);
    head.SetQueries(axis);
    auto prefill = head.Prefill(name);
    if (std::string(name) == "snapkv") {
      // Its window is above everything, and the three neighbours on each side share the maximum.
      EXPECT_GT(*std::min_element(prefill.end() - 32, prefill.end()),
                *std::max_element(prefill.begin(), prefill.end() - 32));
      std::fill(prefill.end() - 32, prefill.end(), 0.0f);
      for (int64_t t = planted - 3; t <= planted + 3; ++t)
        EXPECT_EQ(prefill[static_cast<std::size_t>(t)], prefill[planted]);
      EXPECT_LT(prefill[planted - 4], prefill[planted]);
      EXPECT_LT(prefill[planted + 4], prefill[planted]);
      EXPECT_EQ(Best(prefill), planted - 3);
    } else {
      EXPECT_EQ(Best(prefill), planted) << name;
    }
    for (const int bits : {16, 8, 4, 2}) {
      const auto cached = head.Cached(name, {1, bits, bits}, {});
      const int64_t best = Best(cached);
      EXPECT_LE(std::abs(best - planted), std::string(name) == "snapkv" ? 3 : 0) << name << " " << bits;
    }
  }
}

TEST(ScorerTest, SnapKvIsThePooledAttention) {
  for (const int64_t n : {5, 40, 64, 131, 300}) {
    Head head(n, 64, 2, std::min<int64_t>(n, 32), 4);
    const auto sums = SlowSums(head, std::min<int64_t>(n, 32));
    const auto scores = head.Prefill("snapkv");
    for (int64_t t = 0; t < n - 32; ++t) {
      double expected = 0;
      for (int64_t o = std::max<int64_t>(0, t - 3); o <= std::min(n - 33, t + 3); ++o)
        expected = std::max(expected, sums[static_cast<std::size_t>(o)]);
      EXPECT_NEAR(scores[static_cast<std::size_t>(t)], expected, 1e-3 * expected + 1e-6) << n << " " << t;
    }
  }
}

TEST(ScorerTest, TovaIsTheNewestQuerysAttention) {
  Head head(150, 64, 3, 32, 5);
  const auto sums = SlowSums(head, 1);
  const auto scores = head.Prefill("tova");
  double total = 0;
  for (std::size_t t = 0; t < sums.size(); ++t) {
    EXPECT_NEAR(scores[t], sums[t], 1e-3 * sums[t] + 1e-6);
    total += scores[t];
  }
  EXPECT_NEAR(total, 3, 1e-3) << "one for each query head";
}

TEST(ScorerTest, CachedScoresAgreeWithPrefillScores) {
  // With 16 bits a cache holds the same numbers; SnapKV's pools end at the pages.
  for (const char* name : {"streaming", "random", "tova", "keydiff", "knorm", "h2o"}) {
    Head head(500, 64, 2, 1, 6);
    for (int t = 0; t < 500; ++t) head.accumulated().push_back(static_cast<float>(t * 37 % 101));
    const auto prefill = head.Prefill(name);
    const auto cached = head.Cached(name, {1, 16, 16}, {});
    int paged = 0;
    for (std::size_t t = 0; t < prefill.size(); ++t) {
      if (std::isnan(cached[t])) continue;
      ++paged;
      EXPECT_NEAR(cached[t], prefill[t], 2e-3 * std::abs(prefill[t]) + 1e-6) << name << " " << t;
    }
    EXPECT_GE(paged, 384) << name;
  }
}

TEST(ScorerTest, CachedScoresFollowPositionsAcrossGaps) {
  // Every third token, so that page slots and positions differ.
  Head head(1200, 64, 1, 8, 7);
  const Protected guard{4, 28};
  std::vector<uint32_t> kept = {0, 1, 2, 3};
  const int64_t count = KeptTokens(0.3, guard, 1200);
  for (uint32_t t = 6; static_cast<int64_t>(kept.size()) < count - 28; t += 3) kept.push_back(t);
  for (uint32_t t = 1200 - 28; t < 1200; ++t) kept.push_back(t);
  const auto streaming = head.Cached("streaming", {0.3, 4, 4}, guard, kept);
  int paged = 0;
  for (std::size_t t = 0; t < streaming.size(); ++t) {
    if (std::isnan(streaming[t])) continue;
    ++paged;
    EXPECT_EQ(streaming[t], static_cast<float>(t));
  }
  EXPECT_EQ(paged, KeptPages(0.3, guard, 1200) * kPageTokens);

  // SnapKV shares a maximum only with tokens at most three positions away: here one on each side.
  const auto sums = head.Cached("tova", {0.3, 4, 4}, guard, kept);  // sums of the newest query
  Head single = head;
  single.queries().assign(head.queries().end() - 64, head.queries().end());
  const auto pooled = single.Cached("snapkv", {0.3, 4, 4}, guard, kept);
  for (std::size_t t = 30; t < 300; t += 3) {
    const float expected = std::max({sums[t - 3], sums[t], sums[t + 3]});
    EXPECT_FLOAT_EQ(pooled[t], expected) << t;
  }
}

TEST(ScorerTest, KeyDiffPrefersTheOddOneOut) {
  // All keys alike but one that points elsewhere, one that points the other way, and one of zeros.
  Head head(200, 32, 1, 0, 8);
  std::vector<float> alike(32, 0.5f), odd(32, 0.0f), opposite(32, -3.0f);
  odd[3] = 2;
  for (int64_t t = 0; t < 200; ++t) head.SetKey(t, alike);
  head.SetKey(50, odd);
  head.SetKey(120, opposite);
  head.SetKey(70, std::vector<float>(32, 0.0f));
  const auto scores = head.Prefill("keydiff");
  EXPECT_EQ(Best(scores), 120);
  EXPECT_NEAR(scores[120], 1, 1e-3);
  EXPECT_NEAR(scores[0], -1, 1e-3);
  EXPECT_EQ(scores[70], 0);
  EXPECT_NEAR(scores[50], -1 / std::sqrt(32.0), 0.02) << "minus the cosine of odd and alike";
  EXPECT_EQ(scores[10], scores[11]) << "duplicates score alike";
}

TEST(ScorerTest, KeyNormPrefersShortKeys) {
  Head head(100, 16, 1, 0, 9);
  for (int64_t t = 0; t < 100; ++t)
    head.SetKey(t, std::vector<float>(16, static_cast<float>(1 + (t * 7) % 100)));
  const auto scores = head.Prefill("knorm");
  EXPECT_EQ(Best(scores), 0);
  for (int64_t t = 0; t < 100; ++t)
    EXPECT_NEAR(scores[static_cast<std::size_t>(t)], -4.0 * static_cast<double>(1 + (t * 7) % 100), 1e-2);
}

TEST(ScorerTest, H2oIsWhatWasAccumulated) {
  Head head(90, 16, 1, 0, 10);
  for (int t = 0; t < 90; ++t) head.accumulated().push_back(static_cast<float>(t % 13));
  EXPECT_EQ(head.Prefill("h2o"), head.accumulated());
  EXPECT_TRUE((*MakeScorer("h2o"))->needs().accumulated);
}

TEST(ScorerTest, ExpectedAttentionIsTheNormalMean) {
  // By definition, in float64.
  const int64_t n = 120, d = 16, tokens = 50;
  Head head(n, d, 2, tokens, 11);
  head.SetValue(60, 9);
  const QueryRows q = head.rows();
  std::vector<double> expected(static_cast<std::size_t>(n), 0.0);
  for (int64_t g = 0; g < 2; ++g) {
    std::vector<double> z;
    for (int64_t t = 0; t < n; ++t) {
      double logit = 0;
      for (int64_t c = 0; c < d; ++c) {
        double mean = 0, square = 0;
        for (int64_t i = 0; i < tokens; ++i) mean += q.q[(i * 2 + g) * d + c];
        mean /= static_cast<double>(tokens);
        for (int64_t i = 0; i < tokens; ++i) square += std::pow(q.q[(i * 2 + g) * d + c] - mean, 2);
        logit += mean * head.K(t, c) + 0.5 * square / static_cast<double>(tokens) * std::pow(head.K(t, c), 2);
      }
      z.push_back(std::exp(logit));
    }
    double sum = 0;
    for (const double x : z) sum += x;
    for (std::size_t t = 0; t < z.size(); ++t) {
      double length = 0;
      for (int64_t c = 0; c < d; ++c)
        length += std::pow(HalfToFloat(head.view().v[static_cast<int64_t>(t) * d + c]), 2);
      expected[t] += z[t] / sum * std::sqrt(length);
    }
  }
  const auto scores = head.Prefill("expected");
  for (std::size_t t = 0; t < scores.size(); ++t) EXPECT_NEAR(scores[t], expected[t], 1e-4 * expected[t]);
}

TEST(ScorerTest, RandomIsSpreadAndStable) {
  Head a(1000, 16, 1, 0, 12), b(1000, 16, 1, 0, 13);
  const auto scores = a.Prefill("random");
  EXPECT_EQ(scores, b.Prefill("random"));
  EXPECT_GT(std::set<float>(scores.begin(), scores.end()).size(), 990u);
  double mean = 0;
  for (const float s : scores) {
    EXPECT_GE(s, 0);
    EXPECT_LT(s, 1);
    mean += s / 1000;
  }
  EXPECT_NEAR(mean, 0.5, 0.05);
}

TEST(SelectKeptTest, EqualsSorting) {
  std::mt19937 random(14);
  for (int round = 0; round < 300; ++round) {
    const std::size_t n = random() % 200;
    std::vector<float> scores(n);
    // Few distinct values, so that ties decide.
    for (float& s : scores) s = static_cast<float>(static_cast<int>(random() % 7) - 3);
    const Protected guard{static_cast<int64_t>(random() % 9), static_cast<int64_t>(random() % 30)};
    const auto total = static_cast<int64_t>(n);
    const int64_t least = std::min(total, guard.sinks + guard.window);
    const int64_t count = least + (total > least ? static_cast<int64_t>(random()) % (total - least + 1) : 0);

    std::vector<uint32_t> rest, expected;
    for (uint32_t t = 0; t < n; ++t) {
      const bool safe = t < guard.sinks || t + guard.window >= total;
      (safe ? expected : rest).push_back(t);
    }
    std::sort(rest.begin(), rest.end(),
              [&](uint32_t a, uint32_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a > b; });
    rest.resize(static_cast<std::size_t>(count) - expected.size());
    expected.insert(expected.end(), rest.begin(), rest.end());
    std::sort(expected.begin(), expected.end());
    EXPECT_EQ(SelectKept(scores, guard, count), expected) << "round " << round;
  }
}

TEST(SelectKeptTest, EdgeCases) {
  const Protected guard{2, 3};
  EXPECT_TRUE(SelectKept({}, guard, 10).empty());
  EXPECT_EQ(SelectKept(std::vector<float>{1}, guard, 1), std::vector<uint32_t>{0});
  EXPECT_EQ(SelectKept(std::vector<float>(4), guard, 100).size(), 4u);
  EXPECT_EQ(SelectKept(std::vector<float>(10), guard, 0), (std::vector<uint32_t>{0, 1, 7, 8, 9}));
  const float nan = std::nanf(""), inf = HUGE_VALF;
  const std::vector<float> scores = {0, nan, -inf, -1, inf, -0.0f, 0.0f, nan};
  EXPECT_EQ(SelectKept(scores, {0, 0}, 1), std::vector<uint32_t>{4});
  EXPECT_EQ(SelectKept(scores, {0, 0}, 2), (std::vector<uint32_t>{4, 6}));
  EXPECT_EQ(SelectKept(scores, {0, 0}, 3), (std::vector<uint32_t>{4, 5, 6})) << "-0 and 0 are equal";
  EXPECT_EQ(SelectKept(scores, {0, 0}, 6), (std::vector<uint32_t>{0, 2, 3, 4, 5, 6})) << "NaN goes first";
}

}  // namespace
}  // namespace moend
