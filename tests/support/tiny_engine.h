// An engine on a small model with random weights, one thread.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "moend/engine/engine.h"
#include "tests/support/test_model.h"

namespace moend::test {

struct TinyEngine {
  TempDir dir;
  std::shared_ptr<Engine> engine;
  explicit TinyEngine(const TestModelOptions& options = {}, int64_t block_tokens = 64) {
    const std::string path = dir / "tiny.gguf";
    EXPECT_TRUE(WriteTestModel(options, path));
    auto model = Model::Load(path);
    EXPECT_TRUE(model) << model.error().message;
    auto made = Engine::Create(*model, {1, block_tokens});
    EXPECT_TRUE(made) << made.error().message;
    engine = *made;
  }
  const HyperParams& hparams() const { return engine->model().hparams(); }
};

}  // namespace moend::test
