// The engine end to end on the reference model and on small random ones: exactness with the full cache,
// memory, eviction.
#include "moend/engine/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "moend/base/file.h"
#include "moend/engine/capture.h"
#include "moend/engine/engine_impl.h"
#include "moend/model/model.h"
#include "tests/support/libllama_logits.h"
#include "tests/support/test_model.h"

namespace moend {
namespace {

const std::string kReference = MOEND_SOURCE_DIR "/models/moend-reference-23m-q8_0.gguf";

std::shared_ptr<const Model> Reference() {
  static const auto model = Model::Load(kReference);
  EXPECT_TRUE(model) << model.error().message;
  return model ? *model : nullptr;
}

// The reference model with its weights as float32. With weights of few bits ggml rounds every matrix's input
// to 8 bits, and the least difference flips some of those: libllama's own two attention kernels are then 0.02
// nats apart (exactness_test.cpp). On float32 weights nothing but attention itself can differ.
struct Float32Reference {
  test::TempDir dir;
  std::string path = dir / "reference-f32.gguf";
  std::shared_ptr<const Model> model;
  Float32Reference() {
    EXPECT_TRUE(test::ConvertModel(kReference, path, GGML_TYPE_F32));
    auto loaded = Model::Load(path);
    EXPECT_TRUE(loaded) << loaded.error().message;
    if (loaded) model = *loaded;
  }
};

// One thread unless threads are the point: spinning threads crawl on a busy machine.
std::shared_ptr<Engine> MakeEngine(std::shared_ptr<const Model> model, int64_t block = 512, int threads = 1) {
  auto engine = Engine::Create(std::move(model), {threads, block});
  EXPECT_TRUE(engine) << engine.error().message;
  return *engine;
}

// The first n tokens of the held-out text.
std::vector<int32_t> Text(int64_t n) {
  static const std::vector<int32_t> all = [] {
    auto text = ReadFile(MOEND_SOURCE_DIR "/models/suite/heldout.txt");
    EXPECT_TRUE(text);
    auto tokens = Reference()->tokenizer().Tokenize(*text, true, true);
    EXPECT_TRUE(tokens);
    return *tokens;
  }();
  return {all.begin(), all.begin() + n};
}

Plan Uniform(const Engine& engine, const Expert& expert) {
  Plan plan = FullPlan(engine.fingerprint(), engine.model().hparams().n_ctx_train);
  plan.variant = "2d_uniform";
  plan.scorer = "keydiff";
  std::fill(plan.layers.begin(), plan.layers.end(), expert);
  return plan;
}

double Kl(const float* p, const float* q, int64_t n) {
  double pm = p[0], qm = q[0];
  for (int64_t i = 0; i < n; ++i) pm = std::max(pm, double{p[i]}), qm = std::max(qm, double{q[i]});
  double ps = 0, qs = 0, cross = 0;
  for (int64_t i = 0; i < n; ++i) {
    ps += std::exp(p[i] - pm);
    qs += std::exp(q[i] - qm);
    cross += std::exp(p[i] - pm) * (double{p[i]} - q[i]);
  }
  return cross / ps - pm - std::log(ps) + qm + std::log(qs);
}

struct Agreement {
  double sum = 0, worst = 0;
  int64_t n = 0, same_top = 0;
  void Add(const float* p, const float* q, int64_t vocab) {
    const double kl = Kl(p, q, vocab);
    sum += kl;
    worst = std::max(worst, kl);
    same_top += (std::max_element(p, p + vocab) - p) == (std::max_element(q, q + vocab) - q);
    ++n;
  }
};

// Session's logits after a prompt of each length, then token by token, against libllama's at the same
// positions.
Agreement CompareWithLibllama(const std::string& path, std::shared_ptr<const Model> model,
                              const std::vector<int32_t>& tokens, std::span<const int64_t> prompts,
                              std::span<const int64_t> blocks) {
  const int64_t vocab = model->hparams().n_vocab, n = static_cast<int64_t>(tokens.size());
  auto theirs = test::LibllamaLogits(path, tokens);
  Agreement agreement;
  EXPECT_EQ(static_cast<int64_t>(theirs.size()), n);
  if (theirs.empty()) return agreement;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    auto engine = MakeEngine(model, blocks[i % blocks.size()]);
    auto session = Session::Create(engine, FullPlan(engine->fingerprint(), n));
    EXPECT_TRUE(session) << session.error().message;
    const auto read = session->Prefill(std::span(tokens).first(static_cast<std::size_t>(prompts[i])));
    EXPECT_TRUE(read) << read.error().message;
    const int64_t last = i + 1 == prompts.size() ? n : std::min(n, prompts[i] + 3);
    for (int64_t at = prompts[i]; at <= last; ++at) {
      agreement.Add(theirs[static_cast<std::size_t>(at - 1)].data(), session->logits().data(), vocab);
      if (at == last) break;
      const auto step = session->Decode(tokens[static_cast<std::size_t>(at)]);
      EXPECT_TRUE(step) << step.error().message;
    }
  }
  return agreement;
}

TEST(Exactness, ReferenceModelAgreesWithLibllama) {
  const Float32Reference reference;
  constexpr int64_t kPrompts[] = {1, 2, 63, 64, 65, 1200, 800};
  constexpr int64_t kBlocks[] = {512, 1, 64, 7, 1200, 100, 33};
  const auto a = CompareWithLibllama(reference.path, reference.model, Text(1240), kPrompts, kBlocks);
  EXPECT_GE(a.n, 400);
  EXPECT_LT(a.sum / static_cast<double>(a.n), 1e-4);
  EXPECT_LT(a.worst, 1e-2);
  EXPECT_GE(static_cast<double>(a.same_top), 0.995 * static_cast<double>(a.n));
}

TEST(Exactness, RandomModelsAgreeWithLibllama) {
  for (const char* architecture : {"llama", "qwen2", "qwen3"}) {
    SCOPED_TRACE(architecture);
    const test::TempDir dir;
    const std::string path = dir / "model.gguf";
    test::TestModelOptions options;
    options.architecture = architecture;
    ASSERT_TRUE(test::WriteTestModel(options, path));
    auto model = Model::Load(path);
    ASSERT_TRUE(model) << model.error().message;
    std::vector<int32_t> tokens(1240);
    std::mt19937 random(7);
    for (int32_t& t : tokens)
      t = static_cast<int32_t>(random() % static_cast<uint64_t>((*model)->hparams().n_vocab));
    constexpr int64_t kPrompts[] = {1, 2, 63, 64, 65, 1200, 800};
    constexpr int64_t kBlocks[] = {512, 1, 64, 7, 1200, 100, 33};
    const auto a = CompareWithLibllama(path, *model, tokens, kPrompts, kBlocks);
    EXPECT_GE(a.n, 400);
    EXPECT_LT(a.sum / static_cast<double>(a.n), 1e-4);
    EXPECT_LT(a.worst, 1e-2);
    EXPECT_GE(static_cast<double>(a.same_top), 0.995 * static_cast<double>(a.n));
  }
}

TEST(Exactness, FurtherTurnsEqualOnePrompt) {
  const Float32Reference reference;
  auto engine = MakeEngine(reference.model);
  const auto tokens = Text(700);
  const Plan plan = FullPlan(engine->fingerprint(), 1024);
  auto whole = Session::Create(engine, plan), turns = Session::Create(engine, plan);
  ASSERT_TRUE(whole && turns);
  ASSERT_TRUE(whole->Prefill(tokens));
  for (std::size_t at = 0, n; at < tokens.size(); at += n) {
    n = std::min<std::size_t>(tokens.size() - at, 1 + at / 2);
    ASSERT_TRUE(turns->Prefill(std::span(tokens).subspan(at, n)));
  }
  EXPECT_LT(Kl(whole->logits().data(), turns->logits().data(), engine->model().hparams().n_vocab), 1e-5);
  EXPECT_EQ(whole->tokens(), turns->tokens());
}

TEST(Exactness, ThreadsAndBatchesDoNotChangeTheResult) {
  const auto tokens = Text(300);
  std::vector<std::vector<float>> logits;
  for (const int threads : {1, 2}) {
    auto engine = MakeEngine(Reference(), 128, threads);
    auto session = Session::Create(engine, Uniform(*engine, {0.5, 4, 4}));
    ASSERT_TRUE(session && session->Prefill(tokens));
    auto a = session->Fork(), b = session->Fork();
    ASSERT_TRUE(a && b);
    ASSERT_TRUE(a->Decode(tokens[5]));
    Session* batch[] = {&*b, &*session};
    const int32_t next[] = {tokens[5], tokens[6]};
    ASSERT_TRUE(Session::DecodeBatch(batch, next));
    const int64_t vocab = engine->model().hparams().n_vocab;
    EXPECT_LT(Kl(a->logits().data(), b->logits().data(), vocab), 1e-6);
    logits.emplace_back(a->logits().begin(), a->logits().end());
    EXPECT_LT(Kl(logits[0].data(), logits.back().data(), vocab), 1e-6);
  }
}

TEST(Memory, PeakIsThePackedCacheOneLayerAndTheHiddenStates) {
  auto engine = MakeEngine(Reference());
  const int64_t n = 2048;
  for (const Expert& expert : {Expert{0.25, 4, 4}, Expert{1.0, 2, 2}, Expert{0.1, 16, 16}}) {
    const Plan plan = Uniform(*engine, expert);
    auto session = Session::Create(engine, plan);
    ASSERT_TRUE(session && session->Prefill(Text(n)));
    const KvStats stats = session->stats();
    const HyperParams& hp = engine->model().hparams();
    const int64_t layer = FullLayerBytes({hp.n_kv_heads, hp.head_size}, n);
    const int64_t hidden = n * hp.n_embd * static_cast<int64_t>(sizeof(float));
    EXPECT_LE(static_cast<double>(stats.peak_bytes),
              static_cast<double>(stats.bytes + layer + hidden) * 1.05);
    EXPECT_GT(stats.peak_bytes, layer + hidden);
    EXPECT_EQ(stats.bytes_full, layer * hp.n_layers);
    const auto planned = PlanBytes(plan, n, 0);
    ASSERT_TRUE(planned);
    EXPECT_LE(stats.bytes, *planned);
    EXPECT_GT(stats.bytes, *planned / 2);
  }
}

TEST(Memory, SessionsGiveEverythingBack) {
  auto engine = MakeEngine(Reference());
  auto ledger = std::make_shared<Ledger>();
  {
    auto session = Session::Create(engine, Uniform(*engine, {0.5, 3, 2}), {0, "snapkv", ledger});
    ASSERT_TRUE(session && session->Prefill(Text(600)));
    auto fork = session->Fork();
    ASSERT_TRUE(fork);
    for (int i = 0; i < 300; ++i) ASSERT_TRUE(fork->Decode(i + 100));
    EXPECT_GT(ledger->live(), 0);
    *session = std::move(*fork);
    EXPECT_EQ(ledger->live(), session->stats().bytes);
  }
  EXPECT_EQ(ledger->live(), 0);
}

TEST(Eviction, BudgetHoldsThroughALongGeneration) {
  auto engine = MakeEngine(Reference());
  for (const char* scorer : {"streaming", "snapkv", "h2o", "keydiff"}) {
    const Plan plan = Uniform(*engine, {0.2, 4, 3});
    auto session = Session::Create(engine, plan, {0, scorer});
    ASSERT_TRUE(session && session->Prefill(Text(600))) << scorer;
    const int64_t score_bytes = std::string_view(scorer) == "h2o" ? 4 : 0;
    for (int i = 0; i < 2 * kEvictInterval + 60; ++i) {
      const auto top =
          std::max_element(session->logits().begin(), session->logits().end()) - session->logits().begin();
      ASSERT_TRUE(session->Decode(static_cast<int32_t>(top))) << scorer;
      const auto n = static_cast<int64_t>(session->tokens().size());
      // Right after an eviction the plan's own arithmetic holds; until the next one at most 128 tokens come
      // on top.
      if ((i + 1) % kEvictInterval == 0) {
        const auto planned = PlanBytes(plan, n, score_bytes);
        ASSERT_TRUE(planned);
        EXPECT_LE(session->stats().bytes, *planned) << scorer << " at " << n;
      }
      const auto later = PlanBytes(Uniform(*engine, {1.0, 4, 3}), kEvictInterval, score_bytes);
      const auto planned = PlanBytes(plan, n, score_bytes);
      ASSERT_TRUE(planned && later);
      EXPECT_LE(session->stats().bytes, *planned + *later * 2) << scorer << " at " << n;
    }
    for (const auto& layer : session->stats().layers) EXPECT_LT(layer.tokens, 400);
  }
}

// Prefill attends to everything, so that what a layer evicts depends on its own scorer only.
TEST(Eviction, EachLayerHasItsOwnScorer) {
  auto engine = MakeEngine(Reference());
  const Plan plan = Uniform(*engine, {0.2, 4, 3});
  const auto tokens = Text(900);
  std::string names;
  for (int64_t l = 0; l < engine->model().hparams().n_layers; ++l)
    names += std::string(l > 0 ? "," : "") + (l % 2 > 0 ? "expected" : "keydiff");
  const auto kept = [&](const std::string& scorer) {
    auto session = Session::Create(engine, plan, {0, scorer});
    EXPECT_TRUE(session && session->Prefill(tokens)) << scorer;
    std::vector<std::vector<uint32_t>> all;
    for (const LayerCache& cache : session->impl().caches) all.push_back(cache.positions(0));
    EXPECT_TRUE(session->Decode(tokens[0]));
    return all;
  };
  const auto mixed = kept(names), keydiff = kept("keydiff"), expected = kept("expected");
  const auto heads = static_cast<std::size_t>(engine->model().hparams().n_kv_heads);
  ASSERT_EQ(mixed.size(), keydiff.size());
  for (std::size_t i = 0; i < mixed.size(); ++i) {
    EXPECT_EQ(mixed[i], i / heads % 2 > 0 ? expected[i] : keydiff[i]) << "cache " << i;
    EXPECT_NE(keydiff[i], expected[i]);
  }
  // The same through a capture, and a second turn evicts as well.
  const std::string scorers[] = {names};
  auto capture = KvCapture::Create(engine, tokens, scorers);
  ASSERT_TRUE(capture) << capture.error().message;
  auto captured = SessionFromCapture(engine, plan, *capture, {0, names});
  ASSERT_TRUE(captured) << captured.error().message;
  for (std::size_t i = 0; i < mixed.size(); ++i)
    EXPECT_EQ(captured->impl().caches[i].positions(0), mixed[i]) << "cache " << i;
  EXPECT_TRUE(captured->Prefill(Text(300)));
  const auto wrong = Session::Create(engine, plan, {0, "keydiff,expected"});
  ASSERT_FALSE(wrong);
  EXPECT_EQ(wrong.error().code, ErrorCode::kMismatch);
  EXPECT_NE(wrong.error().message.find("2 layers"), std::string::npos) << wrong.error().message;
}

TEST(Capture, GivesTheSameSessionAsAPrefill) {
  auto engine = MakeEngine(Reference());
  const auto tokens = Text(900);
  const std::string scorers[] = {"snapkv", "h2o"};
  auto capture = KvCapture::Create(engine, tokens, scorers);
  ASSERT_TRUE(capture) << capture.error().message;
  for (const std::string& scorer : scorers) {
    const Plan plan = Uniform(*engine, {0.3, 4, 2});
    auto direct = Session::Create(engine, plan, {0, scorer});
    ASSERT_TRUE(direct && direct->Prefill(tokens));
    auto captured = SessionFromCapture(engine, plan, *capture, {0, scorer});
    ASSERT_TRUE(captured) << captured.error().message;
    EXPECT_EQ(captured->stats().bytes, direct->stats().bytes);
    // Reading through the compressed cache is the same too: only the layers' inputs differ, which are not
    // compressed yet.
    ASSERT_TRUE(direct->Decode(tokens[10]) && captured->Decode(tokens[10]));
    EXPECT_LT(Kl(direct->logits().data(), captured->logits().data(), engine->model().hparams().n_vocab),
              1e-5);
  }
}

TEST(Errors, AreNamed) {
  auto engine = MakeEngine(Reference());
  Plan plan = FullPlan(engine->fingerprint(), 128);
  auto session = Session::Create(engine, plan, {100, ""});
  ASSERT_TRUE(session);
  const auto too_long = session->Prefill(Text(101));
  ASSERT_FALSE(too_long);
  EXPECT_EQ(too_long.error().code, ErrorCode::kTooLong);
  EXPECT_NE(too_long.error().message.find("101"), std::string::npos);
  EXPECT_NE(too_long.error().message.find("100"), std::string::npos);
  ASSERT_TRUE(session->Prefill(Text(100)));
  EXPECT_EQ(session->Decode(5).error().code, ErrorCode::kTooLong);
  // More than the model was trained for is allowed, more than positions can number is not.
  EXPECT_TRUE(Session::Create(engine, plan, {1 << 20, ""}));
  EXPECT_EQ(Session::Create(engine, plan, {kMostContextTokens + 1, ""}).error().code,
            ErrorCode::kInvalidArgument);
  EXPECT_EQ(Session::Create(engine, plan, {-1, ""}).error().code, ErrorCode::kInvalidArgument);
  auto other = Session::Create(engine, plan);
  EXPECT_FALSE(other->Prefill({}));
  EXPECT_FALSE(other->Decode(5));
  EXPECT_EQ(Session::Create(engine, plan, {0, "no-such-scorer"}).error().code, ErrorCode::kNotFound);
  plan.model.hash = "0123456789abcdef";
  EXPECT_EQ(Session::Create(engine, plan).error().code, ErrorCode::kMismatch);
}

TEST(Cancel, StopsAPrefill) {
  auto engine = MakeEngine(Reference());
  auto session = Session::Create(engine, FullPlan(engine->fingerprint(), 2048));
  ASSERT_TRUE(session);
  int calls = 0;
  const auto stopped = session->Prefill(Text(2000), [&](double) { return ++calls < 3; });
  ASSERT_FALSE(stopped);
  EXPECT_EQ(stopped.error().code, ErrorCode::kCancelled);
  EXPECT_EQ(calls, 3);
}

}  // namespace
}  // namespace moend
