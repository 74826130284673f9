// Every architecture against libllama: the same file and tokens must give the same logits.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "moend/engine/engine.h"
#include "moend/model/arch/arch.h"
#include "moend/model/model.h"
#include "tests/support/libllama_logits.h"
#include "tests/support/plain_runner.h"
#include "tests/support/test_model.h"

namespace moend::test {
namespace {

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
  o.weight_type = GGML_TYPE_F32;  // narrower weights make ggml round the other factor as well
  o.n_ff = 160;
  return o;
}

TestModelOptions Experts(const char* architecture, int64_t n, int64_t used) {
  TestModelOptions o = Options(architecture);
  o.n_experts = n;
  o.n_used = used;
  o.n_ff = 96;
  return o;
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  const auto add = [&](const char* name, TestModelOptions o) {
    o.seed = cases.size() + 40;
    cases.push_back({name, o});
  };
  add("Llama", Options("llama"));
  TestModelOptions o = Options("qwen2");
  o.biases = true;
  add("Qwen2", o);
  add("Qwen3", Options("qwen3"));

  o = Experts("qwen2moe", 6, 2);
  o.biases = true;
  o.n_ff_shared = 80;
  add("Qwen2Moe", o);
  o = Experts("qwen3moe", 8, 3);
  o.head_size = 48;  // heads * size != width
  o.n_heads = 6;
  o.n_kv_heads = 3;
  add("Qwen3Moe", o);
  add("Qwen3MoeOneOfThree", Experts("qwen3moe", 3, 1));
  add("Qwen3MoeAll", Experts("qwen3moe", 4, 4));
  o = Experts("olmoe", 8, 4);
  o.n_kv_heads = o.n_heads;
  add("Olmoe", o);

  // Sliding layers: windows that one block crosses, that blocks cross, of one token, and longer than
  // anything.
  o = Options("gemma3");
  o.tied = true;
  o.n_layers = 7;  // the third and sixth see everything
  o.window = 24;
  o.window_pattern = 3;
  o.rope_freq_base = 1e6f;
  add("Gemma3", o);
  o.n_layers = 6;
  o.window_pattern = 0;  // five sliding, one full
  o.n_heads = 5;         // one KV head of an odd group
  o.n_kv_heads = 1;
  o.head_size = 48;
  o.window = 129;
  o.rope_scaling = "linear";
  o.rope_factor = 8.0f;
  o.final_soft_cap = 4.0f;
  add("Gemma3LinearRope", o);
  o = Options("gemma3");
  o.tied = true;
  o.n_layers = 4;
  o.window = 1;
  o.sliding = {true, false, false, true};
  add("Gemma3WindowOfOne", o);
  o = Options("gemma3");
  o.n_layers = 2;  // no window at all, with an output matrix
  add("Gemma3Full", o);
  o = Options("gemma2");
  o.tied = true;
  o.n_layers = 4;
  o.window = 65;
  o.qk_gain = 3.5f;  // scores far beyond the caps
  o.attn_soft_cap = 8.0f;
  o.final_soft_cap = 3.0f;
  add("Gemma2", o);
  o.n_layers = 46;  // the size whose queries have another scale
  o.n_embd = 96;
  o.n_heads = 2;
  o.head_size = 16;
  o.n_ff = 32;
  o.qk_gain = 1.4f;                        // what large scores round otherwise, so many layers would blow up
  o.attn_soft_cap = o.final_soft_cap = 0;  // 50 and 30
  o.window = 0;                            // 4,096
  add("Gemma2Wide", o);
  o = Experts("gpt-oss", 5, 2);
  o.biases = true;
  o.n_layers = 4;
  o.n_heads = 6;
  o.window = 33;
  add("GptOss", o);
  o.n_heads = 4;
  o.n_layers = 3;
  o.window = 128;
  o.rope_scaling = "yarn";
  o.rope_factor = 32.0f;
  o.rope_original_context = 128;
  o.rope_freq_base = 150000.0f;
  add("GptOssYarn", o);

  o = Experts("minimax-m2", 6, 3);
  o.n_heads = 6;
  o.n_kv_heads = 3;
  o.head_size = 48;
  o.rope_dims = 24;
  add("MinimaxM2", o);
  o = Experts("glm4moe", 6, 2);
  o.n_ff = 48;
  o.n_ff_shared = 48;
  o.dense_layers = 1;
  o.n_ff_dense = 112;
  o.rope_dims = 16;
  o.biases = true;
  o.normalized_experts = true;
  o.expert_scale = 1.7f;
  add("Glm4Moe", o);
  o.n_ff_shared = 96;  // two of them
  o.dense_layers = 2;
  o.expert_scale = 0;
  o.normalized_experts = o.biases = false;
  o.qk_norms = true;
  add("Glm4MoeQkNorms", o);

  // Delta nets: as many heads of K as of V, and fewer; odd lengths of the convolution.
  o = Experts("qwen3next", 5, 2);
  o.n_layers = 4;  // the fourth attends
  o.n_ff_shared = 48;
  o.rope_dims = 8;
  o.delta_k_heads = 2;
  o.delta_v_heads = 6;
  o.delta_head_size = 16;
  add("Qwen3Next", o);
  o = Options("qwen35");
  o.n_layers = 5;
  o.recurrent = {false, true, true, false, true};
  o.tied = true;
  o.rope_dims = 16;
  o.rope_sections = {3, 3, 2, 0};
  o.delta_k_heads = o.delta_v_heads = 3;
  o.delta_head_size = 32;
  o.delta_kernel = 3;
  add("Qwen35", o);
  o = Experts("qwen35moe", 6, 3);
  o.attention_interval = 2;
  o.n_ff_shared = 80;
  o.rope_dims = 16;
  o.rope_sections = {3, 3, 2, 0};
  o.delta_k_heads = 2;
  o.delta_v_heads = 4;
  o.delta_head_size = 16;
  add("Qwen35Moe", o);

  o = Options("phi3");
  o.fused_qkv = true;
  add("Phi3", o);
  o.rope_dims = 24;
  o.rope_factors = o.tied = true;
  o.rope_original_context = 128;  // shorter than the trained one: the factors for long contexts
  o.rope_attn_factor = 1.19f;
  add("Phi3LongPartialRope", o);
  o.rope_original_context = 4096;
  o.fused_qkv = false;
  add("Phi3ShortFactors", o);
  o = Options("smollm3");
  o.n_layers = 5;  // the fourth has no RoPE
  o.tied = true;
  add("Smollm3", o);

  o = Options("granite");
  o.logit_scale = 3.0f;
  o.residual_scale = 0.6f;
  o.embedding_scale = 1.7f;
  o.attention_scale = 0.11f;
  o.tied = true;
  add("Granite", o);
  o.rope_finetuned = false;
  o.residual_scale = o.embedding_scale = o.attention_scale = 0;
  add("GraniteWithoutRope", o);
  o = Experts("granitemoe", 5, 2);
  o.logit_scale = 2.0f;
  o.residual_scale = 0.7f;
  add("GraniteMoe", o);
  o.n_ff_shared = 48;
  o.tied = true;
  add("GraniteMoeShared", o);

  o = Options("mistral3");
  o.rope_scaling = "yarn";
  o.rope_factor = 16.0f;
  o.rope_original_context = 200;  // crossed several times
  o.temperature_scale = 0.1f;
  o.yarn_beta_fast = 24.0f;
  o.yarn_log_multiplier = 1.0f;
  add("Mistral3", o);
  o = Experts("mistral3", 4, 2);
  add("Mistral3Experts", o);
  o = Options("glm4");
  o.rope_dims = 16;
  o.biases = true;
  add("Glm4", o);
  return cases;
}

class Architectures : public testing::TestWithParam<Case> {};

TEST_P(Architectures, LogitsAreLibllamas) {
  const TempDir dir;
  const std::string path = dir / "model.gguf";
  ASSERT_TRUE(WriteTestModel(GetParam().options, path));
  const auto model = Model::Load(path);
  ASSERT_TRUE(model) << model.error().message;
  const int64_t most = 600;  // beyond every window and every original context but the longest
  const std::vector<int32_t> tokens = RandomTokens(most, 7);
  const auto want = LibllamaLogits(path, tokens, true);
  ASSERT_EQ(std::ssize(want), most);
  // The logits of a prompt's beginning are those of the shorter prompt, so one run of libllama serves all.
  for (const auto& [length, block] : {std::pair<int64_t, int64_t>{most, 130},
                                      {1, 1},
                                      {2, 2},
                                      {2, 1},
                                      {63, 63},
                                      {64, 64},
                                      {65, 65},
                                      {65, 13}}) {
    const std::vector<std::vector<float>> beginning(want.begin(), want.begin() + length);
    const auto got = PlainLogits(**model, std::span(tokens).first(static_cast<std::size_t>(length)), block);
    const LogitDistance d = Compare(beginning, got);
    EXPECT_EQ(d.positions, length);
    EXPECT_LT(d.mean_kl, 1e-4) << length << " tokens in blocks of " << block;
    EXPECT_LT(d.worst_kl, 1e-2) << length << " tokens in blocks of " << block;
    EXPECT_LT(d.largest_gap, 0.05) << length << " tokens in blocks of " << block;
    if (length == most) {
      EXPECT_GE(d.top_share(), 0.995);
    }
  }
}

// The same through the engine: a prompt layer by layer, then tokens one at a time, from the cache of a full
// plan. What evicts and packs must run, too.
TEST_P(Architectures, SessionsGiveTheSame) {
  const TempDir dir;
  const std::string path = dir / "model.gguf";
  ASSERT_TRUE(WriteTestModel(GetParam().options, path));
  const auto model = Model::Load(path);
  ASSERT_TRUE(model) << model.error().message;
  const auto engine = Engine::Create(*model, {.n_threads = 1, .block_tokens = 64});
  ASSERT_TRUE(engine) << engine.error().message;
  const std::vector<int32_t> tokens = RandomTokens(300, 7);
  const auto want = LibllamaLogits(path, tokens, true);
  ASSERT_EQ(want.size(), tokens.size());
  constexpr std::size_t kPrompt = 290;
  Plan plan = FullPlan((*engine)->fingerprint(), 1024);
  auto full = Session::Create(*engine, plan);
  ASSERT_TRUE(full) << full.error().message;
  ASSERT_TRUE(full->Prefill(std::span(tokens).first(kPrompt)));
  std::vector<std::vector<float>> got = {{full->logits().begin(), full->logits().end()}};
  for (std::size_t i = kPrompt; i < tokens.size(); ++i) {
    ASSERT_TRUE(full->Decode(tokens[i]));
    got.emplace_back(full->logits().begin(), full->logits().end());
  }
  const LogitDistance d = Compare({want.begin() + kPrompt - 1, want.end()}, got);
  EXPECT_EQ(d.positions, std::ssize(got));
  EXPECT_LT(d.mean_kl, 1e-4);
  EXPECT_LT(d.worst_kl, 1e-2);

  CompressAlike(plan, {0.5, 4, 4});
  plan.variant = "2d_uniform";
  for (const char* scorer : {"keydiff", "snapkv"}) {
    plan.scorer = scorer;
    auto small = Session::Create(*engine, plan);
    ASSERT_TRUE(small) << small.error().message;
    ASSERT_TRUE(small->Prefill(std::span(tokens).first(kPrompt)));
    ASSERT_TRUE(small->Decode(tokens[kPrompt]));
    EXPECT_TRUE(std::ranges::all_of(small->logits(), [](float x) { return std::isfinite(x); }));
    EXPECT_LT(small->stats().bytes, full->stats().bytes);
  }
}

INSTANTIATE_TEST_SUITE_P(All, Architectures, testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param.name; });

TEST(ArchitectureList, IsTested) {
  for (const Architecture& a : moend::Architectures())
    EXPECT_TRUE(std::ranges::any_of(Cases(), [&](const Case& c) { return c.options.architecture == a.name; }))
        << a.name;
}

TEST(ArchitectureList, IsNamedWhereAnotherIsMet) {
  const TempDir dir;
  ASSERT_TRUE(WriteTestModel({}, dir / "a.gguf"));
  ASSERT_TRUE(EditModel(dir / "a.gguf", dir / "b.gguf",
                        [](gguf_context* f) { gguf_set_val_str(f, "general.architecture", "mamba"); }));
  const auto model = Model::Load(dir / "b.gguf");
  ASSERT_FALSE(model);
  EXPECT_EQ(model.error().code, ErrorCode::kUnsupported);
  EXPECT_NE(model.error().message.find("\"mamba\""), std::string::npos);
  EXPECT_NE(model.error().message.find("llama, qwen2"), std::string::npos);
  EXPECT_NE(model.error().message.find("and glm4"), std::string::npos);
  EXPECT_NE(model.error().message.find("qwen35moe"), std::string::npos);  // does not run
}

// Keys and tensors that contradict each other are named.
TEST(Experts, BadFilesAreNamed) {
  const TempDir dir;
  const std::string good = dir / "good.gguf", bad = dir / "bad.gguf";
  ASSERT_TRUE(WriteTestModel(Experts("qwen3moe", 4, 2), good));
  ASSERT_TRUE(Model::Load(good));
  const auto refused = [&](const std::function<void(gguf_context*)>& edit, ErrorCode code, const char* says,
                           const std::function<std::string(const std::string&)>& rename = {}) {
    ASSERT_TRUE(EditModel(good, bad, edit, rename));
    const auto model = Model::Load(bad);
    ASSERT_FALSE(model) << says;
    EXPECT_EQ(model.error().code, code) << model.error().message;
    EXPECT_NE(model.error().message.find(says), std::string::npos) << model.error().message;
  };
  const auto number = [](const char* key, uint32_t value) {
    return [=](gguf_context* f) { gguf_set_val_u32(f, key, value); };
  };
  refused(number("qwen3moe.expert_count", 0), ErrorCode::kCorrupt, "0 experts");
  refused(number("qwen3moe.expert_count", 5), ErrorCode::kCorrupt, "ffn_gate_inp");
  refused(number("qwen3moe.expert_count", 1u << 30), ErrorCode::kCorrupt, "expert_count");
  refused(number("qwen3moe.expert_used_count", 5), ErrorCode::kCorrupt, "5 are used");
  refused(number("qwen3moe.expert_used_count", 0), ErrorCode::kCorrupt, "0 are used");
  refused(number("qwen3moe.expert_feed_forward_length", 64), ErrorCode::kCorrupt, "ffn_gate_exps");
  refused(
      {}, ErrorCode::kCorrupt, "lacks the tensor blk.1.ffn_down_exps.weight",
      [](const std::string& name) { return name == "blk.1.ffn_down_exps.weight" ? std::string() : name; });
  ASSERT_TRUE(WriteTestModel(Options("llama"), good));
  refused(number("llama.expert_count", 8), ErrorCode::kUnsupported, "8 experts");
}

// Layers for multi-token prediction are passed over: the model's own layers are what they are without.
TEST(Experts, PredictionLayersArePassedOver) {
  const TempDir dir;
  TestModelOptions o = Experts("glm4moe", 4, 2);
  o.n_ff = o.n_ff_shared = 48;
  o.dense_layers = 1;
  o.n_ff_dense = 64;
  ASSERT_TRUE(WriteTestModel(o, dir / "plain.gguf"));
  o.prediction_layers = 1;
  ASSERT_TRUE(WriteTestModel(o, dir / "more.gguf"));
  const auto plain = Model::Load(dir / "plain.gguf"), more = Model::Load(dir / "more.gguf");
  ASSERT_TRUE(plain && more) << more.error().message;
  EXPECT_EQ((*more)->hparams().n_layers, o.n_layers);
  const auto tokens = RandomTokens(40, 9);
  EXPECT_EQ(PlainLogits(**plain, tokens, 16), PlainLogits(**more, tokens, 16));
  const auto refused = [&](const char* key, uint32_t value, ErrorCode code, const char* says) {
    ASSERT_TRUE(EditModel(dir / "more.gguf", dir / "bad.gguf",
                          [&](gguf_context* f) { gguf_set_val_u32(f, key, value); }));
    const auto bad = Model::Load(dir / "bad.gguf");
    ASSERT_FALSE(bad) << key;
    EXPECT_EQ(bad.error().code, code) << bad.error().message;
    EXPECT_NE(bad.error().message.find(says), std::string::npos) << bad.error().message;
  };
  refused("glm4moe.nextn_predict_layers", 4, ErrorCode::kCorrupt, "4 layers, of which 4");
  refused("glm4moe.nextn_predict_layers", 0, ErrorCode::kUnsupported, "nextn");
  refused("glm4moe.expert_gating_func", 1, ErrorCode::kUnsupported, "function 1");
  refused("glm4moe.expert_group_count", 2, ErrorCode::kUnsupported, "2 groups");
  refused("glm4moe.leading_dense_block_count", 9, ErrorCode::kCorrupt, "leading_dense_block_count");
  refused("glm4moe.leading_dense_block_count", 2, ErrorCode::kCorrupt, "blk.1.ffn_gate.weight");
  refused("glm4moe.expert_shared_count", 3, ErrorCode::kCorrupt, "ffn_gate_shexp");
}

// The type that gpt-oss's experts come in. On quantized weights ggml rounds the other factor as well, and the
// least difference flips some of those: libllama's own two ways to attend say by how much.
TEST(Experts, GptOssInMxfp4) {
  TestModelOptions o = Experts("gpt-oss", 5, 2);
  o.biases = true;
  o.window = 20;
  o.weight_type = GGML_TYPE_MXFP4;
  const TempDir dir;
  const std::string path = dir / "model.gguf";
  ASSERT_TRUE(WriteTestModel(o, path));
  const auto tokens = RandomTokens(200, 3);
  const auto want = LibllamaLogits(path, tokens, true);
  const LogitDistance noise = Compare(want, LibllamaLogits(path, tokens, false));
  ASSERT_GT(noise.mean_kl, 0);
  for (const bool repack : {false, true}) {
    const auto model = Model::Load(path, {.repack = repack});
    ASSERT_TRUE(model) << model.error().message;
    const LogitDistance d = Compare(want, PlainLogits(**model, tokens, 64));
    EXPECT_LT(d.mean_kl, 3 * noise.mean_kl) << noise.mean_kl;
    EXPECT_GT(d.top_share(), noise.top_share() - 0.05);
  }
}

// Experts in ggml's faster layouts compute what libllama computes with them.
TEST(Experts, Repacked) {
  TestModelOptions o = Experts("qwen3moe", 4, 2);
  o.weight_type = GGML_TYPE_Q4_0;
  o.n_embd = o.n_ff = 128;
  const TempDir dir;
  const std::string path = dir / "model.gguf";
  ASSERT_TRUE(WriteTestModel(o, path));
  const auto model = Model::Load(path);
  ASSERT_TRUE(model) << model.error().message;
  if ((*model)->repacked_bytes() == 0) GTEST_SKIP() << "this machine has no better layout";
  // The first token attends to itself alone, which leaves attention nothing to round: the same bits.
  for (const int32_t token : RandomTokens(10, 3)) {
    const std::vector<int32_t> first = {token};
    EXPECT_EQ(LibllamaLogits(path, first, false, 512, true), PlainLogits(**model, first, 1));
  }
}

}  // namespace
}  // namespace moend::test
