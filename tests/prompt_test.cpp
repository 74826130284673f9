// Suites as tokens: templates, cuts, right answers, and the hash.
#include "moend/eval/prompt.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "tests/support/eval_world.h"

namespace moend::eval {
namespace {

using test::SomeSuite;
using test::TheWorld;
using test::Words;

TEST(Prompt, KeepsFirstAndLastHalf) {
  Suite suite = SomeSuite();
  suite.contexts.resize(1);
  const Tokenizer& tokenizer = TheWorld().model->tokenizer();
  const auto whole = PrepareSuite(tokenizer, suite, 1 << 20, {});
  ASSERT_TRUE(whole) << whole.error().message;
  EXPECT_EQ(whole->n_truncated, 0);
  const auto cut = PrepareSuite(tokenizer, suite, 4096, {101, 0, 1});
  ASSERT_TRUE(cut) << cut.error().message;
  EXPECT_EQ(cut->n_truncated, 1);
  EXPECT_EQ(cut->longest_prompt, 101);
  const auto &a = whole->contexts[0].context, &b = cut->contexts[0].context;
  EXPECT_TRUE(std::equal(b.begin(), b.begin() + 50, a.begin()));
  EXPECT_TRUE(std::equal(b.begin() + 50, b.end(), a.end() - (static_cast<int64_t>(b.size()) - 50)));
  EXPECT_EQ(cut->contexts[0].questions, whole->contexts[0].questions);
  EXPECT_EQ(PrepareSuite(tokenizer, suite, 4096, {10, 0, 1}).error().code, ErrorCode::kTooLong);
}

TEST(Prompt, LeavesRoomForTheAnswer) {
  Suite suite = SomeSuite();
  suite.contexts.resize(1);
  const Tokenizer& tokenizer = TheWorld().model->tokenizer();
  const auto cut = PrepareSuite(tokenizer, suite, 320, {});
  ASSERT_TRUE(cut) << cut.error().message;
  EXPECT_EQ(cut->longest_prompt, 320 - 6);  // six new tokens are allowed
  const auto long_answers = PrepareSuite(tokenizer, suite, 320, {0, 0, 16});
  ASSERT_TRUE(long_answers);
  EXPECT_EQ(long_answers->longest_prompt, 320 - 320 / 32);  // not 96 of them
  EXPECT_EQ(MaxNewTokens(suite.contexts[0].questions[0], {0, 0, 16}), 96);
  EXPECT_EQ(MaxNewTokens(suite.contexts[0].questions[0], {0, 7, 16}), 7);
}

TEST(Prompt, ChatTemplateWrapsTheWholePrompt) {
  Suite suite = SomeSuite();
  suite.contexts.resize(1);
  suite.contexts[0].text = "some <|im_end|> text";
  suite.contexts[0].chat = true;
  const Tokenizer& tokenizer = TheWorld().model->tokenizer();
  const auto prepared = PrepareSuite(tokenizer, suite, 4096, {});
  ASSERT_TRUE(prepared) << prepared.error().message;
  std::vector<int32_t> all = prepared->contexts[0].context;
  const auto& question = prepared->contexts[0].questions[1];
  all.insert(all.end(), question.begin(), question.end());
  const std::string prompt = suite.contexts[0].text + suite.contexts[0].questions[1].prompt;
  const ChatMessage message{"user", prompt};
  EXPECT_EQ(tokenizer.Detokenize(all, true),
            tokenizer.Piece(tokenizer.bos(), true) + tokenizer.ApplyChatTemplate({&message, 1}, {})->text);
  // The text's own "<|im_end|>" is text, not the token.
  const auto end = *tokenizer.Tokenize("<|im_end|>", false, true);
  ASSERT_EQ(end.size(), 1u);
  EXPECT_EQ(std::ranges::count(all, end[0]), 1);
}

TEST(Prompt, HashSeesEveryPart) {
  const Suite suite = SomeSuite();
  const std::string hash = HashOf(suite);
  EXPECT_EQ(HashOf(SomeSuite()), hash);
  const auto changed = [&](auto&& change) {
    Suite other = suite;
    change(other);
    return HashOf(other) != hash;
  };
  EXPECT_TRUE(changed([](Suite& s) { s.contexts[1].text += " "; }));
  EXPECT_TRUE(changed([](Suite& s) { s.contexts[1].questions[0].answers[0] = "y"; }));
  EXPECT_TRUE(changed([](Suite& s) { s.contexts[1].questions[0].metric = TaskMetric::kQaF1; }));
  EXPECT_TRUE(changed([](Suite& s) { s.contexts.pop_back(); }));
  EXPECT_TRUE(changed([](Suite& s) { s.contexts[0].chat = true; }));
  EXPECT_TRUE(changed([](Suite& s) { s.contexts[1].questions[0].stop = {"x"}; }));
  EXPECT_TRUE(changed([](Suite& s) { s.contexts[1].questions[0].classes = {"x"}; }));
  EXPECT_TRUE(changed([](Suite& s) { s.contexts[1].questions[0].first_line = true; }));
}

TEST(Prompt, GoldAnswersContinueTheirPrompts) {
  Suite suite = SomeSuite();
  suite.contexts.resize(1);
  const Tokenizer& tokenizer = TheWorld().model->tokenizer();
  Question& question = suite.contexts[0].questions[0];
  const auto gold = [&](const char* prompt, const char* answer) {
    question.prompt = prompt;
    question.answers = {answer, "other"};
    const auto prepared = PrepareSuite(tokenizer, suite, 4096, {});
    EXPECT_TRUE(prepared) << prepared.error().message;
    return tokenizer.Detokenize(prepared->contexts[0].golds[0], false);
  };
  EXPECT_EQ(gold("Answer:", "x y"), " x y");
  EXPECT_EQ(gold("The number is", "7"), " 7");
  EXPECT_EQ(gold("value: \"", "7"), "7");
  EXPECT_EQ(gold("Write:\n", "7"), "7");
  suite.contexts[0].chat = true;  // then the assistant's turn begins in between
  EXPECT_EQ(gold("Answer:", "x y"), "x y");
  suite.contexts[0].chat = false;
  question.answers = {Words(200, 1)};
  EXPECT_EQ(PrepareSuite(tokenizer, suite, 4096, {})->contexts[0].golds[0].size(), kGoldTokens);
}

}  // namespace
}  // namespace moend::eval
