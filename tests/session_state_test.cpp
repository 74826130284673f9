// What a saved session may hold.
#include "moend/engine/session_state.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "moend/cache/serialize.h"
#include "moend/engine/engine_impl.h"
#include "tests/support/test_model.h"

namespace moend {
namespace {

void Append(std::string& out, int64_t value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

// As SaveSession() writes, with every KV head's cache made by `cache`.
template <class F>
std::string SessionOf(int64_t since_eviction, const std::vector<int32_t>& tokens, std::size_t heads,
                      F&& cache) {
  std::string out = "MOENDSS2";
  Append(out, since_eviction);
  Append(out, std::ssize(tokens));  // of the first prompt
  Append(out, std::ssize(tokens));
  out.append(reinterpret_cast<const char*>(tokens.data()), tokens.size() * sizeof(int32_t));
  Append(out, static_cast<int64_t>(heads));
  for (std::size_t h = 0; h < heads; ++h) {
    const std::string blob = *SerializeCache(cache(h));
    Append(out, std::ssize(blob));
    out += blob;
  }
  return out;
}

struct World {
  test::TempDir dir;
  std::shared_ptr<Engine> engine;
  Plan plan;
  std::vector<int32_t> tokens = test::RandomTokens(700, 1);
  std::size_t heads = 0;
  World() {
    const std::string path = dir / "model.gguf";
    EXPECT_TRUE(test::WriteTestModel({}, path));
    engine = *Engine::Create(*Model::Load(path, {1, false}), {1});
    plan = FullPlan(engine->fingerprint(), 1024);
    plan.scorer = "keydiff";
    for (Expert& e : plan.layers) e = {0.5, 4, 4};
    heads = plan.layers.size() * static_cast<std::size_t>(plan.model.shape.n_kv_heads);
  }
  // A cache of one KV head that saw all tokens and evicted down to `left` more than its expert allows.
  LayerCache Cache(std::size_t i, const Expert& expert, int64_t left) const {
    const auto n_heads = static_cast<std::size_t>(plan.model.shape.n_kv_heads);
    const int64_t d = plan.model.shape.head_size;
    const auto rotations = *engine->impl().Rotations(static_cast<int64_t>(i / n_heads));
    LayerCache cache =
        *LayerCache::Create(nullptr, {1, d}, expert, plan.guard, false, rotations[i % n_heads]);
    const std::vector<float> kv(tokens.size() * static_cast<std::size_t>(d), 0.25f);
    EXPECT_TRUE(cache.Append(kv.data(), kv.data(), std::ssize(tokens)));
    const std::vector<float> scores(static_cast<std::size_t>(cache.view(0).n_pages * kPageTokens), 1.0f);
    EXPECT_TRUE(cache.Evict(0, scores, std::max<int64_t>(0, cache.Excess(0) - left)));
    return cache;
  }
  Expected<Session> Restore(const std::string& bytes) const {
    return RestoreSession(engine, plan, {}, bytes);
  }
};

TEST(SessionState, NoMoreTokensThanThePlanAllows) {
  const World world;
  const auto saved = [&](int64_t since, int64_t left) {
    return SessionOf(since, world.tokens, world.heads, [&](std::size_t i) {
      return world.Cache(i, {0.5, 4, 4}, left);
    });
  };
  EXPECT_TRUE(world.Restore(saved(0, 0)));
  EXPECT_TRUE(world.Restore(saved(100, 100))) << "not evicted for 100 tokens";
  for (const auto& [since, left] : {std::pair{0, 300}, {0, 65}, {100, 200}}) {
    const auto restored = world.Restore(saved(since, left));
    ASSERT_FALSE(restored) << since << " " << left;
    EXPECT_EQ(restored.error().code, ErrorCode::kCorrupt);
    EXPECT_NE(restored.error().message.find("more than its plan allows"), std::string::npos);
  }
}

TEST(SessionState, HeadsThatShareALayerTakeNoMoreThanIt) {
  World world;
  world.plan.adaptive_heads = true;
  const auto n_heads = static_cast<std::size_t>(world.plan.model.shape.n_kv_heads);
  ASSERT_EQ(n_heads, 2u);
  const auto saved = [&](double first, double second) {
    return SessionOf(0, world.tokens, world.heads, [&](std::size_t i) {
      return world.Cache(i, {i % n_heads == 0 ? first : second, 4, 4}, 0);
    });
  };
  EXPECT_TRUE(world.Restore(saved(0.5, 0.5)));
  EXPECT_TRUE(world.Restore(saved(0.7, 0.3)));
  const auto restored = world.Restore(saved(1.0, 1.0));
  ASSERT_FALSE(restored);
  EXPECT_NE(restored.error().message.find("where its plan allows"), std::string::npos);
}

// What a session of its own saved is always restored, whenever that was.
TEST(SessionState, EverySavedMomentIsRestored) {
  for (const bool adaptive : {false, true}) {
    World world;
    world.plan.adaptive_heads = adaptive;
    Session session = *Session::Create(world.engine, world.plan);
    ASSERT_TRUE(session.Prefill(world.tokens));
    for (int i = 0; i < 300; ++i) {
      if (i % 25 == 0) {
        const auto saved = SaveSession(session);
        ASSERT_TRUE(saved);
        const auto restored = world.Restore(*saved);
        ASSERT_TRUE(restored) << restored.error().message << " at " << i;
      }
      ASSERT_TRUE(session.Decode(i % 200));
    }
    ASSERT_TRUE(session.Prefill(test::RandomTokens(90, 3)));
    EXPECT_TRUE(world.Restore(*SaveSession(session)));
    ASSERT_TRUE(session.Prefill(test::RandomTokens(190, 4)));
    EXPECT_TRUE(world.Restore(*SaveSession(session)));
  }
}

}  // namespace
}  // namespace moend
