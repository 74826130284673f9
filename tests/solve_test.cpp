#include "moend/solve/solve.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "moend/solve/losses.h"

namespace moend {
namespace {

// Three layers, sensitivity 1, 10, 100; 2 KV heads of 64.
Profile MakeProfile() {
  Profile p;
  p.model = {"llama", "tiny", 3, {2, 64}, "0123456789abcdef"};
  p.scorer = "keydiff";
  p.length = 8192;
  p.chunks = p.chunks_wanted = 1;
  for (const double keep : {0.1, 0.25, 0.5, 1.0})
    for (const int k : {4, 8, 16})
      for (const int v : {2, 4, 16}) p.experts.push_back({keep, k, v});
  double sensitivity = 0.01;
  for (int l = 0; l < 3; ++l, sensitivity *= 10) {
    auto& row = p.cells.emplace_back();
    for (const Expert& e : p.experts) {
      const double loss =
          sensitivity * (1 - e.keep) + std::exp2(-2.0 * e.k_bits) + std::exp2(-2.0 * e.v_bits);
      row.push_back({loss * 2, loss});
    }
  }
  return p;
}

SolveRequest Request(Variant variant, double compression) {
  SolveRequest r;
  r.variant = variant;
  r.compression = compression;
  r.context_length = 16384;
  return r;
}

constexpr Variant kVariants[] = {Variant::k1d, Variant::k2dUniform, Variant::k2d, Variant::k2dHetero};

TEST(SolveTest, EveryVariantMeetsTheBudget) {
  const Profile profile = MakeProfile();
  for (const double compression : {1.5, 4.0, 14.0}) {
    std::vector<double> losses;
    for (const Variant variant : kVariants) {
      const auto solution = Solve(profile, Request(variant, compression));
      ASSERT_TRUE(solution) << solution.error().message;
      const Plan& plan = solution->plan;
      EXPECT_EQ(plan.model, profile.model);
      EXPECT_EQ(plan.variant, Name(variant));
      EXPECT_EQ(plan.scorer, "keydiff");
      EXPECT_EQ(plan.metric, "kl");
      EXPECT_EQ(plan.context_length, 16384);
      EXPECT_LE(plan.bytes, plan.budget_bytes);
      EXPECT_EQ(plan.bytes, *PlanBytes(plan, 16384, 0));
      EXPECT_LE(static_cast<double>(plan.budget_bytes) * compression, FullBytes(profile.model, 16384));
      ASSERT_EQ(plan.layers.size(), 3u);
      ASSERT_EQ(plan.predicted.size(), 3u);
      EXPECT_NEAR(solution->loss, plan.predicted[0] + plan.predicted[1] + plan.predicted[2], 1e-12);
      EXPECT_LE(solution->lower_bound, solution->loss);
      losses.push_back(solution->loss);
    }
    EXPECT_LE(losses[3], losses[2]) << "routing everything is at least as good as routing bits";
    EXPECT_LT(losses[3], losses[0]);
  }
}

TEST(SolveTest, RoutingFollowsSensitivity) {
  const auto solution = Solve(MakeProfile(), Request(Variant::k2dHetero, 8));
  ASSERT_TRUE(solution);
  EXPECT_EQ(solution->plan.solver, "exact");
  const auto& layers = solution->plan.layers;
  EXPECT_LE(layers[0].keep, layers[1].keep);
  EXPECT_LE(layers[1].keep, layers[2].keep);
  EXPECT_LT(layers[0].keep, layers[2].keep);
}

TEST(SolveTest, UniformVariantsUseTheWholeBudget) {
  for (const Variant variant : {Variant::k1d, Variant::k2dUniform}) {
    const auto solution = Solve(MakeProfile(), Request(variant, 10));
    ASSERT_TRUE(solution);
    Plan more = solution->plan;
    for (std::size_t l = 1; l < 3; ++l) EXPECT_EQ(more.layers[l], more.layers[0]);
    EXPECT_EQ(more.layers[0].k_bits, variant == Variant::k1d ? 16 : 8);
    EXPECT_EQ(more.layers[0].v_bits, variant == Variant::k1d ? 16 : 4);
    for (Expert& e : more.layers) e.keep += 1e-6;
    EXPECT_GT(*PlanBytes(more, 16384, 0), more.budget_bytes) << "a larger keep ratio would fit";
  }
}

TEST(SolveTest, BitsRoutedUnderOneKeepRatio) {
  const auto solution = Solve(MakeProfile(), Request(Variant::k2d, 10));
  ASSERT_TRUE(solution);
  for (const Expert& e : solution->plan.layers) EXPECT_EQ(e.keep, solution->plan.layers[0].keep);
}

TEST(SolveTest, NothingKeepsLessThanAskedFor) {
  const Profile profile = MakeProfile();
  for (const Variant variant : kVariants) {
    SolveRequest request = Request(variant, 4);
    const auto free = Solve(profile, request);
    request.min_keep = 0.2;
    const auto solution = Solve(profile, request);
    ASSERT_TRUE(free && solution);
    EXPECT_LE(solution->plan.bytes, solution->plan.budget_bytes);
    EXPECT_GE(solution->loss, free->loss);
    for (const Expert& e : solution->plan.layers) EXPECT_GE(e.keep, 0.2);
    // Without room for that many tokens it says so, with the ratio that would do.
    request.compression = 200;
    const auto none = Solve(profile, request);
    ASSERT_FALSE(none);
    EXPECT_EQ(none.error().code, ErrorCode::kBudget) << none.error().message;
    EXPECT_NE(none.error().message.find("keeps 0.2 of"), std::string::npos) << none.error().message;
  }
  // A layer that could lose nearly everything is the one that changes.
  SolveRequest request = Request(Variant::k2dHetero, 14);
  EXPECT_EQ(Solve(profile, request)->plan.layers[0].keep, 0.1);
  request.min_keep = 0.25;
  EXPECT_EQ(Solve(profile, request)->plan.layers[0].keep, 0.25);
  for (const double wrong : {-0.1, 1.1, std::nan("")}) {
    request.min_keep = wrong;
    EXPECT_EQ(Solve(profile, request).error().code, ErrorCode::kInvalidArgument);
  }
  Profile evicting = profile;
  evicting.experts = {{0.1, 4, 4}, {0.5, 4, 4}};
  for (auto& row : evicting.cells) row.resize(2);
  request.min_keep = 0.75;
  const auto none = Solve(evicting, request);
  ASSERT_FALSE(none);
  EXPECT_NE(none.error().message.find("0.5"), std::string::npos) << none.error().message;
}

TEST(SolveTest, AFloorThatCostsTooMuchIsLowered) {
  std::mt19937 random(7);
  int raised = 0, lowered = 0;
  for (int round = 0; round < 200; ++round) {
    Profile profile = MakeProfile();
    for (auto& row : profile.cells)
      for (ProfileCell& cell : row) cell.kl *= std::uniform_real_distribution(0.5, 2.0)(random);
    SolveRequest request = Request(Variant::k2dHetero, std::uniform_real_distribution(2.0, 35.0)(random));
    const auto free = Solve(profile, request);
    ASSERT_TRUE(free) << free.error().message;
    request.min_keep = std::uniform_real_distribution(0.0, 0.6)(random);
    request.floor_price = std::uniform_real_distribution(0.0, 1.0)(random);
    const auto solution = Solve(profile, request);
    ASSERT_TRUE(solution) << solution.error().message;
    EXPECT_LE(solution->loss, free->loss * (1 + request.floor_price));
    EXPECT_LE(solution->plan.bytes, solution->plan.budget_bytes);
    EXPECT_EQ(solution->lower_bound, free->lower_bound);
    for (const Expert& e : solution->plan.layers) EXPECT_GE(e.keep, solution->min_keep);
    raised += solution->min_keep > 0.1;
    if (solution->min_keep >= request.min_keep) continue;
    // The next larger floor of the profile costs too much, or does not fit.
    ++lowered;
    SolveRequest larger = request;
    larger.floor_price = 0;
    for (const Expert& e : profile.experts) {
      if (e.keep <= solution->min_keep) continue;
      larger.min_keep = e.keep;
      const auto next = Solve(profile, larger);
      EXPECT_TRUE(!next || next->loss > free->loss * (1 + request.floor_price)) << e.keep;
      break;
    }
  }
  // Where all layers evict alike there is nothing to lower: such plans stay as they were.
  for (const Variant variant : {Variant::k1d, Variant::k2dUniform, Variant::k2d}) {
    SolveRequest request = Request(variant, 14);
    const auto free = Solve(MakeProfile(), request);
    request.min_keep = 0.9;
    request.floor_price = 0.2;
    const auto same = Solve(MakeProfile(), request);
    ASSERT_TRUE(free && same);
    EXPECT_EQ(same->plan.layers, free->plan.layers);
    EXPECT_EQ(same->min_keep, 0);
  }
  EXPECT_GT(raised, 20);
  EXPECT_GT(lowered, 20);
  for (const double wrong : {-0.1, std::nan(""), HUGE_VAL}) {
    SolveRequest request = Request(Variant::k2dHetero, 4);
    request.floor_price = wrong;
    EXPECT_EQ(Solve(MakeProfile(), request).error().code, ErrorCode::kInvalidArgument);
  }
}

TEST(SolveTest, FullNeedsNoBudget) {
  const auto solution = Solve(MakeProfile(), Request(Variant::kFull, 0));
  ASSERT_TRUE(solution);
  for (const Expert& e : solution->plan.layers) EXPECT_EQ(e, Expert{});
  EXPECT_EQ(solution->loss, 0);
  EXPECT_EQ(solution->plan.bytes, solution->plan.budget_bytes);
  EXPECT_EQ(solution->plan.variant, "full");
}

TEST(SolveTest, AmpleBudgetKeepsEverything) {
  for (const Variant variant : {Variant::k1d, Variant::k2dHetero}) {
    const auto solution = Solve(MakeProfile(), Request(variant, 0.5));
    ASSERT_TRUE(solution);
    for (const Expert& e : solution->plan.layers) EXPECT_EQ(e, (Expert{1, 16, 16}));
  }
}

TEST(SolveTest, MetricDecides) {
  Profile profile = MakeProfile();
  // By L2 the first layer is the sensitive one.
  for (std::size_t e = 0; e < profile.experts.size(); ++e)
    std::swap(profile.cells[0][e].l2, profile.cells[2][e].l2);
  SolveRequest request = Request(Variant::k2dHetero, 8);
  request.metric = Metric::kL2;
  const auto solution = Solve(profile, request);
  ASSERT_TRUE(solution);
  EXPECT_GT(solution->plan.layers[0].keep, solution->plan.layers[2].keep);
  EXPECT_EQ(solution->plan.metric, "l2");
}

TEST(SolveTest, OtherContextLengthOtherBytes) {
  // Short contexts: the protected tokens and scales weigh more, but the same experts must still fit.
  for (const int64_t length : {512, 2048, 100000}) {
    SolveRequest request = Request(Variant::k2dHetero, 3);
    request.context_length = length;
    const auto solution = Solve(MakeProfile(), request);
    ASSERT_TRUE(solution) << solution.error().message;
    EXPECT_EQ(solution->plan.bytes, *PlanBytes(solution->plan, length, 0));
    EXPECT_LE(solution->plan.bytes, FullBytes(solution->plan.model, length) / 3);
  }
}

TEST(SolveTest, ScorerStateCounts) {
  SolveRequest request = Request(Variant::k2dHetero, 8);
  request.score_bytes = 4;
  const auto solution = Solve(MakeProfile(), request);
  ASSERT_TRUE(solution);
  EXPECT_EQ(solution->plan.bytes, *PlanBytes(solution->plan, 16384, 4));
  EXPECT_LE(solution->plan.bytes, solution->plan.budget_bytes);
}

TEST(SolveTest, BudgetTooSmallNamesTheSmallest) {
  const Profile profile = MakeProfile();
  for (const Variant variant : kVariants) {
    SolveRequest request = Request(variant, 0);
    request.budget_bytes = 1000;
    const auto refused = Solve(profile, request);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, ErrorCode::kBudget);
    // The number of bytes that is named must work, and one less must not.
    const std::string& text = refused.error().message;
    const std::size_t at = text.rfind(": ");
    ASSERT_NE(at, std::string::npos) << text;
    request.budget_bytes = std::stoll(text.substr(at + 2));
    EXPECT_TRUE(Solve(profile, request)) << text;
    --request.budget_bytes;
    EXPECT_FALSE(Solve(profile, request)) << text;
    // So must the ratio that is named.
    request.budget_bytes = 0;
    request.compression = std::stod(text.substr(text.rfind('(') + 1));
    EXPECT_TRUE(Solve(profile, request)) << text;
  }
}

TEST(SolveTest, BadRequestsAreRefused) {
  const auto code = [](const Profile& profile, const SolveRequest& request) {
    return Solve(profile, request).error().code;
  };
  const Profile good = MakeProfile();
  SolveRequest request = Request(Variant::k2dHetero, 0);
  EXPECT_EQ(code(good, request), ErrorCode::kInvalidArgument) << "neither";
  request.compression = 4;
  request.budget_bytes = 4000;
  EXPECT_EQ(code(good, request), ErrorCode::kInvalidArgument) << "both";
  for (const double compression : {-1.0, std::nan(""), HUGE_VAL}) {
    EXPECT_EQ(code(good, Request(Variant::k1d, compression)), ErrorCode::kInvalidArgument);
  }
  request = Request(Variant::k2dHetero, 4);
  for (const int64_t length : {int64_t{0}, int64_t{-1}, INT64_MAX}) {
    request.context_length = length;
    EXPECT_EQ(code(good, request), ErrorCode::kInvalidArgument);
  }
  request.context_length = 16384;
  Profile bad = good;
  bad.chunks = 0;
  EXPECT_EQ(code(bad, request), ErrorCode::kInvalidArgument);
  bad = good;
  bad.cells[1].pop_back();
  EXPECT_EQ(code(bad, request), ErrorCode::kInvalidArgument);
  bad = good;
  bad.cells.pop_back();
  EXPECT_EQ(code(bad, request), ErrorCode::kInvalidArgument);
  bad = good;
  bad.cells[1][2].kl = std::nan("");
  EXPECT_EQ(code(bad, request), ErrorCode::kInvalidArgument);
  bad = good;
  bad.experts[3].k_bits = 5;
  EXPECT_EQ(code(bad, request), ErrorCode::kInvalidArgument);
}

TEST(SolveTest, ProfileWithoutTheBitsPredictsNothing) {
  Profile profile = MakeProfile();
  for (Expert& e : profile.experts) e.k_bits = std::min(e.k_bits + 1, 4);  // 4 bits only, losses as they are
  const auto solution = Solve(profile, Request(Variant::k1d, 4));
  ASSERT_TRUE(solution);
  EXPECT_TRUE(solution->plan.predicted.empty());
  EXPECT_TRUE(std::isnan(solution->loss));
}

TEST(SolveTest, Names) {
  for (const Variant v :
       {Variant::kFull, Variant::k1d, Variant::k2dUniform, Variant::k2d, Variant::k2dHetero})
    EXPECT_EQ(*ParseVariant(Name(v)), v);
  for (const Solver s : {Solver::kGreedy, Solver::kHull, Solver::kExact}) EXPECT_EQ(*ParseSolver(Name(s)), s);
  for (const Metric m : {Metric::kKl, Metric::kL2}) EXPECT_EQ(*ParseMetric(Name(m)), m);
  const auto wrong = ParseVariant("3d");
  ASSERT_FALSE(wrong);
  EXPECT_EQ(wrong.error().message,
            "there is no variant named \"3d\"; possible: full, 1d, 2d_uniform, 2d, 2d_hetero, 2d_heads");
}

TEST(LossesTest, CleanedLossesAreMonotone) {
  Profile profile = MakeProfile();
  std::mt19937_64 random(5);
  std::uniform_real_distribution<double> noise(-0.2, 0.8);
  for (auto& row : profile.cells)
    for (ProfileCell& cell : row) cell.kl = noise(random);
  const auto losses = CleanLosses(profile, Metric::kKl);
  ASSERT_TRUE(losses);
  for (const auto& row : *losses) {
    for (std::size_t a = 0; a < row.size(); ++a) {
      EXPECT_GE(row[a], 0);
      for (std::size_t b = 0; b < row.size(); ++b) {
        const Expert &x = profile.experts[a], &y = profile.experts[b];
        if (x.keep >= y.keep && x.k_bits >= y.k_bits && x.v_bits >= y.v_bits) {
          EXPECT_LE(row[a], row[b]);
        }
      }
    }
  }
  // What is monotone already stays as it was.
  const Profile good = MakeProfile();
  const auto same = CleanLosses(good, Metric::kL2);
  ASSERT_TRUE(same);
  for (std::size_t e = 0; e < good.experts.size(); ++e) EXPECT_EQ((*same)[1][e], good.cells[1][e].l2);
}

TEST(LossesTest, NoiseIsNoLoss) {
  Profile profile;
  profile.model.n_layers = 2;
  profile.experts = {{0.5, 4, 4}, {0.5, 16, 16}, {1.0, 4, 4}, kNoiseExpert, {1.0, 16, 16}};
  profile.cells = {{{9, 7}, {8, 4}, {5, 4}, {4, 3}, {0, 0}}, {{9, 7}, {8, 2}, {5, 2}, {4, 2}, {0, 0}}};
  const auto losses = CleanLosses(profile, Metric::kKl);
  ASSERT_TRUE(losses);
  EXPECT_EQ((*losses)[0], (std::vector<double>{4, 1, 1, 0, 0}));
  EXPECT_EQ((*losses)[1], (std::vector<double>{5, 0, 0, 0, 0}));
  // L2 is measured where it arises: it has no such noise.
  EXPECT_EQ((*CleanLosses(profile, Metric::kL2))[0], (std::vector<double>{9, 8, 5, 4, 0}));
}

TEST(LossesTest, NeighboursThatContradictMeetInTheMiddle) {
  Profile profile;
  profile.model.n_layers = 1;
  profile.experts = {{0.5, 4, 4}, {0.5, 8, 4}, {0.5, 16, 4}};
  profile.cells = {{{0, 3}, {0, 1}, {0, 2}}};
  const auto losses = CleanLosses(profile, Metric::kKl);
  ASSERT_TRUE(losses);
  EXPECT_EQ((*losses)[0], (std::vector<double>{3, 1.5, 1.5}));
}

TEST(LossesTest, InterpolatedOverKeepRatios) {
  const std::vector<Expert> experts = {{0.2, 8, 4}, {0.2, 16, 16}, {0.6, 8, 4}};
  const std::vector<double> losses = {0.8, 0.6, 0.4};
  EXPECT_NEAR(*LossAt(experts, losses, {0.3, 8, 4}), 0.7, 1e-12);
  EXPECT_EQ(*LossAt(experts, losses, {0.6, 8, 4}), 0.4);
  EXPECT_EQ(*LossAt(experts, losses, {0.1, 8, 4}), 0.8);
  EXPECT_EQ(*LossAt(experts, losses, {0.9, 8, 4}), 0.4);
  EXPECT_NEAR(*LossAt(experts, losses, {0.6, 16, 16}), 0.3, 1e-12) << "towards 0 at keep 1";
  EXPECT_EQ(*LossAt(experts, losses, {1.0, 16, 16}), 0);
  EXPECT_FALSE(LossAt(experts, losses, {0.5, 2, 2}));
}

// Two layers of two KV heads; only the second head of the first layer needs its tokens.
TEST(Heads, AreRoutedOneByOne) {
  Profile profile;
  profile.model = {"llama", "m", 2, {2, 64}, "0123456789abcdef"};
  profile.length = 8192;
  profile.chunks = profile.chunks_wanted = 1;
  profile.experts = {{0.05, 4, 4}, {1.0, 4, 4}};
  profile.cells = {{{1.0, 0.5}, {0.001, 0.001}}, {{0.01, 0.002}, {0.001, 0.001}}};  // l2, kl
  SolveRequest request;
  request.variant = Variant::k2dHeads;
  request.context_length = 16384;
  request.compression = 9;
  const auto unmeasured = Solve(profile, request);
  ASSERT_FALSE(unmeasured);
  EXPECT_NE(unmeasured.error().message.find("--heads"), std::string::npos);

  profile.head_cells.assign(4, {{0.01, 0.001}, {0.005, 0.0005}});
  profile.head_cells[1] = {{1.0, 0.5}, {0.005, 0.0005}};
  const auto solved = Solve(profile, request);
  ASSERT_TRUE(solved) << solved.error().message;
  const Plan& plan = solved->plan;
  ASSERT_EQ(plan.heads.size(), 4u);
  ASSERT_EQ(plan.layers.size(), 2u);
  EXPECT_EQ(plan.heads[1].keep, 1.0);
  EXPECT_EQ(plan.heads[0].keep, 0.05);
  EXPECT_EQ(plan.heads[2].keep, 0.05);
  EXPECT_DOUBLE_EQ(plan.layers[0].keep, 0.525);
  EXPECT_LE(plan.bytes, plan.budget_bytes);
  EXPECT_EQ(plan.bytes, PlanBytes(plan, 16384, 0).value_or(-1));
  EXPECT_NEAR(solved->loss, 0.001 * 3 + 0.0005, 1e-6);

  const auto parsed = ParsePlan(ToJson(plan), "heads");
  ASSERT_TRUE(parsed) << parsed.error().message;
  EXPECT_EQ(parsed->heads, plan.heads);
  // The same bytes cannot hold the head's tokens when its layer goes as a whole.
  request.variant = Variant::k2dHetero;
  const auto layers = Solve(profile, request);
  ASSERT_TRUE(layers) << layers.error().message;
  EXPECT_GT(layers->loss, 0.4);
}

}  // namespace
}  // namespace moend
