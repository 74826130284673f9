// Penalties and bans in front of the sampler.
#include "moend/serve/picker.h"

#include <gtest/gtest.h>

#include <cmath>

namespace moend::serve {
namespace {

PickOptions Greedy() {
  PickOptions o;
  o.sampler.temperature = 0;
  return o;
}

TEST(Picker, RepetitionIsPenalizedAsLlamaCppDoes) {
  PickOptions o = Greedy();
  o.repeat_penalty = 2;
  // 4 / 2 < 3: the prompt's token loses. A negative logit is multiplied.
  EXPECT_EQ(Picker(o, {}, std::vector<int32_t>{0}).Pick(std::vector<float>{4, 3, 1}).token, 1);
  EXPECT_EQ(Picker(o, {}, std::vector<int32_t>{0}).Pick(std::vector<float>{-1, -1.5f, -9}).token, 1);
  EXPECT_EQ(Picker(o, {}, {}).Pick(std::vector<float>{4, 3, 1}).token, 0);
  // Once, however often it was there; and its own picks count.
  EXPECT_EQ(Picker(o, {}, std::vector<int32_t>{0, 0, 0}).Pick(std::vector<float>{4, 1.5f, 1}).token, 0);
  Picker twice(o, {}, {});
  EXPECT_EQ(twice.Pick(std::vector<float>{4, 3, 1}).token, 0);
  EXPECT_EQ(twice.Pick(std::vector<float>{4, 3, 1}).token, 1);
  // It looks back so far and no further.
  o.repeat_last_n = 1;
  EXPECT_EQ(Picker(o, {}, std::vector<int32_t>{0, 2}).Pick(std::vector<float>{4, 3, 1}).token, 0);
  o.repeat_last_n = 0;
  EXPECT_EQ(Picker(o, {}, std::vector<int32_t>{0}).Pick(std::vector<float>{4, 3, 1}).token, 0);
  o.repeat_last_n = -1;
  EXPECT_EQ(Picker(o, {}, std::vector<int32_t>{0, 2, 2}).Pick(std::vector<float>{4, 3, 1}).token, 1);
}

TEST(Picker, EndsOnlyWhenItMay) {
  const std::vector<int32_t> ends = {0};
  const std::vector<float> logits = {9, 8, 7};
  PickOptions o = Greedy();
  EXPECT_EQ(Picker(o, ends, {}).Pick(logits).token, 0);
  o.ignore_eos = true;
  EXPECT_EQ(Picker(o, ends, {}).Pick(logits).token, 1);
  o = Greedy();
  o.stop_tokens = {1};
  o.min_tokens = 2;
  o.top_logprobs = 3;
  Picker p(o, ends, {});
  EXPECT_TRUE(p.Ends(0) && p.Ends(1) && !p.Ends(2));
  const Picked first = p.Pick(logits);
  EXPECT_EQ(first.token, 2);
  EXPECT_EQ(first.logprob, 0);
  for (const auto& [token, logprob] : first.top) EXPECT_TRUE(std::isfinite(logprob));
  EXPECT_EQ(p.Pick(logits).token, 2);
  EXPECT_EQ(p.Pick(logits).token, 0);
}

}  // namespace
}  // namespace moend::serve
