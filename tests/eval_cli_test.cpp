// moend eval, perplexity and report as a user meets them.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moend/base/file.h"
#include "moend/eval/report_assets.h"
#include "tests/support/process.h"
#include "tests/support/test_model.h"

namespace moend {
namespace {

using test::Contains;
using test::Moend;

struct SuiteWorld {
  test::TempDir dir;
  std::string model = dir / "model.gguf", suite = dir / "suite.jsonl", text = dir / "text.txt";
  SuiteWorld() {
    EXPECT_TRUE(test::WriteTestModel({}, model));
    std::string words;
    for (int i = 0; i < 200; ++i) words += fmt::format("word{} ", i * 31 % 97);
    EXPECT_TRUE(WriteFileAtomically(text, words));
    const nlohmann::json question = {{"dataset", "one"},
                                     {"input", "What?"},
                                     {"answers", {"x"}},
                                     {"max_new_tokens", 4},
                                     {"metric", "exact"}};
    const nlohmann::json row = {{"_id", "a"}, {"context", words}, {"questions", {question, question}}};
    EXPECT_TRUE(WriteFileAtomically(suite, row.dump() + "\n{broken\n"));
  }
};

TEST(EvalCommand, ScoresSavesContinuesAndReports) {
  const SuiteWorld world;
  const std::string out = world.dir / "out.json", page = world.dir / "report.html";
  const std::vector<std::string> command = {"eval",      "-m",      world.model, "--suite", world.suite,
                                            "--variant", "full,q4", "-o",        out};
  const auto first = Moend(command);
  ASSERT_EQ(first.code, 0) << first.err;
  EXPECT_TRUE(Contains(first.out, " one (n=2) |")) << first.out;
  EXPECT_TRUE(Contains(first.err, "suite.jsonl:2: the row is no JSON")) << first.err;
  const auto saved = nlohmann::json::parse(*ReadFile(out));
  ASSERT_EQ(saved["runs"].size(), 2u);
  EXPECT_EQ(saved["runs"][1]["variant"], "q4");
  EXPECT_EQ(saved["runs"][1]["answers"].size(), 2u);
  EXPECT_EQ(saved["n_malformed"], 1);
  EXPECT_EQ(saved["complete"], true);

  const auto again = Moend(command);
  EXPECT_EQ(again.code, 0) << again.err;
  EXPECT_EQ(again.out, first.out);

  auto other = command;
  other.insert(other.end(), {"--mode", "aware"});
  const auto refused = Moend(other);
  EXPECT_EQ(refused.code, 1);
  EXPECT_TRUE(Contains(refused.err, "another mode")) << refused.err;
  other.push_back("--restart");
  EXPECT_EQ(Moend(other).code, 0);

  if (eval::assets::plots.empty()) GTEST_SKIP() << "built without the plotting library";
  const auto report = Moend({"report", out, "-o", page});
  ASSERT_EQ(report.code, 0) << report.err;
  EXPECT_TRUE(ReadFile(page)->starts_with("<!doctype html>"));
}

TEST(EvalCommand, WrongUseIsToldBeforeTheWork) {
  const SuiteWorld world;
  const auto fails = [&](std::vector<std::string> arguments, int code, const std::string& words) {
    const auto result = Moend(arguments);
    EXPECT_EQ(result.code, code) << result.err;
    EXPECT_EQ(result.out, "");
    EXPECT_TRUE(Contains(result.err, words)) << result.err;
  };
  const std::string& m = world.model;
  fails({"eval", "-m", m, "--suite", world.dir / "none.jsonl"}, 1, "none.jsonl");
  fails({"eval", "-m", m, "--suite", world.suite, "--variant", "5d"}, 2, "2d_hetero");
  fails({"eval", "-m", m, "--suite", world.suite, "--variant", "1d"}, 1, "needs a profile");
  fails({"eval", "-m", m, "--suite", world.suite, "-o", world.dir / "no/such/folder/out.json"}, 1,
        "no/such/folder");
  fails({"perplexity", "-m", m, "-f", world.text, "-c", "100000"}, 1, "100000 tokens");
  fails({"perplexity", "-m", m, "-f", world.text, "--llama-cache", "q9_0"}, 2, "q8_0");
  fails({"perplexity", "-m", m, "-f", world.text, "--profile", world.text}, 2, "--compression");
  fails({"eval", "-m", m, "--suite", world.suite, "--chat-template"}, 1, "no chat template");
  fails({"eval", "-m", m, "--suite", world.suite, "--chat-template=maybe"}, 2, "always");
  fails({"report", world.suite, "-o", world.dir / "page.html"}, 1, "suite.jsonl");
}

TEST(PerplexityCommand, Prints) {
  const SuiteWorld world;
  const auto result = Moend({"perplexity", "-m", world.model, "-f", world.text, "-c", "64", "--chunks", "2"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_TRUE(Contains(result.out, "Mean PPL")) << result.out;
  EXPECT_TRUE(Contains(result.out, "62 in 2 chunks")) << result.out;
  const std::string json = world.dir / "kl.json";
  const auto several = Moend({"perplexity", "-m", world.model, "-f", world.text, "-c", "512", "--chunks", "1",
                              "--variant", "q8,q2", "--llama-cache", "q8_0", "-o", json});
  ASSERT_EQ(several.code, 0) << several.err;
  for (const char* row : {"| full ", "| q8 ", "| q2 ", "| llama.cpp q8_0 "})
    EXPECT_TRUE(Contains(several.out, row)) << several.out;
  const auto saved = nlohmann::json::parse(*ReadFile(json));
  ASSERT_EQ(saved["results"].size(), 4u);
  EXPECT_EQ(saved["text"], "text.txt");
  EXPECT_GT(saved["results"][2]["kld"]["mean"], saved["results"][1]["kld"]["mean"]);
}

// As llama-perplexity: "<|eos|>" in a text is seven letters unless it is said to be a token.
TEST(PerplexityCommand, SpecialTokensAreTextUnlessAskedFor) {
  const SuiteWorld world;
  std::string text;
  for (int i = 0; i < 60; ++i) text += fmt::format("word{}<|eos|>", i);
  ASSERT_TRUE(WriteFileAtomically(world.text, text));
  const auto tokens = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"perplexity", "-m", world.model, "-f", world.text, "-c", "16"});
    const auto result = Moend(more);
    EXPECT_EQ(result.code, 0) << result.err;
    const auto at = result.out.find("Tokens");
    return std::stoll(result.out.substr(result.out.find(':', at) + 1));
  };
  EXPECT_GT(tokens({}), tokens({"--parse-special"}) + 60);
}

}  // namespace
}  // namespace moend
