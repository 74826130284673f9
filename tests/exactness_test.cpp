// Our graphs against libllama: the same file and tokens must give the same logits.
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
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
void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name;
}

TestModelOptions Options(const char* architecture) {
  TestModelOptions o;
  o.architecture = architecture;
  // Narrower weights make ggml round the other factor as well, see below.
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
  add("LlamaYarnShrinks", Scaled("llama", "yarn", 0.5f));
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

class RandomModel : public testing::TestWithParam<Case> {};

// Where rounding is the only difference left.
void ExpectSame(const LogitDistance& d, int64_t positions) {
  EXPECT_EQ(d.positions, positions);
  EXPECT_LT(d.mean_kl, 1e-4);
  EXPECT_LT(d.worst_kl, 1e-2);
  EXPECT_GE(d.top_share(), 0.995);
}

TEST_P(RandomModel, LogitsAreLibllamas) {
  const TempDir dir;
  const std::string path = dir / "model.gguf";
  ASSERT_TRUE(WriteTestModel(GetParam().options, path));
  const auto model = Model::Load(path);
  ASSERT_TRUE(model) << model.error().message;
  const std::vector<int32_t> tokens = RandomTokens(600, 7);
  const auto want = LibllamaLogits(path, tokens, true);
  ExpectSame(Compare(want, PlainLogits(**model, tokens, 130)), 600);

  // The logits of a prompt's beginning are those of the shorter prompt, so one run of libllama serves all.
  for (const auto& [length, block] :
       {std::pair{1, 1}, {2, 2}, {2, 1}, {63, 63}, {64, 64}, {65, 65}, {65, 13}}) {
    const std::vector<std::vector<float>> beginning(want.begin(), want.begin() + length);
    const auto got = PlainLogits(**model, std::span(tokens).first(static_cast<std::size_t>(length)), block);
    const LogitDistance d = Compare(beginning, got);
    EXPECT_EQ(d.positions, length);
    EXPECT_LT(d.mean_kl, 1e-4) << length << " tokens in blocks of " << block;
    EXPECT_LT(d.largest_gap, 0.05) << length << " tokens in blocks of " << block;
  }
}

TEST(Threads, DoNotChangeLogits) {
  const TempDir dir;
  const std::string path = dir / "model.gguf";
  ASSERT_TRUE(WriteTestModel({}, path));
  const auto model = Model::Load(path);
  ASSERT_TRUE(model) << model.error().message;
  const std::vector<int32_t> tokens = RandomTokens(20, 7);
  const auto one = PlainLogits(**model, tokens, 10, 1);
  ASSERT_EQ(one.size(), tokens.size());
  EXPECT_EQ(one, PlainLogits(**model, tokens, 10, 2));
}

INSTANTIATE_TEST_SUITE_P(Models, RandomModel, testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param.name; });

std::vector<int32_t> HeldOutTokens(const Model& model, std::size_t count) {
  std::ifstream file(MOEND_SOURCE_DIR "/models/suite/heldout.txt", std::ios::binary);
  std::string text(8 * count, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<std::size_t>(file.gcount()));
  auto tokens = model.tokenizer().Tokenize(text, true, false);
  if (!tokens) return {};
  tokens->resize(std::min(tokens->size(), count));
  return *tokens;
}

// As float32, for the reason given below.
TEST(Reference, LogitsAreLibllamas) {
  const TempDir dir;
  const std::string path = dir / "reference-f32.gguf";
  ASSERT_TRUE(ConvertModel(kReference, path, GGML_TYPE_F32));
  const auto model = Model::Load(path);
  ASSERT_TRUE(model) << model.error().message;
  const std::vector<int32_t> tokens = HeldOutTokens(**model, 1000);
  ASSERT_EQ(tokens.size(), 1000u);
  const LogitDistance d = Compare(LibllamaLogits(path, tokens, true), PlainLogits(**model, tokens, 300));
  ExpectSame(d, 1000);
}

// With weights of few bits ggml rounds every matrix's input to 8 bits too. The least difference before such
// a rounding, even of one part in 10^7, flips some of them: libllama's own two attention kernels end up
// further apart than the bounds above. Ours must be no further from libllama than these are from each other.
void ExpectWithinSpread(const std::string& path, const Model& model, std::span<const int32_t> tokens,
                        bool repack) {
  const auto plain = LibllamaLogits(path, tokens, false, 512, repack);
  const auto flash = LibllamaLogits(path, tokens, true, 512, repack);
  const auto ours = PlainLogits(model, tokens, 100);
  const LogitDistance spread = Compare(plain, flash);
  ASSERT_EQ(spread.positions, static_cast<int64_t>(tokens.size()));
  const double bound = std::max(1e-4, 1.5 * spread.mean_kl);
  EXPECT_LT(Compare(plain, ours).mean_kl, bound);
  EXPECT_LT(Compare(flash, ours).mean_kl, bound);
  EXPECT_LT(bound, 0.05);
}

TEST(Reference, QuantizedFileStaysWithinLibllamasOwnSpread) {
  const auto model = Model::Load(kReference);
  ASSERT_TRUE(model) << model.error().message;
  const std::vector<int32_t> tokens = HeldOutTokens(**model, 400);
  ExpectWithinSpread(kReference, **model, tokens, true);
}

class WeightTypes : public testing::TestWithParam<ggml_type> {};

TEST_P(WeightTypes, MultiplyAsInLibllama) {
  TestModelOptions options;
  options.n_layers = 2;
  options.n_embd = options.n_ff = 256;
  options.n_heads = 4;
  options.head_size = 64;
  options.weight_type = GetParam();
  const TempDir dir;
  const std::string path = dir / "model.gguf";
  ASSERT_TRUE(WriteTestModel(options, path));
  for (const bool repack : {false, true}) {
    const auto model = Model::Load(path, {.repack = repack});
    ASSERT_TRUE(model) << model.error().message;
    if (repack && (*model)->repacked_bytes() == 0) break;  // the same weights again
    // The first token attends to itself alone, which leaves attention nothing to round: the same bits.
    for (const int32_t token : RandomTokens(10, 3)) {
      const std::vector<int32_t> first = {token};
      const auto want = LibllamaLogits(path, first, false, 512, repack);
      ASSERT_EQ(want.size(), 1u);
      EXPECT_EQ(want, PlainLogits(**model, first, 1)) << (repack ? "repacked" : "as in the file");
    }
    ExpectWithinSpread(path, **model, RandomTokens(150, 4), repack);
  }
}

INSTANTIATE_TEST_SUITE_P(Types, WeightTypes,
                         testing::Values(GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0,
                                         GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1,
                                         GGML_TYPE_Q2_K, GGML_TYPE_Q3_K, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K,
                                         GGML_TYPE_Q6_K, GGML_TYPE_IQ4_NL, GGML_TYPE_IQ4_XS, GGML_TYPE_MXFP4),
                         [](const auto& info) { return std::string(ggml_type_name(info.param)); });

}  // namespace
}  // namespace moend::test
