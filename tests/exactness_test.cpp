// Our graphs against libllama: the same file and tokens must give the same logits.
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <string>

#include "moend/model/model.h"
#include "tests/support/libllama_logits.h"
#include "tests/support/plain_runner.h"
#include "tests/support/test_model.h"

namespace moend::test {
namespace {

const std::string kReference = MOEND_SOURCE_DIR "/models/moend-reference-23m-q8_0.gguf";

struct Case {
  const char* name;
  TestModelOptions options;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

TestModelOptions Options(const char* architecture) {
  TestModelOptions o;
  o.architecture = architecture;
  // libllama rounds queries and probabilities to half floats, we do not; wider weights than necessary would
  // add roundings of their own.
  o.weight_type = GGML_TYPE_F32;
  return o;
}

TestModelOptions Scaled(const char* architecture, const char* scaling, float factor) {
  TestModelOptions o = Options(architecture);
  o.rope_scaling = scaling;
  o.rope_factor = factor;
  o.rope_original_context = 128;
  return o;
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  const auto add = [&](const char* name, TestModelOptions o) {
    o.seed = cases.size() + 1;
    cases.push_back({name, o});
  };
  TestModelOptions o = Options("llama");
  add("Llama", o);
  o.head_size = 48;  // heads * size != width
  o.n_heads = 6;
  o.n_kv_heads = 3;
  add("LlamaOddHeads", o);
  o = Options("llama");
  o.rope_freq_base = 500000.0f;
  o.rope_factors = true;
  add("Llama3FrequencyFactors", o);
  o.fused_qkv = o.biases = o.tied = true;
  add("LlamaFusedTiedBiased", o);
  add("LlamaLinear", Scaled("llama", "linear", 4.0f));
  add("LlamaYarn", Scaled("llama", "yarn", 4.0f));
  o = Scaled("llama", "yarn", 8.0f);
  o.rope_attn_factor = 1.25f;
  add("LlamaYarnAttentionFactor", o);
  add("LlamaFactorSaysNoType", Scaled("llama", "", 2.0f));
  add("LlamaScalingNone", Scaled("llama", "none", 2.0f));
  o = Options("qwen2");
  o.biases = true;
  add("Qwen2", o);
  o.tied = true;
  o.k_outlier = 12.0f;
  add("Qwen2TiedOutliers", o);
  o = Scaled("qwen2", "yarn", 4.0f);
  o.biases = true;
  add("Qwen2Yarn", o);
  add("Qwen3", Options("qwen3"));
  o = Scaled("qwen3", "yarn", 4.0f);
  o.tied = true;
  add("Qwen3YarnTied", o);
  o = Options("qwen3");
  o.head_size = 64;
  o.n_heads = 8;
  o.n_kv_heads = 1;
  add("Qwen3OneKvHead", o);
  return cases;
}

class Random : public testing::TestWithParam<Case> {};

TEST_P(Random, LogitsAreLibllamas) {
  const TempDir dir;
  const std::string path = dir / "model.gguf";
  ASSERT_TRUE(WriteTestModel(GetParam().options, path));
  const auto model = Model::Load(path);
  ASSERT_TRUE(model) << model.error().message;
  LogitDistance total;
  for (int64_t n : {1, 2, 63, 64, 65, 300}) {
    const std::vector<int32_t> tokens = RandomTokens(n, static_cast<uint64_t>(n));
    const auto want = LibllamaLogits(path, tokens);
    ASSERT_EQ(static_cast<int64_t>(want.size()), n);
    total.Add(Compare(want, PlainLogits(**model, tokens, 100)));
  }
  EXPECT_EQ(total.positions, 495);
  EXPECT_LT(total.mean_kl, 1e-4);
  EXPECT_LT(total.worst_kl, 1e-2);
  EXPECT_GE(total.top_share(), 0.995);
  RecordProperty("mean_kl", std::to_string(total.mean_kl));
  printf("mean %g worst %g top %g\n", total.mean_kl, total.worst_kl, total.top_share());
}

INSTANTIATE_TEST_SUITE_P(Models, Random, testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace moend::test
