// Whole plans measured: their KL, how well the sum of losses predicts it, and the search that improves on it.
#include "moend/calibrate/trials.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "moend/engine/head_budgets.h"
#include "tests/support/calibration.h"
#include "tests/support/tiny_engine.h"

namespace moend {
namespace {

using test::Chunks;
using test::Kl;

struct TrialEngine : test::TinyEngine {
  TrialEngine() : TinyEngine({}, 128) {}
};

Profile Measured(const TrialEngine& tiny, bool heads) {
  CalibrateOptions options;
  options.length = 600;
  options.evaluated = 40;
  options.heads = heads;
  options.experts = {{0.2, 4, 4}, {0.2, 16, 16}, {0.5, 2, 2}, {0.5, 16, 16},
                     {1.0, 2, 2}, {1.0, 4, 4},   {1.0, 8, 8}, {1.0, 16, 16}};
  const auto profile = Calibrate(tiny.engine, Chunks(1), options, {}, {}, {});
  EXPECT_TRUE(profile) << profile.error().message;
  return *profile;
}

double Mean(const std::vector<double>& x) {
  return std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
}

// By the slow way: sessions with the plan and with the full cache. In any order, so that what is kept from
// one plan to the next cannot leak into it.
TEST(Trials, KlIsThatOfSessions) {
  const TrialEngine tiny;
  const auto chunks = Chunks(1);
  Profile profile = Measured(tiny, false);
  auto trials = Trials::Create(tiny.engine, chunks, profile, 1, {});
  ASSERT_TRUE(trials) << trials.error().message;
  const auto logits = [&](const Plan& plan) {
    auto session = Session::Create(tiny.engine, plan);
    EXPECT_TRUE(session && session->Prefill(std::span(chunks[0]).first(599)) &&
                session->Decode(chunks[0].back()));
    return std::vector<float>(session->logits().begin(), session->logits().end());
  };
  Plan plan = FullPlan(tiny.engine->fingerprint(), 600);
  const auto full = logits(plan);
  const Expert a{0.2, 4, 4}, b{1.0, 2, 2}, none;
  for (const auto& layers : std::vector<std::vector<Expert>>{
           {a, b, a}, {a, b, b}, {none, none, a}, {a, b, a}, {b, none, none}, {none, none, none}}) {
    plan.layers = layers;
    const double expected = Kl(full, logits(plan));
    const auto kl = trials->Kl(layers);
    ASSERT_TRUE(kl) << kl.error().message;
    ASSERT_EQ(kl->size(), 1u);
    EXPECT_NEAR((*kl)[0], expected, 0.02 * expected + 1e-6);
  }
  plan.heads = {a, none, b, b, none, a};
  const double expected = Kl(full, logits(plan));
  EXPECT_NEAR(trials->Kl(plan.heads).value()[0], expected, 0.02 * expected + 1e-6);
  EXPECT_FALSE(trials->Kl(std::vector<Expert>(4)));
}

TEST(Spearman, OfKnownRankings) {
  const std::vector<double> x = {1, 2, 3, 4, 5}, up = {10, 20, 35, 36, 1000}, down = {5, 4, 3, 2, 1},
                            tied = {1, 1, 2, 2, 3}, same(5, 7.0), mixed = {2, 1, 4, 3, 5};
  EXPECT_DOUBLE_EQ(Spearman(x, up), 1);
  EXPECT_DOUBLE_EQ(Spearman(x, down), -1);
  EXPECT_EQ(Spearman(x, same), 0);
  EXPECT_DOUBLE_EQ(Spearman(x, mixed), 0.8) << "1 - 6 * 4 / (5 * 24)";
  EXPECT_NEAR(Spearman(x, tied), 9 / std::sqrt(10.0 * 9), 1e-12);
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  int covered = 0;
  constexpr int kDraws = 40;
  for (int draw = 0; draw < kDraws; ++draw) {
    std::vector<double> a, b, c;
    for (int i = 0; i < 100; ++i) {
      a.push_back(normal(random));
      b.push_back(a.back() + normal(random));
      c.push_back(normal(random));
    }
    const Correlation related = SpearmanInterval(a, b, 1), unrelated = SpearmanInterval(a, c, 1);
    EXPECT_LT(related.low, related.value);
    EXPECT_LT(related.value, related.high);
    EXPECT_GT(related.low, 0.25);
    covered += unrelated.low < 0 && unrelated.high > 0;
  }
  EXPECT_GE(covered, kDraws * 17 / 20) << "95% intervals hold the truth, 0, about 38 times of 40";
}

TEST(Validate, RandomPlansMeetTheirBudgets) {
  const TrialEngine tiny;
  const Profile profile = Measured(tiny, false);
  auto trials = Trials::Create(tiny.engine, Chunks(1), profile, 40, {});
  ASSERT_TRUE(trials);
  ValidateOptions options;
  options.plans = 20;
  options.least = 2;
  options.most = 6;
  options.context_length = 16384;
  const auto result = Validate(*trials, profile, options, {});
  ASSERT_TRUE(result) << result.error().message;
  ASSERT_EQ(result->plans.size(), 20u);
  Plan plan = FullPlan(profile.model, options.context_length);
  const double full = static_cast<double>(FullBytes(profile.model, options.context_length));
  for (const ValidatedPlan& p : result->plans) {
    plan.layers = p.experts;
    const double bytes = static_cast<double>(PlanBytes(plan, options.context_length, 0).value());
    EXPECT_LE(bytes, full / p.compression);
    EXPECT_GT(p.measured, 0);
  }
  EXPECT_GT(result->spearman.value, 0);
  const auto again = Validate(*trials, profile, options, {});
  ASSERT_TRUE(again);
  EXPECT_EQ(again->spearman.value, result->spearman.value) << "the same every time";
}

TEST(Refine, StaysInTheBudgetAndNeverGetsWorse) {
  const TrialEngine tiny;
  Profile profile = Measured(tiny, true);
  auto trials = Trials::Create(tiny.engine, Chunks(2), profile, 40, {});
  ASSERT_TRUE(trials);
  for (const Variant variant : {Variant::k2dHetero, Variant::k2dHeads}) {
    SolveRequest request;
    request.variant = variant;
    request.context_length = 16384;
    request.compression = 5;
    // A profile that has it all wrong leaves much to improve.
    Profile wrong = profile;
    for (auto* cells : {&wrong.cells, &wrong.head_cells}) std::reverse(cells->begin(), cells->end());
    const auto solved = Solve(wrong, request);
    ASSERT_TRUE(solved) << solved.error().message;
    RefineOptions options;
    options.rows = variant == Variant::k2dHeads ? Rows::kHeads : Rows::kLayers;
    const auto refined = Refine(*trials, profile, solved->plan, options, {});
    ASSERT_TRUE(refined) << refined.error().message;
    EXPECT_TRUE(refined->finished);
    EXPECT_LE(refined->after, refined->before);
    EXPECT_LE(refined->plan.bytes, solved->plan.budget_bytes);
    EXPECT_EQ(refined->plan.bytes, PlanBytes(refined->plan, 16384, 0).value());
    const auto kl = trials->Kl(options.rows == Rows::kHeads ? refined->plan.heads : refined->plan.layers);
    ASSERT_TRUE(kl);
    EXPECT_NEAR(Mean(*kl), refined->after, 1e-9 + 1e-6 * refined->after);
    EXPECT_TRUE(ParsePlan(ToJson(refined->plan), "plan"));
  }
}

TEST(Refine, StopsInTime) {
  const TrialEngine tiny;
  const Profile profile = Measured(tiny, false);
  auto trials = Trials::Create(tiny.engine, Chunks(1), profile, 40, {});
  ASSERT_TRUE(trials);
  SolveRequest request;
  request.context_length = 16384;
  request.compression = 5;
  const auto solved = Solve(profile, request);
  ASSERT_TRUE(solved);
  RefineOptions options;
  options.seconds = 0;
  const auto refined = Refine(*trials, profile, solved->plan, options, {});
  ASSERT_TRUE(refined);
  EXPECT_FALSE(refined->finished);
  EXPECT_EQ(refined->measured, 1);
  EXPECT_EQ(refined->plan.layers, solved->plan.layers);
  const auto cancelled = Refine(*trials, profile, solved->plan, {}, [](double) { return false; });
  ASSERT_FALSE(cancelled);
  EXPECT_EQ(cancelled.error().code, ErrorCode::kCancelled);
}

TEST(HeadBudgets, PagesGoWhereTheScoresAre) {
  const Protected guard{4, 28};
  const int64_t n = 64 * 40 + 32;
  std::vector<std::vector<float>> scores(2, std::vector<float>(static_cast<std::size_t>(n), 0.0f));
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (auto& row : scores)
    for (float& s : row) s = normal(random);
  const int64_t even = KeptPages(0.25, guard, n);
  ASSERT_GE(even, 9);
  auto pages = SplitPages(scores, 0.25, guard);
  EXPECT_EQ(pages[0] + pages[1], 2 * even);
  EXPECT_LE(std::abs(pages[0] - even), 2) << "alike heads share evenly";
  for (float& s : scores[1]) s += 100;
  pages = SplitPages(scores, 0.25, guard);
  EXPECT_EQ(pages[0], even / 5) << "a fifth of the even share at least";
  EXPECT_EQ(pages[1], 2 * even - even / 5);
  // Nearly everything kept: a head cannot have more tokens than there are.
  pages = SplitPages(scores, 0.9, guard);
  EXPECT_LE(pages[1], 40);
  EXPECT_LE(pages[0] + pages[1], 2 * KeptPages(0.9, guard, n));
  EXPECT_EQ(SplitPages(scores, 0.01, guard), (std::vector<int64_t>{0, 0}));
}

TEST(HeadBudgets, NeverTakeMoreBytes) {
  const Protected guard{4, 28};
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 200; ++round) {
    const std::size_t heads = 1 + random() % 4, n = 100 + random() % 3000;
    std::vector<std::vector<float>> scores(heads, std::vector<float>(n));
    for (std::size_t h = 0; h < heads; ++h)
      for (float& s : scores[h]) s = normal(random) + static_cast<float>(h * (random() % 2));
    const Expert expert{0.02 + 0.01 * static_cast<double>(random() % 95), 16, 16};
    const auto split = SplitHeads(scores, expert, guard, 64, 0);
    ASSERT_TRUE(split) << split.error().message;
    int64_t bytes = 0;
    for (const Expert& e : *split) {
      EXPECT_LT(e.keep, 1);
      bytes += LayerBytes({1, 64}, e, guard, static_cast<int64_t>(n), 0).value();
    }
    EXPECT_LE(
        bytes,
        LayerBytes({static_cast<int64_t>(heads), 64}, expert, guard, static_cast<int64_t>(n), 0).value());
  }
}

TEST(AdaptiveHeads, SessionsDealTokensOutAndKeepTheirBytes) {
  const TrialEngine tiny;
  Plan even = FullPlan(tiny.engine->fingerprint(), 2000);
  std::fill(even.layers.begin(), even.layers.end(), Expert{0.3, 16, 16});
  Plan plan = even;
  plan.variant = "adakv";
  plan.adaptive_heads = true;
  const auto parsed = ParsePlan(ToJson(plan), "plan");
  ASSERT_TRUE(parsed) << parsed.error().message;
  EXPECT_TRUE(parsed->adaptive_heads);
  auto a = Session::Create(tiny.engine, even), b = Session::Create(tiny.engine, *parsed);
  ASSERT_TRUE(a && b);
  const auto tokens = test::RandomTokens(2000, 5);
  ASSERT_TRUE(a->Prefill(tokens) && b->Prefill(tokens));
  EXPECT_LE(b->stats().bytes, a->stats().bytes);
  // Tokens are dealt out in whole pages: each head may lose what does not fill one, and the raw tokens that
  // an even split has beyond its last one.
  const auto page = MakePageLayout(plan.model.shape.head_size, 16, 16);
  ASSERT_TRUE(page);
  EXPECT_GE(b->stats().bytes, a->stats().bytes - 12 * page->bytes);
  ASSERT_EQ(b->plan().heads.size(), 6u);
  bool uneven = false;
  for (std::size_t l = 0; l < 3; ++l)
    uneven |= b->plan().heads[2 * l].keep != b->plan().heads[2 * l + 1].keep;
  EXPECT_TRUE(uneven);
  auto fork = b->Fork();
  ASSERT_TRUE(fork);
  for (int i = 0; i < 140; ++i) ASSERT_TRUE(fork->Decode(100 + i % 50));
  EXPECT_LE(fork->stats().bytes, a->stats().bytes * 3 / 2);
}

}  // namespace
}  // namespace moend
