// The engine behind the server: its byte bounds hold at every moment, forks and saved contexts go on alike,
// streams decode while a prompt is read, and damaged saved contexts are refused.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <random>
#include <set>

#include "moend/engine/session_state.h"
#include "moend/plan/query_stats.h"
#include "moend/serve/engine_backend.h"
#include "moend/serve/sha256.h"
#include "tests/support/serve_client.h"
#include "tests/support/test_model.h"

namespace moend::serve {
namespace {

struct World {
  moend::test::TempDir dir;
  std::shared_ptr<Engine> engine;
  Plan plan;

  explicit World(const std::string& scorer = "keydiff", const std::string& hybrid = {}) {
    const std::string path = dir / "small.gguf";
    moend::test::TestModelOptions options;
    if (!hybrid.empty()) options = moend::test::HybridModelOptions(hybrid);
    options.chat_template = true;
    EXPECT_TRUE(moend::test::WriteTestModel(options, path));
    auto model = Model::Load(path);
    EXPECT_TRUE(model) << model.error().message;
    engine = Engine::Create(*model, {.n_threads = 1, .block_tokens = 128}).value();
    plan = FullPlan(engine->fingerprint(), 4096);
    plan.scorer = scorer;
    plan.refit = scorer == "reconstruct";
    plan.layers = {{0.5, 4, 4}, {0.25, 8, 4}, {1.0, 3, 2}};
    if (!hybrid.empty()) plan.layers = {{}, {0.5, 4, 4}, {}, {0.25, 8, 4}};
  }
  std::unique_ptr<Backend> Make(std::vector<Plan> further = {}) const {
    auto backend = MakeEngineBackend(engine, {.plan = plan, .further = std::move(further), .n_ctx = 4096});
    EXPECT_TRUE(backend) << backend.error().message;
    return std::move(*backend);
  }
  std::vector<Plan> Smaller() const {
    Plan one = plan, two = plan;
    one.layers = {{0.25, 3, 3}, {0.25, 4, 2}, {0.5, 2, 2}};
    two.layers = {{0.1, 2, 2}, {0.1, 2, 2}, {0.25, 2, 2}};
    return {one, two};
  }
};

const std::function<bool(double)> kGoOn = [](double) { return true; };

std::vector<float> Logits(const Context& c) {
  return {c.logits().begin(), c.logits().end()};
}

// Decodes `n` tokens greedily; returns them.
std::vector<int32_t> Go(Backend& backend, Context& c, int64_t n) {
  std::vector<int32_t> out;
  for (int64_t i = 0; i < n; ++i) {
    const auto logits = c.logits();
    const auto token = static_cast<int32_t>(std::ranges::max_element(logits) - logits.begin());
    Context* one = &c;
    const auto ok = backend.DecodeBatch({&one, 1}, {&token, 1});
    EXPECT_TRUE(ok) << ok.error().message;
    out.push_back(token);
  }
  return out;
}

// A scorer, and a hybrid's architecture or none.
class EngineBackendTest : public ::testing::TestWithParam<std::pair<const char*, const char*>> {};

TEST_P(EngineBackendTest, BytesStayBelowTheirBounds) {
  const World world(GetParam().first, GetParam().second);
  for (const int64_t n : {1, 63, 200, 700, 2000}) {
    const auto backend = world.Make();  // each with a peak of its own
    auto context = backend->NewContext().value();
    ASSERT_TRUE(backend->Prefill(*context, moend::test::RandomTokens(n, 1), kGoOn));
    EXPECT_LE(context->bytes(), backend->ContextBound(n)) << n;
    EXPECT_LE(backend->peak_bytes(), backend->ContextBound(n) + backend->PrefillScratch(0, n)) << n;
    int64_t most = 0;
    for (int64_t i = 0; i < 300; ++i) {
      Go(*backend, *context, 1);
      most = std::max(most, backend->live_bytes() - backend->ContextBound(n + i + 1));
    }
    EXPECT_LE(most, 0) << n;
    // A long further turn: packed whole, then evicted. In a backend that has not seen the first prompt, whose
    // peak may be higher.
    const int64_t past = std::ssize(context->tokens());
    const auto further = world.Make();
    auto turn = further->Restore(backend->Serialize(*context).value()).value();
    ASSERT_TRUE(further->Prefill(*turn, moend::test::RandomTokens(900, 2), kGoOn));
    EXPECT_LE(further->peak_bytes(), further->ContextBound(past + 900) + further->PrefillScratch(past, 900))
        << n;
    EXPECT_LE(turn->bytes(), further->ContextBound(past + 900)) << n;
    context.reset();
    turn.reset();
    EXPECT_EQ(backend->live_bytes(), 0);
    EXPECT_EQ(further->live_bytes(), 0);
  }
}
INSTANTIATE_TEST_SUITE_P(Scorers, EngineBackendTest,
                         ::testing::Values(std::pair("keydiff", ""), std::pair("snapkv", ""),
                                           std::pair("h2o", ""), std::pair("streaming", ""),
                                           std::pair("reconstruct", ""), std::pair("keydiff", "qwen35"),
                                           std::pair("reconstruct", "qwen3next")));

TEST(EngineBackend, AForkGoesOnAsItsParent) {
  const World world;
  const auto backend = world.Make();
  auto parent = backend->NewContext().value();
  ASSERT_TRUE(backend->Prefill(*parent, moend::test::RandomTokens(3000, 3), kGoOn));
  const int64_t alone = backend->live_bytes();
  auto fork = backend->Fork(*parent).value();
  EXPECT_LT(backend->live_bytes(), alone * 3 / 2);  // pages are shared
  const auto tail = moend::test::RandomTokens(40, 4);
  ASSERT_TRUE(backend->Prefill(*fork, tail, kGoOn));
  const auto said = Go(*backend, *fork, 200);
  fork.reset();
  ASSERT_TRUE(backend->Prefill(*parent, tail, kGoOn));
  EXPECT_EQ(Go(*backend, *parent, 200), said);
}

TEST(EngineBackend, StreamsDecodeWhileAPromptIsRead) {
  const World world;
  const auto backend = world.Make();
  const auto prompt = moend::test::RandomTokens(300, 5), other = moend::test::RandomTokens(1500, 6);
  auto calm = backend->NewContext().value(), stream = backend->NewContext().value(),
       reader = backend->NewContext().value(), quiet = backend->NewContext().value();
  ASSERT_TRUE(backend->Prefill(*calm, prompt, kGoOn));
  ASSERT_TRUE(backend->Prefill(*stream, prompt, kGoOn));
  const auto wanted = Go(*backend, *calm, 36);
  std::vector<int32_t> got;
  ASSERT_TRUE(backend->Prefill(*reader, other, [&](double) {
    const auto more = Go(*backend, *stream, 1);
    got.insert(got.end(), more.begin(), more.end());
    return true;
  }));
  ASSERT_EQ(got.size(), 36u);  // 3 layers of 12 blocks
  EXPECT_EQ(got, wanted);
  ASSERT_TRUE(backend->Prefill(*quiet, other, kGoOn));
  EXPECT_EQ(Logits(*reader), Logits(*quiet));
}

TEST(EngineBackend, AStoppedPrefillGivesItsMemoryBack) {
  const World world;
  const auto backend = world.Make();
  auto context = backend->NewContext().value();
  const auto r =
      backend->Prefill(*context, moend::test::RandomTokens(1000, 7), [](double done) { return done < 0.5; });
  ASSERT_FALSE(r);
  EXPECT_EQ(r.error().code, ErrorCode::kCancelled);
  context.reset();
  EXPECT_EQ(backend->live_bytes(), 0);
}

TEST(EngineBackend, CompressingFurtherFreesMemoryAndStillDecodes) {
  const World world;
  const auto backend = world.Make(world.Smaller());
  EXPECT_EQ(backend->info().levels, 2);
  auto context = backend->NewContext().value();
  ASSERT_TRUE(backend->Prefill(*context, moend::test::RandomTokens(2000, 8), kGoOn));
  int64_t bytes = context->bytes();
  for (int level = 1; level <= 2; ++level) {
    ASSERT_TRUE(backend->Compress(*context, level));
    EXPECT_LT(context->bytes(), bytes * 9 / 10) << level;
    EXPECT_EQ(backend->live_bytes(), context->bytes());
    EXPECT_LE(backend->peak_bytes(), backend->ContextBound(2000) + std::max(backend->PrefillScratch(0, 2000),
                                                                            backend->CompressScratch(2000)));
    bytes = context->bytes();
    EXPECT_EQ(context->stats().layers[0].expert,
              world.Smaller()[static_cast<std::size_t>(level - 1)].layers[0]);
  }
  Go(*backend, *context, 200);  // evicts to the new ratios
  EXPECT_LE(context->bytes(), backend->ContextBound(2200));
}

TEST(EngineBackend, ASavedContextGoesOnElsewhere) {
  const World world;
  const auto backend = world.Make(), elsewhere = world.Make();
  EXPECT_EQ(backend->info().cache_id, elsewhere->info().cache_id);
  auto context = backend->NewContext().value();
  ASSERT_TRUE(backend->Prefill(*context, moend::test::RandomTokens(700, 9), kGoOn));
  ASSERT_TRUE(backend->Prefill(*context, moend::test::RandomTokens(50, 10),
                               kGoOn));  // some tokens since the eviction
  const std::string bytes = backend->Serialize(*context).value();
  auto restored = elsewhere->Restore(bytes).value();
  EXPECT_EQ(restored->tokens(), context->tokens());
  EXPECT_LE(restored->bytes(), context->bytes());  // without the room that appending had left over
  const auto tail = moend::test::RandomTokens(30, 11);
  ASSERT_TRUE(backend->Prefill(*context, tail, kGoOn));
  ASSERT_TRUE(elsewhere->Prefill(*restored, tail, kGoOn));
  EXPECT_EQ(Logits(*restored), Logits(*context));
  EXPECT_EQ(Go(*elsewhere, *restored, 200), Go(*backend, *context, 200));
}

TEST(EngineBackend, OtherPlansAndModelsHaveOtherNames) {
  World world;
  const std::string id = world.Make()->info().cache_id;
  auto context = world.Make()->NewContext().value();
  world.plan.layers[1].k_bits = 4;
  const auto other = world.Make();
  EXPECT_NE(other->info().cache_id, id);
  world.plan.layers[1].k_bits = 8;
  const auto backend = world.Make();
  auto saved = backend->NewContext().value();
  ASSERT_TRUE(backend->Prefill(*saved, moend::test::RandomTokens(300, 12), kGoOn));
  const auto refused = other->Restore(backend->Serialize(*saved).value());
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kMismatch);
}

TEST(EngineBackend, DamagedSavedContextsAreRefused) {
  const World world;
  const auto backend = world.Make();
  auto context = backend->NewContext().value();
  ASSERT_TRUE(backend->Prefill(*context, moend::test::RandomTokens(200, 13), kGoOn));
  const std::string good = backend->Serialize(*context).value();
  ASSERT_TRUE(backend->Restore(good));
  std::mt19937_64 random(14);
  for (int i = 0; i < 400; ++i) EXPECT_FALSE(backend->Restore(good.substr(0, random() % good.size())));
  EXPECT_FALSE(backend->Restore(good + "x"));
  const std::size_t head = 8 + 8 + 8 + 200 * 4 + 8;  // up to the first cache
  for (int i = 0; i < 3000; ++i) {
    std::string bad = good;
    const std::size_t at = i % 2 ? random() % head : random() % bad.size();
    const uint64_t value = random() >> (random() % 64);
    std::memcpy(bad.data() + at, &value, std::min<std::size_t>(8, bad.size() - at));
    // Tokens carry no checksum of their own here (the store's is around all): they may differ, the rest not.
    auto r = backend->Restore(bad);
    if (r) {
      EXPECT_EQ((*r)->tokens().size(), 200u);
    }
  }
  EXPECT_EQ(backend->live_bytes(), context->bytes());
}

// Makes a saved session say that `plan` made it. Its format is in session_state.cpp and serialize.cpp.
void ReplaceKeepRatios(std::string& bytes, const Plan& plan) {
  const auto number = [&](std::size_t at) {
    int64_t n;
    std::memcpy(&n, bytes.data() + at, sizeof n);
    return n;
  };
  const auto checksum = [](std::string_view blob) {
    uint64_t state = 0x9E3779B97F4A7C15u * (blob.size() + 1);
    for (std::size_t i = 0; i < blob.size(); i += 8) {
      uint64_t word = 0;
      std::memcpy(&word, blob.data() + i, std::min<std::size_t>(8, blob.size() - i));
      state = std::rotl(state ^ word, 29) * 0xBF58476D1CE4E5B9u;
    }
    return state ^ (state >> 32);
  };
  constexpr std::size_t kKeep = 32;  // in the header of a cache
  std::size_t at = 8 + 8 + 8;        // magic, since the last eviction, of the first prompt
  at += 8 + 4 * static_cast<std::size_t>(number(at));
  const int64_t n_caches = number(at), heads = plan.model.shape.n_kv_heads;
  at += 8;
  for (int64_t i = 0; i < n_caches; ++i) {
    const auto size = static_cast<std::size_t>(number(at));
    at += 8;
    const double keep = plan.expert(i / heads, i % heads).keep;
    std::memcpy(bytes.data() + at + kKeep, &keep, sizeof keep);
    const uint64_t sum = checksum(std::string_view(bytes).substr(at, size - 8));
    std::memcpy(bytes.data() + at + size - 8, &sum, sizeof sum);
    at += size;
  }
  ASSERT_EQ(at, bytes.size());
}

// A store may hold what another plan made: well formed, but with more tokens than this one allows.
TEST(EngineBackend, RefusesASavedContextThatExceedsItsPlan) {
  const World world;
  Plan whole = world.plan;
  for (Expert& e : whole.layers) e.keep = 1;
  const auto session = [&](const Plan& plan) {
    auto s = Session::Create(world.engine, plan, {.n_ctx = 4096}).value();
    EXPECT_TRUE(s.Prefill(moend::test::RandomTokens(1500, 1), {}));
    return s;
  };
  const auto restore = [&](const Plan& plan, const std::string& bytes) {
    return RestoreSession(world.engine, plan, {.n_ctx = 4096}, bytes);
  };
  EXPECT_TRUE(restore(world.plan, SaveSession(session(world.plan)).value()));
  // The plan's own experts around caches that were never evicted: what a hostile store would send.
  std::string bytes = SaveSession(session(whole)).value();
  ASSERT_TRUE(restore(whole, bytes));
  ReplaceKeepRatios(bytes, world.plan);
  const auto forged = restore(world.plan, bytes);
  ASSERT_FALSE(forged);
  EXPECT_EQ(forged.error().code, ErrorCode::kCorrupt);
  EXPECT_NE(forged.error().message.find("more than its plan allows"), std::string::npos)
      << forged.error().message;
  // Between two evictions a context does hold more; that comes back.
  auto decoded = session(world.plan);
  for (int i = 0; i < 100; ++i) ASSERT_TRUE(decoded.Decode(5));
  EXPECT_TRUE(restore(world.plan, SaveSession(decoded).value()));
}

TEST(EngineBackend, TheCacheIdTellsPlansApart) {
  const World world;
  const auto id = [](const Plan& plan) { return CacheId(plan, plan.scorer, plan.model.hash); };
  Plan adaptive = world.plan;
  adaptive.adaptive_heads = true;
  Plan trig = world.plan, other = world.plan;
  QueryStats stats{.tokens = 1, .n_heads = 1, .n_pairs = 1, .pairs = {{1, 0, 1}}};
  trig.queries = std::make_shared<QueryStats>(stats);
  stats.pairs[0].im = 0.5;
  other.queries = std::make_shared<QueryStats>(stats);
  const std::set<std::string> ids = {id(world.plan), id(adaptive), id(trig), id(other)};
  EXPECT_EQ(ids.size(), 4u);
}

TEST(EngineBackend, SpeaksTheModelsChatTemplate) {
  const World world;
  const auto backend = world.Make();
  const std::vector<ChatMessage> chat = {{"system", "be brief"}, {"user", "hello"}};
  const auto whole = backend->Chat(chat, {}, {}).value().tokens;
  const auto before =
      backend->Chat(std::span(chat).first(1), {.add_generation_prompt = false}, {}).value().tokens;
  ASSERT_LT(before.size(), whole.size());
  EXPECT_TRUE(std::equal(before.begin(), before.end(), whole.begin()));
  EXPECT_NE(backend->Detokenize(whole).find("hello"), std::string::npos);
}

TEST(FurtherPlans, GoDownTheCurveLayerByLayer) {
  Profile profile;
  profile.model = {"llama", "m", 4, {2, 64}, "hash"};
  profile.chunks = 1;
  profile.experts = {{0.02, 2, 2}, {0.1, 2, 2}, {0.25, 4, 2}, {0.5, 4, 4}, {1.0, 8, 8}, {1.0, 16, 16}};
  for (int layer = 0; layer < 4; ++layer) {
    std::vector<ProfileCell> cells;
    for (int e = 0; e < 6; ++e) cells.push_back({0.1 * (6 - e) * (layer + 1), 0.01 * (6 - e) * (layer + 1)});
    profile.cells.push_back(cells);
  }
  Plan base = FullPlan(profile.model, 8192);
  base.guard = profile.guard;
  base.layers = {{0.25, 4, 2}, {0.5, 4, 4}, {0.5, 4, 4}, {1.0, 8, 8}};
  const auto plans = FurtherPlans(profile, base, 8192, 3);
  ASSERT_GE(plans.size(), 2u);
  int64_t bytes = PlanBytes(base, 8192, 0).value();
  const Plan* before = &base;
  for (const Plan& p : plans) {
    for (std::size_t l = 0; l < 4; ++l) {
      EXPECT_LE(p.layers[l].keep, before->layers[l].keep);
      EXPECT_LE(p.layers[l].k_bits, before->layers[l].k_bits);
      EXPECT_LE(p.layers[l].v_bits, before->layers[l].v_bits);
    }
    const int64_t now = PlanBytes(p, 8192, 0).value();
    EXPECT_LT(static_cast<double>(now), 0.91 * static_cast<double>(bytes));
    bytes = now;
    before = &p;
  }
  base.model.hash = "another";
  EXPECT_TRUE(FurtherPlans(profile, base, 8192, 3).empty());
}

// Everything together, over HTTP: a real model, a tight budget, many clients.
TEST(EngineServer, KeepsItsBudgetAndItsWordsWithManyClients) {
  const World world;
  ServerOptions options;
  options.port = 0;
  options.scheduler.slots = 4;
  auto backend = world.Make(world.Smaller());
  options.scheduler.kv_budget_bytes = 3 * (backend->ContextBound(700) + backend->PrefillScratch(0, 700));
  Backend* seen = backend.get();
  const int64_t budget = options.scheduler.kv_budget_bytes;
  Server server(std::move(options), Log());
  const int port = server.Start().value();
  server.Serve(std::move(backend), nullptr);
  const auto ask = [&](int i) {
    const nlohmann::json body = {
        {"prompt", moend::test::RandomTokens(300 + 40 * (i % 8), static_cast<uint64_t>(i % 5))},
        {"max_tokens", 20},
        {"temperature", 0},
        {"cache_prompt", i % 3 != 0}};
    const auto r = test::Ask(port, test::Post("/v1/completions", body.dump()), 60);
    EXPECT_EQ(r.status, 200) << r.body;
    return r.json()["choices"][0]["text"].dump();
  };
  std::vector<std::string> texts(24);
  std::vector<std::thread> clients;
  for (int c = 0; c < 6; ++c)
    clients.emplace_back([&, c] {
      for (int i = c; i < 24; i += 6) texts[static_cast<std::size_t>(i)] = ask(i);
    });
  for (auto& c : clients) c.join();
  EXPECT_LE(seen->peak_bytes(), budget);
  for (int i = 0; i < 24; i += 3) EXPECT_EQ(ask(i), texts[static_cast<std::size_t>(i)]) << i;
}

}  // namespace
}  // namespace moend::serve
