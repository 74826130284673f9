// A small random model with an engine, and a small suite, for tests of the evaluation.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "moend/engine/engine.h"
#include "moend/eval/suite.h"
#include "tests/support/test_model.h"

namespace moend::test {

// One model for all tests; its answers mean nothing, but they are the same every time.
struct EvalWorld {
  TempDir dir;
  std::string path = dir / "model.gguf";
  std::shared_ptr<const Model> model;
  std::shared_ptr<Engine> engine;
  EvalWorld() {
    TestModelOptions options;
    options.chat_template = true;
    EXPECT_TRUE(WriteTestModel(options, path));
    auto loaded = Model::Load(path);
    EXPECT_TRUE(loaded) << loaded.error().message;
    if (!loaded) return;
    model = *loaded;
    auto made = Engine::Create(model, {1, 64});
    EXPECT_TRUE(made) << made.error().message;
    if (made) engine = *made;
  }
};
inline EvalWorld& TheWorld() {
  static EvalWorld world;
  return world;
}

inline std::string Words(int n, int seed) {
  std::string text;
  for (int i = 0; i < n; ++i) text += fmt::format("w{} ", (i * 7919 + seed * 104729) % 997);
  return text;
}

inline eval::Suite SomeSuite() {
  eval::Suite suite;
  suite.path = "some.jsonl";
  suite.name = "some";
  for (int c = 0; c < 3; ++c) {
    eval::Context context;
    context.id = fmt::format("c{}", c);
    context.text = Words(120 + 20 * c, c);
    for (int q = 0; q < 2; ++q) {
      eval::Question question;
      question.id = fmt::format("c{}#{}", c, q);
      question.dataset = q == 0 ? "one" : "two";
      question.prompt = fmt::format("Question {}?\nAnswer:", q);
      question.answers = {"x"};
      question.max_new_tokens = 6;
      context.questions.push_back(question);
    }
    suite.contexts.push_back(context);
  }
  return suite;
}

}  // namespace moend::test
