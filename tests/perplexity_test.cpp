// Perplexity and KL divergence on a small random model, against libllama's logits and between caches.
#include "moend/eval/perplexity.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>

#include "moend/eval/llama_cache.h"
#include "tests/support/libllama_logits.h"
#include "tests/support/test_model.h"

namespace moend::eval {
namespace {

struct PerplexityWorld {
  test::TempDir dir;
  std::string path = dir / "model.gguf";
  std::shared_ptr<const Model> model;
  std::shared_ptr<Engine> engine;
  PerplexityWorld() {
    EXPECT_TRUE(test::WriteTestModel({}, path));
    auto loaded = Model::Load(path);
    EXPECT_TRUE(loaded) << loaded.error().message;
    if (!loaded) return;
    model = *loaded;
    auto made = Engine::Create(model, {1, 64});
    EXPECT_TRUE(made) << made.error().message;
    if (made) engine = *made;
  }
};
PerplexityWorld& TheModel() {
  static PerplexityWorld world;
  return world;
}

Method Bits(int k, int v, int64_t n_ctx) {
  Plan plan = FullPlan(TheModel().engine->fingerprint(), n_ctx);
  std::ranges::fill(plan.layers, Expert{1.0, k, v});
  plan.variant = "bits";
  return MethodOf(plan, "");
}

TEST(Perplexity, Statistics) {
  const std::vector<float> p = {0, 0}, q = {std::log(3.0f), 0};  // 1/2, 1/2 against 3/4, 1/4
  EXPECT_NEAR(KlDivergence(p, q), 0.5 * std::log(2.0 / 3) + 0.5 * std::log(2.0), 1e-6);
  EXPECT_EQ(KlDivergence(p, p), 0);
  EXPECT_NEAR(LossOf(q, 1).nll, std::log(4.0), 1e-6);
  EXPECT_EQ(LossOf(q, 1).top, 0);
  const std::vector<float> large = {1000, 0};
  EXPECT_EQ(LossOf(large, 0).nll, 0);
  EXPECT_NEAR(LossOf(large, 1).nll, 1000, 1e-9);
  const std::vector<double> values = {1, 2, 3, 4};
  EXPECT_EQ(MeanOf(values).mean, 2.5);
  EXPECT_NEAR(MeanOf(values).error, std::sqrt(5.0 / 3 / 4), 1e-12);
  std::vector<double> many(1001);
  std::iota(many.begin(), many.end(), 0.0);
  const Quantile q99 = QuantileOf(many, 0.99);
  EXPECT_DOUBLE_EQ(q99.value, 990);
  EXPECT_NEAR(q99.low, 990 - 1.96 * std::sqrt(1001 * 0.99 * 0.01), 1);
  EXPECT_NEAR(q99.high, 990 + 1.96 * std::sqrt(1001 * 0.99 * 0.01), 1);
  EXPECT_EQ(QuantileOf(many, 0.999).high, 1000);
}

TEST(Perplexity, FullCacheIsLibllamas) {
  std::vector<int32_t> tokens = test::RandomTokens(96, 5);
  const auto results = Perplexity(TheModel().engine, tokens, {}, {48, 0});
  ASSERT_TRUE(results) << results.error().message;
  ASSERT_EQ(results->size(), 1u);
  const PerplexityResult* result = &results->front();
  EXPECT_EQ(result->chunks, 2);
  EXPECT_EQ(result->tokens, 2 * 23);
  EXPECT_EQ(result->ppl_base.mean, 0);  // nothing to compare
  const Tokenizer& tokenizer = TheModel().model->tokenizer();
  double sum = 0;
  for (int c = 0; c < 2; ++c) {
    std::vector<int32_t> chunk(tokens.begin() + 48 * c, tokens.begin() + 48 * (c + 1));
    if (tokenizer.adds_bos()) chunk[0] = tokenizer.bos();
    const auto logits = test::LibllamaLogits(TheModel().path, chunk);
    ASSERT_EQ(logits.size(), 48u);
    for (std::size_t i = 24; i < 47; ++i) sum += LossOf(logits[i], chunk[i + 1]).nll;
  }
  EXPECT_NEAR(result->nll.mean, sum / 46, 2e-3);
  EXPECT_NEAR(result->ppl.mean, std::exp(result->nll.mean), 1e-9);
}

TEST(Perplexity, FewerBitsDivergeMore) {
  const std::vector<int32_t> tokens = test::RandomTokens(800, 6);
  const std::vector<Method> methods = {Bits(16, 16, 400), Bits(8, 8, 400), Bits(2, 2, 400)};
  const auto results = Perplexity(TheModel().engine, tokens, methods, {400, 0});
  ASSERT_TRUE(results) << results.error().message;
  ASSERT_EQ(results->size(), 3u);  // the full one, and those that compress
  EXPECT_EQ((*results)[0].label, "full");
  double before = 0;
  for (std::size_t i = 1; i < 3; ++i) {
    const PerplexityResult& r = (*results)[i];
    EXPECT_GT(r.kld.mean, 2 * before);
    EXPECT_GE(r.kld_max, r.kld_999.value);
    EXPECT_GE(r.kld_999.value, r.kld_99.value);
    EXPECT_GE(r.kld_99.value, r.kld_median.value);
    EXPECT_NEAR(r.ln_ratio.mean, r.nll.mean - r.nll_base.mean, 1e-9);
    EXPECT_NEAR(r.nll_base.mean, (*results)[0].nll.mean, 1e-9);
    EXPECT_LT(r.kv_bytes, r.kv_bytes_full);
    EXPECT_LE(r.same_top.mean, 1);
    before = r.kld.mean;
    EXPECT_NE(FormatPerplexity(r).find("99.0%   KLD"), std::string::npos);
  }
  const auto json =
      nlohmann::json::parse(PerplexitiesToJson(*results, TheModel().engine->fingerprint(), 400, "text.txt"));
  EXPECT_EQ(json["results"].size(), 3u);
  EXPECT_EQ(json["results"][2]["kld"]["mean"], (*results)[2].kld.mean);
  EXPECT_FALSE(json["results"][0].contains("kld"));
}

// Read as one prompt or token by token: only the order of sums differs.
TEST(Perplexity, ComparedOrAloneTheFullCacheIsTheSame) {
  const std::vector<int32_t> tokens = test::RandomTokens(300, 8);
  const std::vector<Method> methods = {Bits(4, 4, 150)};
  const auto alone = Perplexity(TheModel().engine, tokens, {}, {150, 0});
  const auto compared = Perplexity(TheModel().engine, tokens, methods, {150, 0});
  ASSERT_TRUE(alone && compared);
  EXPECT_EQ((*alone)[0].tokens, (*compared)[0].tokens);
  EXPECT_NEAR((*alone)[0].nll.mean, (*compared)[0].nll.mean, 1e-3);
  EXPECT_EQ((*alone)[0].kv_bytes, (*compared)[0].kv_bytes);
}

TEST(Perplexity, ANearlyFullCacheIsNearlyTheFullOne) {
  // One head of one layer at 8 bit: a plan by KV head whose layers say 16.
  Plan plan = FullPlan(TheModel().engine->fingerprint(), 200);
  plan.heads.assign(plan.layers.size() * 2, Expert{});
  plan.heads[0] = {1.0, 8, 8};
  ASSERT_TRUE(Compresses(plan));
  const auto results =
      Perplexity(TheModel().engine, test::RandomTokens(200, 9), std::vector{MethodOf(plan, "")}, {200, 0});
  ASSERT_TRUE(results) << results.error().message;
  ASSERT_EQ(results->size(), 2u);
  EXPECT_LT((*results)[1].kld.mean, 1e-3);
  EXPECT_GT((*results)[1].kld.mean, 0);
  // And the other way round: layers that compress, heads that do not.
  std::ranges::fill(plan.layers, Expert{1.0, 2, 2});
  plan.heads[0] = Expert{};
  EXPECT_FALSE(Compresses(plan));
}

TEST(Perplexity, LibllamasCachesAreComparedWithItsOwn) {
  const std::vector<int32_t> tokens = test::RandomTokens(256, 10);
  PerplexityOptions options{128, 0, {"f16", "q8_0", "q4_0"}};
  const auto results = Perplexity(TheModel().engine, tokens, {}, options);
  ASSERT_TRUE(results) << results.error().message;
  ASSERT_EQ(results->size(), 4u);
  const PerplexityResult &full = (*results)[0], &f16 = (*results)[1], &q8 = (*results)[2],
                         &q4 = (*results)[3];
  EXPECT_EQ(f16.label, "llama.cpp f16");
  EXPECT_LT(f16.kld.mean, 1e-9);
  EXPECT_GT(q8.kld.mean, 0);
  EXPECT_GT(q4.kld.mean, 4 * q8.kld.mean);
  EXPECT_EQ(f16.tokens, full.tokens);
  EXPECT_NEAR(f16.nll.mean, full.nll.mean, 2e-3);
  // 34 and 18 bytes for 32 numbers, instead of 64.
  EXPECT_EQ(f16.kv_bytes, FullBytes(TheModel().engine->fingerprint(), 65));
  EXPECT_EQ(q8.kv_bytes * 64, f16.kv_bytes * 34);
  EXPECT_EQ(q4.kv_bytes * 64, f16.kv_bytes * 18);
  options.llama_caches = {"q9_9"};
  EXPECT_EQ(Perplexity(TheModel().engine, tokens, {}, options).error().code, ErrorCode::kNotFound);
}

TEST(Perplexity, BadRequests) {
  const std::vector<int32_t> tokens = test::RandomTokens(100, 7);
  const std::vector<Method> methods = {Bits(4, 4, 50)};
  EXPECT_EQ(Perplexity(TheModel().engine, tokens, {}, {101, 0}).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(Perplexity(TheModel().engine, tokens, {}, {4, 0}).error().code, ErrorCode::kInvalidArgument);
  const auto stop = [](const PerplexityProgress&) { return false; };
  EXPECT_EQ(Perplexity(TheModel().engine, tokens, {}, {50, 0}, stop).error().code, ErrorCode::kCancelled);
  EXPECT_EQ(Perplexity(TheModel().engine, tokens, methods, {50, 0}, stop).error().code,
            ErrorCode::kCancelled);
}

TEST(Distance, NotANumberIsNoPerfectPrediction) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> base = {0, 1}, broken = {0, nan};
  EXPECT_TRUE(std::isnan(KlDivergence(base, broken)));
  Engine& engine = *TheModel().engine;
  const auto n = static_cast<std::size_t>(engine.model().hparams().n_vocab);
  std::vector<float> logits(n, 0.0f), wrong(n, 0.0f);
  wrong[5] = nan;
  const std::vector<int32_t> next = {3};
  EXPECT_TRUE(DistancesOfLogits(engine, logits, logits, next));
  EXPECT_EQ(DistancesOfLogits(engine, logits, wrong, next).error().code, ErrorCode::kInternal);
}

// Hidden states of a prompt, and of steps without logits, give the logits that single steps give.
TEST(Distance, RowsOfHiddenStatesAreTheSamePredictions) {
  Engine& engine = *TheModel().engine;
  const std::vector<int32_t> tokens = test::RandomTokens(40, 11);
  const Plan full = FullPlan(engine.fingerprint(), 64);
  auto one = Session::Create(TheModel().engine, full, {64, ""});
  auto rows = Session::Create(TheModel().engine, full, {64, ""});
  auto steps = Session::Create(TheModel().engine, full, {64, ""});
  ASSERT_TRUE(one && rows && steps);
  std::vector<float> of_rows, of_steps;
  const std::span<const int32_t> all(tokens);
  ASSERT_TRUE(rows->Prefill(all, {}, &of_rows));
  ASSERT_TRUE(one->Prefill(all.first(30)));
  ASSERT_TRUE(steps->Prefill(all.first(30), {}, &of_steps));
  for (std::size_t i = 30; i < 40; ++i) {
    std::array<Session*, 1> session = {&*steps};
    ASSERT_TRUE(Session::DecodeBatch(session, all.subspan(i, 1), &of_steps));
  }
  const auto n_vocab = static_cast<std::size_t>(engine.model().hparams().n_vocab);
  std::vector<float> a(40 * n_vocab), b(40 * n_vocab);
  ASSERT_TRUE(engine.Logits(of_rows, a));
  ASSERT_TRUE(engine.Logits(of_steps, b));
  EXPECT_FALSE(engine.Logits(of_rows, std::span(a).first(5)));
  for (std::size_t i = 30; i < 40; ++i) {
    ASSERT_TRUE(one->Decode(tokens[i]));
    for (std::size_t t = 0; t < n_vocab; ++t) {
      EXPECT_NEAR(a[i * n_vocab + t], one->logits()[t], 2e-2);
      EXPECT_NEAR(b[i * n_vocab + t], one->logits()[t], 1e-4);
    }
  }
}

}  // namespace
}  // namespace moend::eval
