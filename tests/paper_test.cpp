// The paper's calibration.
#include "moend/calibrate/paper.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "moend/solve/solve.h"
#include "tests/support/test_model.h"

namespace moend {
namespace {

TEST(Paper, ExpertsAreThePapers) {
  const auto experts = PaperExperts();
  EXPECT_EQ(experts.size(), 54u);
  EXPECT_TRUE(std::is_sorted(experts.begin(), experts.end()));
  EXPECT_EQ(experts.back(), Expert{});
}

TEST(Paper, ErrorsFallWithBitsAndTokensAndOnlyL2CanBeSolved) {
  const test::TempDir dir;
  const std::string path = dir / "m.gguf";
  ASSERT_TRUE(test::WriteTestModel({}, path));
  const auto model = Model::Load(path);
  ASSERT_TRUE(model);
  const auto engine = Engine::Create(*model, {1, 128});
  ASSERT_TRUE(engine);
  const auto made = CalibrateLikePaper(**engine, test::RandomTokens(kPaperTokens, 4));
  ASSERT_TRUE(made) << made.error().message;
  const auto profile = ParseProfile(ToJson(*made), "paper");
  ASSERT_TRUE(profile) << profile.error().message;
  const auto at = [&](std::size_t layer, const Expert& e) {
    const auto i = std::find(profile->experts.begin(), profile->experts.end(), e) - profile->experts.begin();
    return profile->cells[layer][static_cast<std::size_t>(i)].l2;
  };
  ASSERT_EQ(profile->cells.size(), 3u);
  for (std::size_t l = 0; l < 3; ++l) {
    EXPECT_EQ(at(l, {1, 16, 16}), 0);
    EXPECT_GT(at(l, {1, 8, 8}), 0);
    EXPECT_LT(at(l, {1, 8, 8}), at(l, {1, 4, 4}));
    EXPECT_LT(at(l, {1, 16, 8}), at(l, {1, 16, 4}));
    EXPECT_LT(at(l, {1, 4, 4}), 0.3);
    EXPECT_LT(at(l, {0.9, 16, 16}), at(l, {0.25, 16, 16}));
    EXPECT_GT(at(l, {0.1, 16, 16}), 0.1);
    for (const ProfileCell& cell : profile->cells[l]) EXPECT_EQ(cell.kl, 0);
  }
  SolveRequest request;
  request.context_length = 8192;
  request.compression = 6;
  const auto by_kl = Solve(*profile, request);
  ASSERT_FALSE(by_kl);
  EXPECT_NE(by_kl.error().message.find("l2"), std::string::npos);
  request.metric = Metric::kL2;
  const auto by_l2 = Solve(*profile, request);
  ASSERT_TRUE(by_l2) << by_l2.error().message;
  EXPECT_LE(by_l2->plan.bytes, by_l2->plan.budget_bytes);
  EXPECT_FALSE(CalibrateLikePaper(**engine, test::RandomTokens(1, 1)));
  EXPECT_FALSE(CalibrateLikePaper(**engine, test::RandomTokens(65, 1)));
}

}  // namespace
}  // namespace moend
