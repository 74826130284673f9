// Profiles, plans and budgets of models with sliding layers: these are a fixed cost, the same in every plan.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "moend/calibrate/calibrate.h"
#include "moend/calibrate/trials.h"
#include "moend/eval/methods.h"
#include "moend/plan/describe.h"
#include "moend/solve/losses.h"
#include "moend/solve/solve.h"
#include "tests/support/test_model.h"

namespace moend {
namespace {

constexpr int64_t kWindow = 100;

// Layers 0, 2 and 3 slide.
Profile MakeProfile(bool heads = true) {
  Profile p;
  p.model = {"gemma3", "tiny", 5, {2, 64}, "0123456789abcdef", {kWindow, 0, kWindow, kWindow, 0}};
  p.scorer = "keydiff";
  p.length = 8192;
  p.chunks = p.chunks_wanted = 1;
  for (const double keep : {0.05, 0.1, 0.25, 0.5, 1.0})
    for (const int bits : {2, 4, 8, 16}) p.experts.push_back({keep, bits, bits});
  for (int64_t l = 0; l < p.model.n_layers; ++l) {
    std::vector<ProfileCell> row;
    for (const Expert& e : p.experts) {
      const double loss = (1 - e.keep) * static_cast<double>(1 + l) + std::exp2(-2.0 * e.k_bits);
      row.push_back(p.model.window(l) > 0 ? ProfileCell() : ProfileCell{loss, 2 * loss});
    }
    p.cells.push_back(row);
    for (int h = 0; heads && h < 2; ++h) p.head_cells.push_back(row);
  }
  return p;
}

TEST(SlidingPlan, FilesSayWhichLayersSlide) {
  const Profile profile = MakeProfile();
  const auto again = ParseProfile(ToJson(profile), "p");
  ASSERT_TRUE(again) << again.error().message;
  EXPECT_EQ(again->model, profile.model);
  EXPECT_EQ(ToJson(*again), ToJson(profile));
  const Plan plan = FullPlan(profile.model, 4096);
  const auto plan_again = ParsePlan(ToJson(plan), "p");
  ASSERT_TRUE(plan_again) << plan_again.error().message;
  EXPECT_EQ(plan_again->model, plan.model);
  // Files of models whose layers are all full do not change.
  Fingerprint plain = profile.model;
  plain.windows.clear();
  EXPECT_EQ(ToJson(FullPlan(plain, 4096)).find("windows"), std::string::npos);
  EXPECT_FALSE(CheckSameModel(plain, profile.model, "p"));

  const auto refused = [&](const std::string& from, const std::string& to, const char* says) {
    std::string text = ToJson(plan);
    const std::size_t at = text.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    text.replace(at, from.size(), to);
    const auto bad = ParsePlan(text, "the file");
    ASSERT_FALSE(bad) << to;
    EXPECT_NE(bad.error().message.find(says), std::string::npos) << bad.error().message;
  };
  refused("[100,0,100,100,0]", "[100,0,100,100]", "windows");
  refused("[100,0,100,100,0]", "[100,0,100,100,-2]", "windows");
  refused("[100,0,100,100,0]", "[100,0,100,100,1e30]", "windows");
  refused("[100,0,100,100,0]", "\"some\"", "windows");
  refused("\"keep\":1.0", "\"keep\":0.5", "layer 0");
}

TEST(SlidingPlan, WindowsCountAsWindows) {
  const Fingerprint model = MakeProfile().model;
  constexpr int64_t kToken = 2 * 2 * 64 * 2;  // bytes of K and V of one layer
  EXPECT_EQ(FullBytes(model, 60), 5 * 60 * kToken);
  EXPECT_EQ(FullBytes(model, 1000), (2 * 1000 + 3 * kWindow) * kToken);
  EXPECT_EQ(WindowBytes(model.shape, kWindow, 30).value(), 31 * kToken);
  // 100 + 16 tokens in whole blocks of 16.
  EXPECT_EQ(WindowBytes(model.shape, kWindow, 1 << 20).value(), 128 * kToken);
  EXPECT_FALSE(WindowBytes(model.shape, -1, 10));
  EXPECT_FALSE(WindowBytes(model.shape, kWindow, -1));
  Plan plan = FullPlan(model, 1000);
  CompressAlike(plan, {0.5, 4, 4});
  EXPECT_EQ(plan.layers[0], Expert{});
  EXPECT_EQ(plan.layers[1], (Expert{0.5, 4, 4}));
  const int64_t compressed = LayerBytes(model.shape, plan.layers[1], plan.guard, 1000, 0).value();
  EXPECT_EQ(PlanBytes(plan, 1000, 0).value(), 2 * compressed + 3 * 128 * kToken);
  for (const Expert& e : plan.layers) plan.heads.insert(plan.heads.end(), 2, e);
  const int64_t head = LayerBytes({1, 64}, plan.layers[1], plan.guard, 1000, 0).value();
  EXPECT_EQ(PlanBytes(plan, 1000, 0).value(), 4 * head + 3 * 128 * kToken);
}

// Layers 0 and 3 hold a state of 1 MiB, layer 2 slides.
TEST(SlidingPlan, StatesCountAsTheyAre) {
  Profile profile = MakeProfile();
  Fingerprint& model = profile.model;
  constexpr int64_t kState = Fingerprint::kHoldsState;
  model.windows = {kState, 0, kWindow, kState, 0};
  model.state_bytes = 1 << 20;
  constexpr int64_t kToken = 2 * 2 * 64 * 2;
  EXPECT_EQ(FullBytes(model, 1000), (2 * 1000 + kWindow) * kToken + (2 << 20));
  EXPECT_EQ(model.sliding_layers(), 1);
  EXPECT_EQ(model.state_layers(), 2);
  Plan plan = FullPlan(model, 1000);
  CompressAlike(plan, {0.5, 4, 4});
  EXPECT_EQ(plan.layers[3], Expert{});
  const int64_t compressed = LayerBytes(model.shape, plan.layers[1], plan.guard, 1000, 0).value();
  EXPECT_EQ(PlanBytes(plan, 1000, 0).value(), 2 * compressed + 128 * kToken + (2 << 20));
  for (const Expert& e : plan.layers) plan.heads.insert(plan.heads.end(), 2, e);
  const int64_t head = LayerBytes({1, 64}, plan.layers[1], plan.guard, 1000, 0).value();
  EXPECT_EQ(PlanBytes(plan, 1000, 0).value(), 4 * head + 128 * kToken + (2 << 20));

  const auto again = ParseProfile(ToJson(profile), "p");
  ASSERT_TRUE(again) << again.error().message;
  EXPECT_EQ(again->model, model);
  const std::string text = ToJson(profile);
  for (const auto& [from, to] : {std::pair{"\"state_bytes\":1048576", "\"state_bytes\":1048577"},
                                 {"\"state_bytes\":1048576", "\"state_bytes\":0"},
                                 {"\"state_bytes\":1048576", "\"state\":1"},
                                 {"[-1,0,100,-1,0]", "[-2,0,100,-1,0]"}}) {
    std::string bad = text;
    const auto at = bad.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    EXPECT_FALSE(ParseProfile(bad.replace(at, std::string(from).size(), to), "p")) << to;
  }
  for (const Variant variant :
       {Variant::kFull, Variant::k1d, Variant::k2d, Variant::k2dHetero, Variant::k2dHeads}) {
    SolveRequest request;
    request.variant = variant;
    request.context_length = 16384;
    request.compression = variant == Variant::kFull ? 0 : 3;
    const auto solved = Solve(profile, request);
    ASSERT_TRUE(solved) << Name(variant) << ": " << solved.error().message;
    EXPECT_TRUE(CheckFixedLayers(solved->plan, "p")) << Name(variant);
    EXPECT_EQ(solved->plan.bytes, PlanBytes(solved->plan, 16384, 0).value());
    EXPECT_NE(DescribePlan(solved->plan).find("state"), std::string::npos);
  }
  EXPECT_NE(DescribeProfile(profile).find("holds a state"), std::string::npos);
  plan.layers[0] = {0.5, 4, 4};
  plan.heads.clear();
  EXPECT_FALSE(CheckFixedLayers(plan, "p"));
}

TEST(SlidingPlan, EveryVariantLeavesSlidingLayersAlone) {
  const Profile profile = MakeProfile();
  for (const Variant variant : {Variant::kFull, Variant::k1d, Variant::k2dUniform, Variant::k2d,
                                Variant::k2dHetero, Variant::k2dHeads})
    for (const Solver solver : {Solver::kGreedy, Solver::kHull, Solver::kExact}) {
      SolveRequest request;
      request.variant = variant;
      request.solver = solver;
      request.context_length = 16384;
      request.compression = variant == Variant::kFull ? 0 : 7;
      const auto solved = Solve(profile, request);
      ASSERT_TRUE(solved) << Name(variant) << ": " << solved.error().message;
      const Plan& plan = solved->plan;
      EXPECT_TRUE(CheckFixedLayers(plan, "p")) << Name(variant);
      EXPECT_EQ(plan.bytes, PlanBytes(plan, 16384, 0).value());
      if (variant != Variant::kFull) {
        EXPECT_LE(static_cast<double>(plan.bytes), static_cast<double>(FullBytes(profile.model, 16384)) / 7);
      }
      const auto again = ParsePlan(ToJson(plan), "p");
      ASSERT_TRUE(again) << again.error().message;
      EXPECT_EQ(again->layers, plan.layers);
      if (variant == Variant::k2dUniform) continue;  // bits that the profile lacks
      ASSERT_EQ(std::ssize(plan.predicted), 5);
      for (const std::size_t l : {0u, 2u, 3u}) EXPECT_EQ(plan.predicted[l], 0);
      const std::string text = DescribePlan(plan);
      EXPECT_NE(text.find("window"), std::string::npos) << text;
    }
}

// The least budget that is named has the windows in it, and suffices.
TEST(SlidingPlan, TheSmallestBudgetHasTheWindowsInIt) {
  const Profile profile = MakeProfile();
  SolveRequest request;
  request.context_length = 2000;
  request.compression = 1000;
  const auto refused = Solve(profile, request);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kBudget);
  const int64_t windows = 3 * WindowBytes(profile.model.shape, kWindow, 2000).value();
  const int64_t least =
      windows + 2 * LayerBytes(profile.model.shape, profile.experts[0], profile.guard, 2000, 0).value();
  EXPECT_NE(refused.error().message.find(fmt::format("{} bytes", least)), std::string::npos)
      << refused.error().message;
  request.compression = 0;
  request.budget_bytes = least;
  EXPECT_TRUE(Solve(profile, request));
  request.budget_bytes = least - 1;
  EXPECT_FALSE(Solve(profile, request));
}

// Calibration asks for the share that can be had.
TEST(SlidingPlan, FullLayersAreCompressedByThemselves) {
  const Profile profile = MakeProfile();
  SolveRequest request;
  request.context_length = 2000;
  CompressFullLayers(profile.model, 8, request);
  EXPECT_EQ(request.compression, 0);
  EXPECT_EQ(request.budget_bytes, 3 * WindowBytes(profile.model.shape, kWindow, 2000).value() +
                                      2 * FullLayerBytes(profile.model.shape, 2000) / 8);
  EXPECT_TRUE(Solve(profile, request));
  Fingerprint plain = profile.model;
  plain.windows.clear();
  CompressFullLayers(plain, 8, request);
  EXPECT_EQ(request.compression, 8);
  EXPECT_EQ(request.budget_bytes, 0);
}

TEST(SlidingPlan, AModelOfNothingButSlidingLayers) {
  Profile profile = MakeProfile();
  profile.model.windows.assign(5, kWindow);
  SolveRequest request;
  request.context_length = 2000;
  request.budget_bytes = 1 << 30;
  request.metric = Metric::kL2;
  for (auto* table : {&profile.cells, &profile.head_cells})
    for (auto& row : *table) row.assign(row.size(), {});
  for (const Variant variant : {Variant::k1d, Variant::k2dHetero, Variant::k2dHeads}) {
    request.variant = variant;
    const auto solved = Solve(profile, request);
    ASSERT_TRUE(solved) << solved.error().message;
    EXPECT_EQ(solved->plan.bytes, 5 * WindowBytes(profile.model.shape, kWindow, 2000).value());
  }
}

TEST(SlidingPlan, HeatMapsSayWhichLayersSlide) {
  const std::string text = DescribeProfile(MakeProfile());
  EXPECT_NE(text.find("5 layers of which 3 slide"), std::string::npos) << text;
  EXPECT_NE(text.find("layer 0    sees the newest 100 tokens only"), std::string::npos) << text;
  EXPECT_EQ(text.find("layer 1    sees"), std::string::npos) << text;
}

TEST(SlidingPlan, EveryMethodOfAnEvaluation) {
  const Profile profile = MakeProfile();
  eval::MethodRequest request;
  request.variants = eval::MethodNames();
  request.context_length = 16384;
  request.compressions = {4, 8};
  std::vector<std::string> skipped;
  const auto methods = eval::MakeMethods(profile.model, &profile, request, skipped);
  ASSERT_TRUE(methods) << methods.error().message;
  EXPECT_GT(methods->size(), 12u);
  for (const eval::Method& m : *methods) {
    EXPECT_TRUE(CheckFixedLayers(m.plan, m.variant)) << m.variant;
    EXPECT_EQ(m.plan.bytes, PlanBytes(m.plan, 16384, 0).value()) << m.variant;
  }
}

// Calibration, solving, refinement and sessions on models that have it all.
class SlidingCalibration : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const std::string architecture = GetParam();
    const auto options = architecture.starts_with("qwen") ? test::HybridModelOptions(architecture)
                                                          : test::SlidingModelOptions(architecture, 60);
    ASSERT_TRUE(test::WriteTestModel(options, dir_ / "m.gguf"));
    engine_ = Engine::Create(Model::Load(dir_ / "m.gguf").value(), {1, 128}).value();
    for (uint64_t seed : {1, 2}) chunks_.push_back(test::RandomTokens(700, seed));
  }
  CalibrateOptions Options(ProfileMethod method) const {
    CalibrateOptions options;
    options.method = method;
    options.most_copy_loss = 100;
    options.length = 700;
    options.evaluated = 40;
    options.chunks = 0;
    options.heads = true;
    options.scorer = method == ProfileMethod::kLogits ? kAutoScorer : kReconstructScorer;
    options.experts = {{0.1, 2, 2}, {0.1, 16, 16}, {0.3, 4, 4}, {0.3, 16, 16},
                       {1.0, 2, 2}, {1.0, 4, 4},   {1.0, 8, 8}, {1.0, 16, 16}};
    return options;
  }
  test::TempDir dir_;
  std::shared_ptr<Engine> engine_;
  std::vector<std::vector<int32_t>> chunks_;
};

TEST_P(SlidingCalibration, MeasuresFullLayersOnly) {
  for (const ProfileMethod method : {ProfileMethod::kLogits, ProfileMethod::kReconstruction}) {
    const auto profile = Calibrate(engine_, chunks_, Options(method), {}, {}, {});
    ASSERT_TRUE(profile) << profile.error().message;
    const int64_t heads = profile->model.shape.n_kv_heads;
    for (int64_t l = 0; l < profile->model.n_layers; ++l) {
      const bool slides = profile->model.window(l) > 0;
      EXPECT_EQ(slides, l % 2 == 0);
      const auto lost = [&](const std::vector<ProfileCell>& row) {
        return std::ranges::any_of(row, [](const ProfileCell& c) { return c.kl > 0 && c.l2 > 0; });
      };
      EXPECT_NE(lost(profile->cells[static_cast<std::size_t>(l)]), slides) << l;
      for (int64_t h = 0; h < heads; ++h)
        EXPECT_NE(lost(profile->head_cells[static_cast<std::size_t>(l * heads + h)]), slides) << l;
    }
    if (method == ProfileMethod::kReconstruction) {
      // As short as the texts are: the full layers alone are asked for.
      EXPECT_GE(profile->checks.size(), 2u);
    }
    const auto again = ParseProfile(ToJson(*profile), "p");
    ASSERT_TRUE(again) << again.error().message;
    SolveRequest request;
    request.variant = Variant::k2dHeads;
    request.context_length = 700;
    request.compression = 2;
    const auto solved = Solve(*again, request);
    ASSERT_TRUE(solved) << solved.error().message;
    auto session = Session::Create(engine_, solved->plan);
    ASSERT_TRUE(session) << session.error().message;
    ASSERT_TRUE(session->Prefill(chunks_[0]));
    EXPECT_LE(session->stats().bytes, solved->plan.bytes);
    for (int i = 0; i < 150; ++i) ASSERT_TRUE(session->Decode(i));
  }
}

TEST_P(SlidingCalibration, PlansAreValidatedAndRefined) {
  const auto profile = Calibrate(engine_, chunks_, Options(ProfileMethod::kLogits), {}, {}, {});
  ASSERT_TRUE(profile) << profile.error().message;
  auto trials = Trials::Create(engine_, chunks_, *profile, 40, {});
  ASSERT_TRUE(trials) << trials.error().message;
  for (const Rows rows : {Rows::kLayers, Rows::kHeads}) {
    ValidateOptions validate;
    validate.rows = rows;
    validate.plans = 6;
    validate.least = 2;
    validate.most = 4;
    validate.context_length = 4096;
    const auto result = Validate(*trials, *profile, validate, {});
    ASSERT_TRUE(result) << result.error().message;
    Plan plan = FullPlan(profile->model, 4096);
    for (const ValidatedPlan& p : result->plans) {
      (rows == Rows::kLayers ? plan.layers : plan.heads) = p.experts;
      const auto bytes = static_cast<double>(PlanBytes(plan, 4096, 0).value());
      EXPECT_LE(bytes, static_cast<double>(FullBytes(profile->model, 4096)) / p.compression);
      EXPECT_GT(p.measured, 0);
      for (std::size_t row = 0; row < p.experts.size(); ++row)
        ASSERT_TRUE(WindowOfRow(profile->model, rows, row) == 0 || p.experts[row] == Expert{});
    }
    SolveRequest request;
    request.variant = rows == Rows::kHeads ? Variant::k2dHeads : Variant::k2dHetero;
    request.context_length = 4096;
    request.compression = 3;
    const auto solved = Solve(*profile, request);
    ASSERT_TRUE(solved) << solved.error().message;
    RefineOptions options;
    options.rows = rows;
    options.seconds = 1;
    const auto refined = Refine(*trials, *profile, solved->plan, options, {});
    ASSERT_TRUE(refined) << refined.error().message;
    EXPECT_LE(refined->after, refined->before);
    EXPECT_LE(refined->plan.bytes, solved->plan.budget_bytes);
    EXPECT_TRUE(CheckFixedLayers(refined->plan, "the refined plan"));
  }
}

INSTANTIATE_TEST_SUITE_P(All, SlidingCalibration,
                         testing::Values("gemma2", "gemma3", "gpt-oss", "qwen3next", "qwen35"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::erase(name, '-');
                           return name;
                         });

}  // namespace
}  // namespace moend
