// Layers that no plan compresses, which slide or hold a state: their caches, and sessions of models that have
// them, which must be exact however a context is read.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "moend/base/half.h"
#include "moend/cache/serialize.h"
#include "moend/engine/capture.h"
#include "moend/engine/engine.h"
#include "moend/engine/session_state.h"
#include "tests/support/layer_model.h"
#include "tests/support/libllama_logits.h"
#include "tests/support/seal.h"
#include "tests/support/test_model.h"

namespace moend::test {
namespace {

LayerCache MakeSliding(const KvShape& shape, int64_t window, const std::shared_ptr<Ledger>& ledger = {}) {
  auto cache = LayerCache::CreateSliding(ledger, shape, window);
  EXPECT_TRUE(cache);
  return std::move(*cache);
}

// The newest tokens, the window at least, each where and what it should be.
void ExpectWindow(const LayerCache& cache, int64_t window, int64_t seen) {
  ASSERT_EQ(cache.tokens_seen(), seen);
  const int64_t d = cache.shape().head_size;
  for (int64_t h = 0; h < cache.shape().n_kv_heads; ++h) {
    const StreamView view = cache.view(h);
    EXPECT_EQ(view.n_pages, 0);
    EXPECT_GE(view.n_raw, std::min(window, seen));
    EXPECT_LE(view.n_raw, std::min(window + kPackTokens - 1, seen));
    EXPECT_EQ(cache.tokens(h), view.n_raw);
    EXPECT_EQ(cache.Excess(h), 0);
    const std::vector<uint32_t> positions = cache.positions(h);
    ASSERT_EQ(std::ssize(positions), view.n_raw);
    for (int64_t i = 0; i < view.n_raw; ++i) {
      const int64_t p = seen - view.n_raw + i;
      ASSERT_EQ(positions[static_cast<std::size_t>(i)], p);
      for (int64_t c = 0; c < d; ++c) {
        ASSERT_EQ(HalfToFloat(*RawKey(view, i, c)), Value(0, h, p, c)) << p;
        ASSERT_EQ(HalfToFloat(view.raw_v[i * d + c]), Value(1, h, p, c)) << p;
      }
    }
  }
  EXPECT_LE(cache.bytes(), WindowBytes(cache.shape(), window, std::max<int64_t>(seen, 1)).value());
}

// The tokens [first, first + n) as a prefill's scratch has them.
Dense SomeDense(int64_t head_size, int64_t head, int64_t first, int64_t n) {
  Dense d;
  d.k.resize(static_cast<std::size_t>((n + 63) / 64 * 64 * head_size));
  d.v.resize(static_cast<std::size_t>(n * head_size));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < head_size; ++c) {
      d.k[static_cast<std::size_t>(i / 64 * 64 * head_size + c * 64 + i % 64)] =
          FloatToHalf(Value(0, head, first + i, c));
      d.v[static_cast<std::size_t>(i * head_size + c)] = FloatToHalf(Value(1, head, first + i, c));
    }
  d.view = {head_size, d.k.data(), d.v.data(), n};
  return d;
}

void AppendNewest(LayerCache& cache, int64_t n) {
  std::vector<Dense> dense;
  std::vector<DenseView> views;
  for (int64_t h = 0; h < cache.shape().n_kv_heads; ++h)
    dense.push_back(SomeDense(cache.shape().head_size, h, cache.tokens_seen(), n));
  for (const Dense& d : dense) views.push_back(d.view);
  const auto done = cache.AppendNewest(views);
  ASSERT_TRUE(done) << done.error().message;
}

TEST(SlidingCache, HoldsItsWindowHoweverItIsFilled) {
  Random random(1);
  for (int round = 0; round < 40; ++round) {
    const KvShape shape{Pick(random, 1, 3), 16 * Pick(random, 1, 5)};
    const int64_t window = Pick(random, 1, round % 2 ? 20 : 150);
    auto ledger = std::make_shared<Ledger>();
    {
      LayerCache cache = MakeSliding(shape, window, ledger);
      EXPECT_TRUE(cache.sliding());
      EXPECT_EQ(ledger->live(), 0);
      int64_t seen = 0;
      for (int step = 0; step < 12; ++step) {
        const int64_t n = Pick(random, 0, step % 3 ? 5 : 2 * window + 70);
        if (random() % 2) {
          Append(cache, n);
        } else {
          AppendNewest(cache, n);
        }
        seen += n;
        ExpectWindow(cache, window, seen);
        EXPECT_EQ(cache.bytes(), ledger->live());
        EXPECT_TRUE(cache.Evict(0, {}, 100));  // there is nothing to evict
      }
    }
    EXPECT_EQ(ledger->live(), 0);
  }
}

TEST(SlidingCache, ForksAndSavedOnesGoTheirOwnWay) {
  Random random(2);
  for (int round = 0; round < 20; ++round) {
    const KvShape shape{Pick(random, 1, 2), 16 * Pick(random, 1, 4)};
    const int64_t window = Pick(random, 1, 90), n = Pick(random, 0, 200);
    LayerCache cache = MakeSliding(shape, window);
    Append(cache, n);
    auto fork = cache.Fork();
    ASSERT_TRUE(fork);
    const auto blob = SerializeCache(cache);
    ASSERT_TRUE(blob);
    auto restored = DeserializeCache(nullptr, *blob, "x", nullptr);
    ASSERT_TRUE(restored) << restored.error().message;
    EXPECT_TRUE(restored->sliding());
    EXPECT_EQ(SerializeCache(*restored).value(), *blob);
    Append(cache, 37);
    ExpectWindow(*fork, window, n);
    Append(*fork, 3);
    AppendNewest(*restored, window + 5);
    ExpectWindow(cache, window, n + 37);
    ExpectWindow(*fork, window, n + 3);
    ExpectWindow(*restored, window, n + window + 5);
  }
}

TEST(SlidingCache, RefusesNonsense) {
  EXPECT_FALSE(LayerCache::CreateSliding(nullptr, {1, 64}, 0));
  EXPECT_FALSE(LayerCache::CreateSliding(nullptr, {1, 64}, -1));
  EXPECT_FALSE(LayerCache::CreateSliding(nullptr, {1, 65}, 10));
  LayerCache cache = MakeSliding({2, 64}, 10);
  EXPECT_FALSE(cache.Repack({0.5, 4, 4}));
  EXPECT_FALSE(cache.Repack({1.0, 16, 8}));
  EXPECT_FALSE(cache.BeginFill(5, 5));
  const Dense one = SomeDense(64, 0, 0, 5), other = SomeDense(64, 0, 0, 6), narrow = SomeDense(48, 0, 0, 5);
  const auto refused = [&](std::vector<DenseView> views) { EXPECT_FALSE(cache.AppendNewest(views)); };
  refused({});
  refused({one.view});
  refused({one.view, other.view});
  refused({one.view, narrow.view});
  LayerCache full = MakeCache(nullptr, {1, 64}, {1.0, 16, 16});
  EXPECT_FALSE(full.AppendNewest({&one.view, 1}));
}

// Whatever byte of a saved one is changed, it is an error; and it is no other kind of cache's.
TEST(SlidingCache, DamagedOnesAreRefused) {
  LayerCache cache = MakeSliding({1, 32}, 20);
  Append(cache, 50);
  const std::string blob = SerializeCache(cache).value();
  Random random(3);
  for (int i = 0; i < 500; ++i) {
    std::string bad = blob;
    if (i % 2) {
      bad.resize(random() % bad.size());
    } else {
      bad[random() % bad.size()] ^= static_cast<char>(1 + random() % 255);
    }
    EXPECT_FALSE(DeserializeCache(nullptr, bad, "x", nullptr));
  }
  // A version that was changed on purpose, with a checksum that says so.
  std::string other = blob;
  other[8] = 3;
  Seal(other);
  EXPECT_FALSE(DeserializeCache(nullptr, other, "x", nullptr));
}

// Models of every kind of sliding layer.
TestModelOptions SlidingModel(const std::string& architecture) {
  TestModelOptions o;
  o.architecture = architecture;
  o.weight_type = GGML_TYPE_F32;
  o.n_layers = 4;
  o.n_ff = 96;
  o.window = 40;
  o.window_pattern = 2;
  if (architecture == "gpt-oss") {
    o.n_experts = 4;
    o.n_used = 2;
    o.biases = true;
    o.window = 17;
  } else {
    o.tied = true;
    o.window_pattern = 3;
    o.n_layers = 5;
  }
  if (architecture == "gemma2") {
    o.qk_gain = 3.0f;
    o.attn_soft_cap = 8.0f;
    o.window = 64;
  }
  return o;
}

TestModelOptions ModelOf(const std::string& architecture) {
  if (!architecture.starts_with("qwen")) return SlidingModel(architecture);
  TestModelOptions o = HybridModelOptions(architecture);
  o.weight_type = GGML_TYPE_F32;
  // Its last layer holds a state.
  if (architecture == "qwen35") o.recurrent = {false, true, true, true};
  return o;
}

class FixedLayerSessions : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    path_ = dir_ / "model.gguf";
    ASSERT_TRUE(WriteTestModel(ModelOf(GetParam()), path_));
    model_ = moend::Model::Load(path_, {1, false}).value();
    tokens_ = RandomTokens(kTokens, 7);
    want_ = LibllamaLogits(path_, tokens_, true);
    ASSERT_EQ(std::ssize(want_), kTokens);
    engine_ = MakeEngine(64);
    plan_ = FullPlan(engine_->fingerprint(), 2048);
  }
  // One thread unless threads are the point: spinning threads crawl on a busy machine.
  std::shared_ptr<Engine> MakeEngine(int64_t block, int threads = 1) const {
    return Engine::Create(model_, {.n_threads = threads, .block_tokens = block}).value();
  }
  Session MakeSession(const std::shared_ptr<Engine>& engine) const {
    return Session::Create(engine, plan_).value();
  }
  std::span<const int32_t> Tokens(int64_t first, int64_t n) const {
    return std::span(tokens_).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n));
  }
  // That the session, which has read some tokens, predicts what libllama does.
  void ExpectExact(const Session& session, const std::string& what) {
    const LogitDistance d =
        Compare({want_[session.tokens().size() - 1]}, {{session.logits().begin(), session.logits().end()}});
    EXPECT_LT(d.worst_kl, 1e-3) << what << ", " << session.tokens().size() << " tokens";
    EXPECT_LT(d.largest_gap, 0.05) << what;
    EXPECT_LE(session.stats().bytes,
              PlanBytes(plan_, static_cast<int64_t>(session.tokens().size()) + kEvictInterval, 0).value());
    all_.Add(d);
  }
  void Decode(Session& session, int64_t n, const std::string& what) {
    for (int64_t i = 0; i < n; ++i) {
      const auto done = session.Decode(tokens_[session.tokens().size()]);
      ASSERT_TRUE(done) << done.error().message;
      ExpectExact(session, what);
    }
  }
  void TearDown() override { EXPECT_LT(all_.mean_kl, 1e-4); }

  static constexpr int64_t kTokens = 420;
  TempDir dir_;
  std::string path_;
  std::shared_ptr<const moend::Model> model_;
  std::vector<int32_t> tokens_;
  std::vector<std::vector<float>> want_;
  std::shared_ptr<Engine> engine_;
  Plan plan_;
  LogitDistance all_;
};

TEST_P(FixedLayerSessions, PromptsInBlocksOfAnySize) {
  for (const int64_t block : {1, 7, 64, 512}) {
    const auto engine = MakeEngine(block, block == 64 ? 2 : 1);
    for (const int64_t n : {1, 2, 16, 17, 18, 40, 41, 63, 64, 65, 300}) {
      if (block == 1 && n > 65) continue;
      Session session = MakeSession(engine);
      ASSERT_TRUE(session.Prefill(Tokens(0, n)));
      ExpectExact(session, "block of " + std::to_string(block));
    }
  }
}

TEST_P(FixedLayerSessions, TurnsAndDecodeInAnyOrder) {
  Random random(5);
  for (int round = 0; round < 4; ++round) {
    Session session = MakeSession(engine_);
    for (;;) {
      const auto at = static_cast<int64_t>(session.tokens().size());
      const int64_t n = std::min(Pick(random, 1, round % 2 ? 12 : 150), kTokens - at);
      if (n == 0) break;
      if (at == 0 || random() % 2) {
        ASSERT_TRUE(session.Prefill(Tokens(at, n)));
        ExpectExact(session, "turn of " + std::to_string(n));
      } else {
        Decode(session, std::min<int64_t>(n, 40), "decode");
      }
    }
  }
}

TEST_P(FixedLayerSessions, ForksAndRestoredOnesGoOn) {
  for (const int64_t n : {5, 39, 64, 200}) {
    Session session = MakeSession(engine_);
    ASSERT_TRUE(session.Prefill(Tokens(0, n)));
    Decode(session, 9, "before");
    Session fork = session.Fork().value();
    const std::string saved = SaveSession(session).value();
    Decode(session, 30, "the original");
    ASSERT_TRUE(fork.Prefill(Tokens(n + 9, 50)));
    ExpectExact(fork, "the fork's turn");
    Decode(fork, 5, "the fork");
    Session restored = RestoreSession(engine_, plan_, {}, saved).value();
    EXPECT_EQ(SaveSession(restored).value(), saved);
    Decode(restored, 30, "the restored one");
    EXPECT_EQ(restored.logits().size(), session.logits().size());
    EXPECT_TRUE(std::ranges::equal(restored.logits(), session.logits()));
  }
}

TEST_P(FixedLayerSessions, SeveralInOneStep) {
  std::vector<Session> sessions;
  std::vector<Session*> pointers;
  for (const int64_t n : {3, 50, 130}) {
    sessions.push_back(MakeSession(engine_));
    ASSERT_TRUE(sessions.back().Prefill(Tokens(0, n)));
  }
  for (Session& s : sessions) pointers.push_back(&s);
  for (int step = 0; step < 60; ++step) {
    std::vector<int32_t> next;
    for (const Session& s : sessions) next.push_back(tokens_[s.tokens().size()]);
    ASSERT_TRUE(Session::DecodeBatch(pointers, next));
    for (const Session& s : sessions) ExpectExact(s, "in a batch");
  }
}

TEST_P(FixedLayerSessions, ACaptureGivesTheSame) {
  const std::vector<std::string> scorers = {"keydiff"};
  const auto capture = KvCapture::Create(engine_, Tokens(0, 150), scorers);
  ASSERT_TRUE(capture) << capture.error().message;
  Session session = SessionFromCapture(engine_, plan_, *capture).value();
  Decode(session, 60, "from a capture");
}

// Compressed, with every scorer: all that is promised is that it runs, is finite, and keeps its bytes.
TEST_P(FixedLayerSessions, FullLayersAreCompressed) {
  Plan plan = plan_;
  CompressAlike(plan, {0.3, 4, 2});
  plan.variant = "2d_uniform";
  for (const char* scorer : {"reconstruct", "snapkv", "h2o", "tova", "keydiff", "expected", "streaming"}) {
    plan.scorer = scorer;
    plan.refit = plan.scorer == kReconstructScorer;
    auto made = Session::Create(engine_, plan);
    ASSERT_TRUE(made) << made.error().message;
    Session session = std::move(*made);
    ASSERT_TRUE(session.Prefill(Tokens(0, 250))) << scorer;
    const int64_t score_bytes = plan.scorer == "h2o" ? 4 : 0;
    EXPECT_LE(session.stats().bytes, PlanBytes(plan, 250, score_bytes).value()) << scorer;
    for (int64_t i = 250; i < kTokens; ++i) ASSERT_TRUE(session.Decode(tokens_[static_cast<std::size_t>(i)]));
    EXPECT_TRUE(std::ranges::all_of(session.logits(), [](float x) { return std::isfinite(x); })) << scorer;
    const KvStats stats = session.stats();
    for (std::size_t l = 0; l < stats.layers.size(); ++l) {
      const int64_t window = plan.model.window(static_cast<int64_t>(l));
      if (window == 0) continue;
      if (window == Fingerprint::kHoldsState) {
        EXPECT_EQ(stats.layers[l].bytes, plan.model.state_bytes);
        continue;
      }
      EXPECT_LE(stats.layers[l].tokens, window + kPackTokens - 1);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, FixedLayerSessions,
                         testing::Values("gemma2", "gemma3", "gpt-oss", "qwen3next", "qwen35", "qwen35moe"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::erase(name, '-');
                           return name;
                         });

// What is no number is never gone on from.
TEST(States, DamagedOnesAreRefused) {
  const TempDir dir;
  ASSERT_TRUE(WriteTestModel(HybridModelOptions("qwen35"), dir / "a.gguf"));
  const auto engine = Engine::Create(moend::Model::Load(dir / "a.gguf", {1, false}).value(), {1}).value();
  const Plan plan = FullPlan(engine->fingerprint(), 512);
  Session session = Session::Create(engine, plan).value();
  ASSERT_TRUE(session.Prefill(RandomTokens(40, 1)));
  const std::string saved = SaveSession(session).value();
  ASSERT_TRUE(RestoreSession(engine, plan, {}, saved));
  std::string bad = saved;
  const float nan = NAN;
  std::memcpy(bad.data() + bad.size() - 64, &nan, sizeof nan);
  const auto restored = RestoreSession(engine, plan, {}, bad);
  ASSERT_FALSE(restored);
  EXPECT_NE(restored.error().message.find("state"), std::string::npos) << restored.error().message;
  EXPECT_FALSE(RestoreSession(engine, plan, {}, saved.substr(0, saved.size() - 4)));
  EXPECT_FALSE(RestoreSession(engine, plan, {}, saved + "abcd"));
}

TEST(Sliding, PlansThatCompressSlidingLayersAreRefused) {
  const TempDir dir;
  ASSERT_TRUE(WriteTestModel(SlidingModel("gemma3"), dir / "a.gguf"));
  const auto engine = Engine::Create(moend::Model::Load(dir / "a.gguf", {1, false}).value(), {1}).value();
  Plan plan = FullPlan(engine->fingerprint(), 512);
  plan.layers[1] = {0.5, 4, 4};
  const auto session = Session::Create(engine, plan);
  ASSERT_FALSE(session);
  EXPECT_EQ(session.error().code, ErrorCode::kMismatch);
  EXPECT_NE(session.error().message.find("layer 1"), std::string::npos) << session.error().message;
  EXPECT_FALSE(ParsePlan(ToJson(plan), "x"));
}

// Keys and tensors that contradict each other, or leave nothing to see, are named.
TEST(Sliding, BadFilesAreNamed) {
  const TempDir dir;
  const std::string good = dir / "good.gguf", bad = dir / "bad.gguf";
  const auto refused = [&](const std::function<void(gguf_context*)>& edit, ErrorCode code, const char* says,
                           const std::function<std::string(const std::string&)>& rename = {}) {
    ASSERT_TRUE(EditModel(good, bad, edit, rename));
    const auto model = moend::Model::Load(bad, {1, false});
    ASSERT_FALSE(model) << says;
    EXPECT_EQ(model.error().code, code) << model.error().message;
    EXPECT_NE(model.error().message.find(says), std::string::npos) << model.error().message;
  };
  const auto number = [](const char* key, uint32_t value) {
    return [=](gguf_context* f) { gguf_set_val_u32(f, key, value); };
  };
  const auto real = [](const char* key, float value) {
    return [=](gguf_context* f) { gguf_set_val_f32(f, key, value); };
  };
  const auto without = [](const char* tensor) {
    return [=](const std::string& name) { return name == tensor ? std::string() : name; };
  };
  TestModelOptions o = SlidingModel("gemma3");
  o.window_pattern = 0;
  o.sliding = {true, true, false, true, false};
  ASSERT_TRUE(WriteTestModel(o, good));
  ASSERT_TRUE(moend::Model::Load(good, {1, false}));
  const char* pattern = "gemma3.attention.sliding_window_pattern";
  refused(number("gemma3.attention.sliding_window", 0), ErrorCode::kCorrupt, "sliding_window is 0");
  refused(number("gemma3.attention.sliding_window", 1u << 31), ErrorCode::kCorrupt, "sliding_window");
  refused(
      [&](gguf_context* f) {
        gguf_remove_key(f, pattern);
        gguf_set_val_u32(f, pattern, 6);
      },
      ErrorCode::kCorrupt, "sliding_window_pattern is 6, outside 1 to 5");
  refused(
      [&](gguf_context* f) {
        gguf_remove_key(f, pattern);
        gguf_set_val_u32(f, pattern, 0);
      },
      ErrorCode::kCorrupt, "sliding_window_pattern is 0");
  const auto flags = [&](std::vector<int8_t> values) {
    return
        [=](gguf_context* f) { gguf_set_arr_data(f, pattern, GGUF_TYPE_BOOL, values.data(), values.size()); };
  };
  refused(flags({1, 0}), ErrorCode::kCorrupt, "2 values instead of 5");
  refused(flags({1, 0, 1, 0, 1, 0}), ErrorCode::kCorrupt, "6 values instead of 5");
  refused(
      [&](gguf_context* f) {
        gguf_remove_key(f, pattern);
        gguf_set_val_str(f, pattern, "often");
      },
      ErrorCode::kCorrupt, "sliding_window_pattern");
  refused(real("gemma3.rope.freq_base_swa", 0.5f), ErrorCode::kCorrupt, "freq_base_swa");
  refused(real("gemma3.final_logit_softcapping", -1.0f), ErrorCode::kCorrupt, "final_logit_softcapping");
  refused({}, ErrorCode::kCorrupt, "lacks the tensor blk.2.attn_k_norm.weight",
          without("blk.2.attn_k_norm.weight"));
  refused({}, ErrorCode::kCorrupt, "lacks the tensor blk.0.post_ffw_norm.weight",
          without("blk.0.post_ffw_norm.weight"));
  refused(number("gemma3.expert_count", 8), ErrorCode::kUnsupported, "8 experts");

  ASSERT_TRUE(WriteTestModel(SlidingModel("gemma2"), good));
  refused(real("gemma2.attn_logit_softcapping", -50.0f), ErrorCode::kCorrupt, "attn_logit_softcapping");
  refused(real("gemma2.final_logit_softcapping", 0.0f), ErrorCode::kCorrupt, "final_logit_softcapping is 0");

  ASSERT_TRUE(WriteTestModel(SlidingModel("gpt-oss"), good));
  refused([](gguf_context* f) { gguf_remove_key(f, "gpt-oss.attention.sliding_window"); },
          ErrorCode::kCorrupt, "lacks the key gpt-oss.attention.sliding_window");
  refused({}, ErrorCode::kCorrupt, "lacks the tensor blk.3.attn_sinks.weight",
          without("blk.3.attn_sinks.weight"));
  refused({}, ErrorCode::kCorrupt, "lacks the tensor blk.1.ffn_up_exps.bias",
          without("blk.1.ffn_up_exps.bias"));
  refused(number("gpt-oss.attention.head_count", 2), ErrorCode::kCorrupt, "attn_q");
}

// The text part of a file with an image encoder runs; tensors that nobody knows do not pass.
TEST(Sliding, Gemma3WithImageEncoder) {
  const TempDir dir;
  TestModelOptions o = SlidingModel("gemma3");
  ASSERT_TRUE(WriteTestModel(o, dir / "text.gguf"));
  o.vision = true;
  ASSERT_TRUE(WriteTestModel(o, dir / "vision.gguf"));
  const auto text = moend::Model::Load(dir / "text.gguf", {1, false});
  const auto vision = moend::Model::Load(dir / "vision.gguf", {1, false});
  ASSERT_TRUE(vision) << vision.error().message;
  std::vector<std::vector<float>> logits;
  for (const auto& model : {*text, *vision}) {
    auto session = Session::Create(Engine::Create(model, {1}).value(),
                                   FullPlan(Engine::Create(model, {1}).value()->fingerprint(), 64));
    ASSERT_TRUE(session);
    ASSERT_TRUE(session->Prefill(RandomTokens(30, 1)));
    logits.emplace_back(session->logits().begin(), session->logits().end());
  }
  EXPECT_EQ(logits[0], logits[1]);
  ASSERT_TRUE(EditModel(dir / "vision.gguf", dir / "odd.gguf", {}, [](const std::string& name) {
    return name.starts_with("mm.") ? "blk.0.odd.weight" : name;
  }));
  const auto odd = moend::Model::Load(dir / "odd.gguf", {1, false});
  ASSERT_FALSE(odd);
  EXPECT_NE(odd.error().message.find("blk.0.odd.weight"), std::string::npos);
}

}  // namespace
}  // namespace moend::test
