// Pretrained models, as far as scripts/fetch-model has brought them: their predictions are libllama's, and
// what is measured on them is what it says. A model that is not here is skipped by name.
#include <gtest/gtest.h>

#include <cctype>
#include <filesystem>

#include "moend/eval/judge.h"
#include "moend/eval/perplexity.h"
#include "tests/support/libllama_logits.h"

namespace moend::eval {
namespace {

const char* const kText =
    "The ferry across the river had been out of service for eleven days. On the far bank somebody had hung a "
    "lantern on the mooring post, and the valley was narrow. int main(int argc, char** argv) { return argc > "
    "1; } "
    "| order | town | quantity |\n|---|---|---|\n| K-40182 | Riga | 17 |\n| A-11920 | Porto | 230 |\n";

class Pretrained : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    path_ = std::string(MOEND_SOURCE_DIR "/models/") + GetParam();
    if (!std::filesystem::exists(path_)) GTEST_SKIP() << GetParam() << " is not here (scripts/fetch-model)";
    auto model = Model::Load(path_, {.repack = false});
    ASSERT_TRUE(model) << model.error().message;
    model_ = *model;
    auto engine = Engine::Create(model_, {1, 512});
    ASSERT_TRUE(engine) << engine.error().message;
    engine_ = *engine;
    auto tokens = model_->tokenizer().Tokenize(kText, true, true);
    ASSERT_TRUE(tokens) << tokens.error().message;
    tokens_ = *tokens;
    ASSERT_GT(tokens_.size(), 64u);
  }
  std::string path_;
  std::shared_ptr<const Model> model_;
  std::shared_ptr<Engine> engine_;
  std::vector<int32_t> tokens_;
};

TEST_P(Pretrained, PredictsAsLibllamaDoes) {
  // On quantized weights the order of sums decides where activations round, and that moves predictions by
  // some thousandths of a nat: libllama's own two ways to compute attention say by how much.
  const auto want = test::LibllamaLogits(path_, tokens_);
  ASSERT_EQ(want.size(), tokens_.size());
  const auto noise = test::Compare(want, test::LibllamaLogits(path_, tokens_, true));
  ASSERT_GT(noise.mean_kl, 0);
  auto session = Session::Create(engine_, FullPlan(engine_->fingerprint(), 256), {256, ""});
  ASSERT_TRUE(session) << session.error().message;
  std::vector<float> hidden;
  ASSERT_TRUE(session->Prefill(tokens_, {}, &hidden));
  const auto n_vocab = static_cast<std::size_t>(model_->hparams().n_vocab);
  std::vector<float> logits(tokens_.size() * n_vocab);
  ASSERT_TRUE(engine_->Logits(hidden, logits));
  std::vector<std::vector<float>> got;
  for (std::size_t i = 0; i < tokens_.size(); ++i)
    got.emplace_back(logits.begin() + static_cast<std::ptrdiff_t>(i * n_vocab),
                     logits.begin() + static_cast<std::ptrdiff_t>((i + 1) * n_vocab));
  const auto distance = test::Compare(want, got);
  EXPECT_LT(distance.mean_kl, 2 * noise.mean_kl) << "libllama with itself: " << noise.mean_kl;
  EXPECT_GT(distance.top_share(), noise.top_share() - 0.05);
}

TEST_P(Pretrained, FewerBitsOfLibllamasCacheDivergeMore) {
  PerplexityOptions options{64, 1, {"q8_0", "q4_0"}};
  const auto results = Perplexity(engine_, tokens_, {}, options);
  ASSERT_TRUE(results) << results.error().message;
  EXPECT_NEAR((*results)[0].nll.mean, (*results)[1].nll_base.mean, 0.05);
  EXPECT_GT((*results)[1].kld.mean, 0);
  EXPECT_GT((*results)[2].kld.mean, (*results)[1].kld.mean);
}

TEST_P(Pretrained, HasATokenForEveryLetter) {
  const auto judge = Judge::Create(engine_);
  ASSERT_TRUE(judge) << judge.error().message;
  std::vector<float> logits(static_cast<std::size_t>(model_->hparams().n_vocab), 0.0f);
  EXPECT_EQ(judge->Letters(logits).size(), 4u);
}

INSTANTIATE_TEST_SUITE_P(Models, Pretrained,
                         testing::Values("smollm2-135m-instruct-q4_1.gguf",
                                         "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
                                         "gemma-3-270m-q4_k_m.gguf"),
                         [](const auto& info) {
                           std::string name = info.param;
                           name = name.substr(0, name.find("-instruct"));
                           std::erase_if(name,
                                         [](char c) { return !std::isalnum(static_cast<unsigned char>(c)); });
                           return name;
                         });

}  // namespace
}  // namespace moend::eval
