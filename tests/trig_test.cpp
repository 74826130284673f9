// The trigonometric scorer and all that feeds it: RoPE's rates, the statistics of queries, their files.
#include <ggml-cpu.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <complex>
#include <nlohmann/json.hpp>
#include <random>

#include "moend/base/half.h"
#include "moend/calibrate/calibrate.h"
#include "moend/calibrate/query_tap.h"
#include "moend/engine/engine.h"
#include "moend/model/rope.h"
#include "moend/plan/plan.h"
#include "moend/score/scorer.h"
#include "moend/solve/solve.h"
#include "tests/support/tiny_engine.h"

namespace moend {
namespace {

using Complex = std::complex<double>;

std::shared_ptr<const Model> Load(const test::TestModelOptions& options) {
  const test::TempDir dir;
  const std::string path = dir / "m.gguf";
  EXPECT_TRUE(test::WriteTestModel(options, path));
  auto model = Model::Load(path);
  EXPECT_TRUE(model) << model.error().message;
  return model ? *model : nullptr;
}

// x turned to position `at` by ggml.
std::vector<float> Turned(const Model& model, const std::vector<float>& x, int32_t at) {
  const HyperParams& hp = model.hparams();
  const RopeParams& r = hp.rope;
  std::unique_ptr<ggml_context, decltype(&ggml_free)> ctx(ggml_init({1 << 20, nullptr, false}), ggml_free);
  ggml_tensor* t = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, hp.head_size, 1, 1);
  ggml_tensor* position = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, 1);
  std::copy(x.begin(), x.end(), static_cast<float*>(t->data));
  *static_cast<int32_t*>(position->data) = at;
  ggml_tensor* y = ggml_rope_ext(ctx.get(), t, position, model.weights().layers[0].rope_freqs, r.n_dims,
                                 r.mode, r.n_ctx_orig, r.freq_base, r.freq_scale, r.ext_factor, r.attn_factor,
                                 r.beta_fast, r.beta_slow);
  ggml_cgraph* graph = ggml_new_graph(ctx.get());
  ggml_build_forward_expand(graph, y);
  EXPECT_EQ(ggml_graph_compute_with_ctx(ctx.get(), graph, 1), GGML_STATUS_SUCCESS);
  return {static_cast<float*>(y->data), static_cast<float*>(y->data) + hp.head_size};
}

TEST(Rope, RatesAreGgmls) {
  test::TestModelOptions plain, qwen, linear, yarn, factors;
  qwen.architecture = "qwen2";
  qwen.biases = true;
  linear.rope_scaling = "linear";
  linear.rope_factor = 4;
  yarn.rope_scaling = "yarn";
  yarn.rope_factor = 8;
  yarn.rope_original_context = 512;
  factors.rope_factors = true;
  for (const auto& options : {plain, qwen, linear, yarn, factors}) {
    const auto model = Load(options);
    ASSERT_TRUE(model);
    const int64_t d = model->hparams().head_size;
    const auto pairs = RopePairs(*model, 0);
    ASSERT_EQ(std::ssize(pairs), d / 2);
    std::vector<int> seen(static_cast<std::size_t>(d), 0);
    for (const RopePair& pair : pairs) {
      ++seen[static_cast<std::size_t>(pair.first)];
      ++seen[static_cast<std::size_t>(pair.second)];
    }
    EXPECT_EQ(seen, std::vector<int>(static_cast<std::size_t>(d), 1));
    std::vector<float> x(static_cast<std::size_t>(d));
    for (std::size_t c = 0; c < x.size(); ++c) x[c] = 1.0f + 0.1f * static_cast<float>(c);
    const auto start = Turned(*model, x, 0);  // a constant scale may apply to all
    for (const int32_t at : {1, 7, 300, 3000}) {
      const auto turned = Turned(*model, x, at);
      for (const RopePair& p : pairs) {
        const auto of = [&](const std::vector<float>& v) {
          return Complex(v[static_cast<std::size_t>(p.first)], v[static_cast<std::size_t>(p.second)]);
        };
        const Complex expected = of(start) * std::polar(1.0, p.rate * at);
        EXPECT_NEAR(std::abs(of(turned) - expected), 0, 2e-3 * std::abs(expected))
            << options.rope_scaling << " channel " << p.first << " at " << at;
      }
    }
  }
}

class NoAttention : public AttentionHook {
 public:
  void Store(int64_t, const float*, const float*, const float*, int64_t) override {}
  void Attend(int64_t, const float*, int64_t, int, int) override {}
  void Combine(int64_t, float*, int64_t, int, int) override {}
};

TEST(QueryTap, FindsTheQueriesBeforeRope) {
  test::TestModelOptions options;
  options.architecture = "qwen2";  // channels half a head apart
  options.biases = true;
  const auto model = Load(options);
  ASSERT_TRUE(model);
  const HyperParams& hp = model->hparams();
  const int64_t n = 200;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  NoAttention nothing;
  QueryTap tap(*model, nothing);
  // Two blocks, each layer and head with a mean of its own, and noise.
  std::vector<Complex> sums(static_cast<std::size_t>(hp.n_layers * hp.n_heads * hp.head_size / 2));
  std::vector<double> lengths(sums.size());
  for (int64_t l = 0; l < hp.n_layers; ++l) {
    const auto pairs = RopePairs(*model, l);
    tap.BeginLayer();
    for (int64_t begin = 0; begin < n; begin += 128) {
      const int64_t m = std::min<int64_t>(128, n - begin);
      std::vector<float> q(static_cast<std::size_t>(m * hp.n_heads * hp.head_size));
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t h = 0; h < hp.n_heads; ++h) {
          for (std::size_t f = 0; f < pairs.size(); ++f) {
            const Complex before(static_cast<double>(l + 1), static_cast<double>(h) + normal(random));
            const Complex turned = before * std::polar(1.0, pairs[f].rate * static_cast<double>(begin + i));
            float* head = q.data() + (i * hp.n_heads + h) * hp.head_size;
            head[pairs[f].first] = static_cast<float>(turned.real());
            head[pairs[f].second] = static_cast<float>(turned.imag());
            const std::size_t at = static_cast<std::size_t>(l * hp.n_heads + h) * pairs.size() + f;
            sums[at] += before;
            lengths[at] += std::abs(before);
          }
        }
      }
      tap.Store(l, q.data(), nullptr, nullptr, m);
    }
  }
  const auto stats = tap.Take();
  EXPECT_EQ(stats->tokens, n);
  EXPECT_TRUE(CheckQueryStats(*stats, hp.n_layers, {hp.n_kv_heads, hp.head_size}));
  EXPECT_FALSE(CheckQueryStats(*stats, hp.n_layers, {hp.n_kv_heads, 2 * hp.head_size}));
  ASSERT_EQ(stats->pairs.size(), sums.size());
  for (std::size_t i = 0; i < sums.size(); ++i) {
    EXPECT_NEAR(stats->pairs[i].re, sums[i].real() / n, 1e-5);
    EXPECT_NEAR(stats->pairs[i].im, sums[i].imag() / n, 1e-5);
    EXPECT_NEAR(stats->pairs[i].length, lengths[i] / n, 1e-5);
  }
}

// One KV head, two query heads: random keys before RoPE, turned to their positions as a cache holds them.
struct Head {
  static constexpr int64_t kSize = 32, kGroup = 2;
  int64_t n;
  std::vector<RopePair> turns;
  std::vector<QueryPair> queries;          // [group][pair]
  std::vector<std::vector<Complex>> keys;  // [token][pair], before RoPE
  std::vector<uint16_t> k, v;

  explicit Head(int64_t tokens) : n(tokens) {
    std::mt19937 random(9);
    std::normal_distribution<double> normal;
    for (int64_t f = 0; f < kSize / 2; ++f)
      turns.push_back({f, f + kSize / 2, std::pow(10000.0, -2.0 * static_cast<double>(f) / kSize)});
    for (std::size_t i = 0; i < turns.size() * kGroup; ++i) {
      const Complex mean(normal(random), normal(random));
      queries.push_back({mean.real(), mean.imag(), std::abs(mean) * (1 + 0.1 * static_cast<double>(i % 5))});
    }
    k.resize(static_cast<std::size_t>((n + 63) / 64 * 64 * kSize));
    v.resize(static_cast<std::size_t>(n * kSize));
    for (int64_t t = 0; t < n; ++t) {
      auto& key = keys.emplace_back();
      for (const RopePair& turn : turns) {
        key.emplace_back(normal(random) + 1, normal(random));
        const Complex turned = key.back() * std::polar(1.0, turn.rate * static_cast<double>(t));
        const int64_t page = t / 64 * 64 * kSize;
        k[static_cast<std::size_t>(page + turn.first * 64 + t % 64)] =
            FloatToHalf(static_cast<float>(turned.real()));
        k[static_cast<std::size_t>(page + turn.second * 64 + t % 64)] =
            FloatToHalf(static_cast<float>(turned.imag()));
      }
    }
  }
  HeadQueries expected() const { return {turns, queries.data(), kGroup}; }

  // By the formula in the scorer's comment, in distances and phases.
  std::vector<double> Slow() const {
    std::vector<double> best(static_cast<std::size_t>(n), -INFINITY);
    for (std::size_t g = 0; g < kGroup; ++g) {
      std::vector<double> score;
      for (int64_t t = 0; t < n; ++t) {
        double s = 0;
        for (std::size_t f = 0; f < turns.size(); ++f) {
          const QueryPair& q = queries[g * turns.size() + f];
          const Complex mean(q.re, q.im), key = keys[static_cast<std::size_t>(t)][f];
          const double phase = std::arg(mean * std::conj(key));
          for (int o = 0; o < 17; ++o) {
            const double distance = static_cast<double>(n - 1 - t) + std::exp2(o);
            s += std::abs(mean) * std::abs(key) * std::cos(turns[f].rate * distance + phase) / 17;
          }
          const double concentration = std::abs(mean) / q.length;
          s += (1 - concentration) * q.length * std::abs(key);
        }
        score.push_back(s);
      }
      double mean = 0, variance = 0;
      for (const double s : score) mean += s / static_cast<double>(n);
      for (const double s : score) variance += (s - mean) * (s - mean) / static_cast<double>(n);
      for (std::size_t t = 0; t < best.size(); ++t)
        best[t] = std::max(best[t], (score[t] - mean) / std::sqrt(variance));
    }
    return best;
  }
};

TEST(Trigonometric, IsTheSeriesByItsDefinition) {
  const auto scorer = MakeScorer("trig");
  ASSERT_TRUE(scorer);
  EXPECT_TRUE((*scorer)->needs().query_stats);
  for (const int64_t n : {1, 50, 64, 333}) {
    const Head head(n);
    const HeadQueries queries = head.expected();
    PrefillScoreInput in;
    in.kv = {Head::kSize, head.k.data(), head.v.data(), n};
    in.queries = &queries;
    std::vector<float> scores(static_cast<std::size_t>(n), NAN);
    (*scorer)->ScorePrefill(in, scores);
    const auto slow = head.Slow();
    for (std::size_t t = 0; n > 1 && t < slow.size(); ++t)
      EXPECT_NEAR(scores[t], slow[t], 5e-3) << n << " " << t;
    for (const float s : scores) EXPECT_TRUE(std::isfinite(s));
  }
}

TEST(Trigonometric, CachedKeysScoreLikeFreshOnes) {
  const auto scorer = MakeScorer("trig");
  const int64_t n = 500;
  const Head head(n);
  const HeadQueries queries = head.expected();
  auto cache = LayerCache::Create(nullptr, {1, Head::kSize}, {1.0, 16, 16}, {4, 28}, false);
  ASSERT_TRUE(cache);
  const DenseView view{Head::kSize, head.k.data(), head.v.data(), n};
  const std::vector<uint32_t> all;
  const float* none = nullptr;
  ASSERT_TRUE(cache->Fill({&view, 1}, {&all, 1}, {&none, 1}));
  CachedScoreInput in;
  in.kv = cache->view(0);
  in.positions = cache->positions(0);
  in.tokens_seen = n;
  in.queries = &queries;
  std::vector<float> cached(static_cast<std::size_t>(in.kv.n_pages * kPageTokens));
  (*scorer)->ScoreCached(in, cached);
  ASSERT_GE(cached.size(), 384u);
  const auto slow = head.Slow();
  // Standardized over the paged tokens only: the same up to a line.
  std::vector<double> x, y;
  for (std::size_t i = 0; static_cast<int64_t>(i) < n - in.kv.n_raw; ++i) {
    x.push_back(slow[4 + i]);
    y.push_back(cached[i]);
  }
  double mx = 0, my = 0, xy = 0, xx = 0, yy = 0;
  for (std::size_t i = 0; i < x.size(); ++i)
    mx += x[i] / static_cast<double>(x.size()), my += y[i] / static_cast<double>(x.size());
  for (std::size_t i = 0; i < x.size(); ++i)
    xy += (x[i] - mx) * (y[i] - my), xx += (x[i] - mx) * (x[i] - mx), yy += (y[i] - my) * (y[i] - my);
  EXPECT_GT(xy / std::sqrt(xx * yy), 0.99);
}

struct Tiny : test::TinyEngine {
  Tiny() : TinyEngine({}, 128) {}
};

TEST(Trigonometric, FromCalibrationToGeneration) {
  const Tiny tiny;
  CalibrateOptions options;
  options.scorer = "trig";
  options.length = 600;
  options.evaluated = 40;
  options.experts = {{0.2, 4, 4}, {0.5, 8, 4}, {1.0, 16, 16}};
  const std::vector<std::vector<int32_t>> chunks = {test::RandomTokens(600, 1), test::RandomTokens(600, 2)};
  const auto profile = Calibrate(tiny.engine, chunks, options, {}, {}, {});
  ASSERT_TRUE(profile) << profile.error().message;
  ASSERT_TRUE(profile->queries);
  EXPECT_EQ(profile->queries->tokens, 1200);
  const auto read = ParseProfile(ToJson(*profile), "profile");
  ASSERT_TRUE(read) << read.error().message;
  ASSERT_TRUE(read->queries);
  ASSERT_EQ(read->queries->pairs.size(), profile->queries->pairs.size());
  for (std::size_t i = 0; i < read->queries->pairs.size(); ++i) {
    const QueryPair &a = read->queries->pairs[i], &b = profile->queries->pairs[i];
    EXPECT_NEAR(a.re, b.re, 1e-3 * std::abs(b.re));
    EXPECT_NEAR(a.im, b.im, 1e-3 * std::abs(b.im));
    EXPECT_NEAR(a.length, b.length, 1e-3 * b.length);
    EXPECT_LE(std::hypot(b.re, b.im), b.length * (1 + 1e-9));
  }
  SolveRequest request;
  request.context_length = 1000;
  request.compression = 3;
  const auto solved = Solve(*read, request);
  ASSERT_TRUE(solved) << solved.error().message;
  auto plan = ParsePlan(ToJson(solved->plan), "plan");
  ASSERT_TRUE(plan) << plan.error().message;
  ASSERT_TRUE(plan->queries);
  auto session = Session::Create(tiny.engine, *plan);
  ASSERT_TRUE(session) << session.error().message;
  ASSERT_TRUE(session->Prefill(test::RandomTokens(700, 3)));
  for (int i = 0; i < 260; ++i) ASSERT_TRUE(session->Decode(100 + i % 50));  // evicts twice
  EXPECT_LT(session->stats().bytes, session->stats().bytes_full / 2);
  for (const float x : session->logits()) EXPECT_TRUE(std::isfinite(x));

  // A plan without the statistics cannot be run with this scorer, unless it evicts nothing.
  plan->queries = nullptr;
  const auto refused = Session::Create(tiny.engine, *plan);
  ASSERT_FALSE(refused);
  EXPECT_NE(refused.error().message.find("calibrate"), std::string::npos);
  EXPECT_TRUE(Session::Create(tiny.engine, FullPlan(tiny.engine->fingerprint(), 100), {.scorer = "trig"}));
}

TEST(QueryStats, BadFilesAreRefused) {
  const Tiny tiny;
  CalibrateOptions options;
  options.length = 300;
  options.evaluated = 20;
  options.experts = {{1.0, 16, 16}};
  const std::vector<std::vector<int32_t>> chunks = {test::RandomTokens(300, 1)};
  const auto profile = Calibrate(tiny.engine, chunks, options, {}, {}, {});
  ASSERT_TRUE(profile) << profile.error().message;
  const auto good = nlohmann::json::parse(ToJson(*profile));
  const auto refused = [&](const char* what, const nlohmann::json& document) {
    const auto parsed = ParseProfile(document.dump(), "p.json");
    ASSERT_FALSE(parsed) << what;
    EXPECT_NE(parsed.error().message.find("quer"), std::string::npos) << parsed.error().message;
  };
  auto bad = good;
  bad["queries"].erase(0);
  refused("a head is missing", bad);
  bad = good;
  bad["queries"][1]["re"].erase(0);
  refused("a pair is missing", bad);
  bad = good;
  bad["queries"][1]["length"][0] = -1;
  refused("a negative length", bad);
  bad = good;
  std::swap(bad["queries"][0], bad["queries"][1]);
  refused("out of order", bad);
  bad = good;
  bad["query_tokens"] = 0;
  refused("no tokens", bad);
  bad = good;
  bad.erase("queries");
  const auto without = ParseProfile(bad.dump(), "p.json");
  ASSERT_TRUE(without) << "older profiles have none";
  EXPECT_FALSE(without->queries);
}

}  // namespace
}  // namespace moend
