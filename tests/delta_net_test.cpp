// Layers that are gated delta nets: what is remembered of many contexts, and files that contradict
// themselves. architectures_test compares whole models with libllama.
#include <ggml-cpp.h>
#include <ggml-cpu.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>

#include "moend/model/graph.h"
#include "moend/model/model.h"
#include "tests/support/process.h"
#include "tests/support/test_model.h"

namespace moend::test {
namespace {

TestModelOptions SmallHybrid(const char* architecture) {
  TestModelOptions o;
  o.architecture = architecture;
  o.weight_type = GGML_TYPE_F32;
  o.n_layers = 2;
  o.attention_interval = 2;
  o.n_ff = 64;
  o.rope_dims = 16;
  o.rope_sections = {3, 3, 2, 0};
  o.delta_k_heads = 2;
  o.delta_v_heads = 4;
  o.delta_head_size = 16;
  return o;
}

// A layer's states of several contexts, one behind the other.
class StatesHook final : public AttentionHook {
 public:
  explicit StatesHook(std::vector<float> states) : states_(std::move(states)) {}
  void Store(int64_t, const float*, const float*, const float*, int64_t) override {}
  void Attend(int64_t, const float*, int64_t, int, int) override {}
  void Combine(int64_t, float*, int64_t, int, int) override {}
  void LoadStates(int64_t, float* states, int64_t contexts) override {
    contexts_ = contexts;
    std::ranges::copy(states_, states);
  }
  void StoreStates(int64_t, const float* states, int64_t contexts) override {
    ASSERT_EQ(contexts, contexts_);
    std::copy_n(states, states_.size(), states_.begin());
  }
  const std::vector<float>& states() const { return states_; }
  int64_t contexts() const { return contexts_; }

 private:
  std::vector<float> states_;
  int64_t contexts_ = 0;
};

// Layer 0 over rows of x, [n][n_embd].
std::vector<float> RunLayer(const Model& model, std::vector<float> x, bool one_token_each, StatesHook& hook) {
  const HyperParams& h = model.hparams();
  const int64_t n = std::ssize(x) / h.n_embd;
  const ggml_context_ptr ctx(ggml_init({std::size_t{32} << 20, nullptr, false}));
  ggml_cgraph* graph = ggml_new_graph(ctx.get());
  ggml_tensor* in = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, h.n_embd, n);
  ggml_tensor* positions = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, n);
  std::ranges::copy(x, static_cast<float*>(in->data));
  for (int64_t i = 0; i < n; ++i) static_cast<int32_t*>(positions->data)[i] = 0;
  HookSlot slot{&hook, 0, one_token_each};
  const ggml_tensor* out = BuildLayer(ctx.get(), graph, model, 0, in, positions, &slot);
  EXPECT_EQ(ggml_graph_compute_with_ctx(ctx.get(), graph, 2), GGML_STATUS_SUCCESS);
  EXPECT_TRUE(hook.TakeError());
  const auto* data = static_cast<const float*>(out->data);
  return {data, data + n * h.n_embd};
}

// Contexts that go through a delta net together, a token each, come out as they do alone; what is remembered,
// too.
TEST(DeltaNets, ContextsTogetherAreAsAlone) {
  const TempDir dir;
  for (const char* architecture : {"qwen3next", "qwen35"}) {
    TestModelOptions o = SmallHybrid(architecture);
    if (o.architecture == "qwen3next") {
      o.n_experts = 3;
      o.n_used = 2;
      o.n_ff_shared = 48;
    }
    ASSERT_TRUE(WriteTestModel(o, dir / "a.gguf"));
    const auto model = Model::Load(dir / "a.gguf");
    ASSERT_TRUE(model) << model.error().message;
    constexpr int64_t kContexts = 3;
    const int64_t n_embd = o.n_embd, floats = (*model)->hparams().layers[0].delta_net.state_floats();
    std::mt19937_64 random(3);
    std::normal_distribution<float> normal;
    std::vector<float> x(static_cast<std::size_t>(kContexts * n_embd)),
        states(static_cast<std::size_t>(kContexts * floats));
    for (float& v : x) v = normal(random);
    for (float& v : states) v = normal(random);
    StatesHook together(states);
    const std::vector<float> out = RunLayer(**model, x, true, together);
    EXPECT_EQ(together.contexts(), kContexts);
    EXPECT_NE(together.states(), states);
    for (int64_t c = 0; c < kContexts; ++c) {
      const auto part = [&](const std::vector<float>& of, int64_t n) {
        return std::vector<float>(of.begin() + c * n, of.begin() + (c + 1) * n);
      };
      StatesHook alone(part(states, floats));
      const std::vector<float> want = RunLayer(**model, part(x, n_embd), false, alone);
      EXPECT_EQ(alone.contexts(), 1);
      for (int64_t i = 0; i < n_embd; ++i)
        ASSERT_NEAR(out[static_cast<std::size_t>(c * n_embd + i)], want[static_cast<std::size_t>(i)], 1e-4);
      for (int64_t i = 0; i < floats; ++i)
        ASSERT_NEAR(together.states()[static_cast<std::size_t>(c * floats + i)],
                    alone.states()[static_cast<std::size_t>(i)], 1e-4);
    }
  }
}

TEST(DeltaNets, BadFilesAreNamed) {
  const TempDir dir;
  ASSERT_TRUE(WriteTestModel(SmallHybrid("qwen35"), dir / "good.gguf"));
  const auto refused = [&](const std::function<void(gguf_context*)>& edit, ErrorCode code, const char* says) {
    ASSERT_TRUE(EditModel(dir / "good.gguf", dir / "bad.gguf", edit));
    const auto model = Model::Load(dir / "bad.gguf");
    ASSERT_FALSE(model) << says;
    EXPECT_EQ(model.error().code, code) << model.error().message;
    EXPECT_NE(model.error().message.find(says), std::string::npos) << model.error().message;
  };
  const auto number = [](const char* key, uint32_t value) {
    return [=](gguf_context* f) { gguf_set_val_u32(f, key, value); };
  };
  const auto sections = [](std::vector<int32_t> s) {
    return [=](gguf_context* f) {
      gguf_set_arr_data(f, "qwen35.rope.dimension_sections", GGUF_TYPE_INT32, s.data(), s.size());
    };
  };
  refused(number("qwen35.ssm.group_count", 3), ErrorCode::kCorrupt, "4 heads of V cannot share 3");
  refused(number("qwen35.ssm.group_count", 0), ErrorCode::kCorrupt, "group_count");
  refused(number("qwen35.ssm.group_count", 1), ErrorCode::kCorrupt, "blk.0.attn_qkv.weight");
  refused(number("qwen35.ssm.state_size", 32), ErrorCode::kCorrupt, "do not add up to qwen35.ssm.inner_size");
  refused(number("qwen35.ssm.state_size", 1u << 31), ErrorCode::kCorrupt, "state_size");
  refused(number("qwen35.ssm.conv_kernel", 1), ErrorCode::kCorrupt, "conv_kernel");
  refused(number("qwen35.ssm.conv_kernel", 5), ErrorCode::kCorrupt, "blk.0.ssm_conv1d.weight");
  refused(number("qwen35.full_attention_interval", 0), ErrorCode::kCorrupt, "full_attention_interval");
  refused(number("qwen35.full_attention_interval", 1), ErrorCode::kCorrupt, "attn_q");
  refused(number("qwen35.expert_count", 4), ErrorCode::kUnsupported, "4 experts");
  refused(sections({3, 3, 2}), ErrorCode::kCorrupt, "3 values instead of 4");
  refused(sections({0, 0, 0, 0}), ErrorCode::kCorrupt, "add up to 0 pairs");
  refused(sections({3, -3, 2, 0}), ErrorCode::kCorrupt, "holds -3");
  refused(sections({2, 2, 2, 2}), ErrorCode::kUnsupported, "leaves out the pair 6");
}

// As a user meets them: inspect counts their states as llama.cpp allocates them, a profile measures the
// layers that attend, and a plan for them runs.
TEST(DeltaNets, AreInspectedAndRun) {
  const TempDir dir;
  const std::string path = dir / "a.gguf";
  ASSERT_TRUE(WriteTestModel(SmallHybrid("qwen35"), path));
  const auto moend = [&](std::vector<std::string> args) {
    ProcessResult r = RunProcess(MOEND_BINARY, args);
    EXPECT_EQ(r.code, 0) << r.err;
    return r;
  };
  const ProcessResult shown = moend({"inspect", path});
  // 3 inputs of 8 heads' 16 channels and 4 matrices of 16 x 16, 4 bytes each; 2 KV heads of 32 channels.
  for (const char* part : {"qwen35", "256 bytes a token and 5632 of states", "1, which remember 5632 bytes"})
    EXPECT_NE(shown.out.find(part), std::string::npos) << part << " not in " << shown.out;
  const std::string profile = dir / "profile.json", plan = dir / "plan.json";
  moend({"calibrate", "-m", path, "-f", MOEND_SOURCE_DIR "/README.md", "-c", "400", "--chunks", "1",
         "--method", "logits", "--scorer", "keydiff", "-o", profile});
  const ProcessResult solved = moend({"solve", profile, "--compression", "2", "-c", "4096", "-o", plan});
  EXPECT_NE(solved.out.find("state"), std::string::npos) << solved.out;
  const ProcessResult run =
      moend({"run", "-m", path, "--plan", plan, "-p", "abcdefgh", "-n", "8", "--ignore-eos"});
  EXPECT_NE(run.err.find("9 prompt tokens, 8 generated"), std::string::npos) << run.err;
}

}  // namespace
}  // namespace moend::test
