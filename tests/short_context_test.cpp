// A short context takes no more compressed than uncompressed, and 5 % on top: tables and room start small.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "moend/cache/layer_cache.h"
#include "moend/engine/engine.h"
#include "tests/support/layer_model.h"
#include "tests/support/test_model.h"

namespace moend::test {
namespace {

constexpr int64_t kLongest = 300;

std::string Named(const KvShape& shape, const Expert& e, const Protected& guard, bool scores) {
  return "heads of " + std::to_string(shape.head_size) + ", keep " + std::to_string(e.keep) + ", " +
         std::to_string(e.k_bits) + " and " + std::to_string(e.v_bits) + " bits, " +
         std::to_string(guard.sinks) + " sinks, window " + std::to_string(guard.window) +
         (scores ? ", scores" : "");
}

struct ShortCase {
  KvShape shape;
  Expert expert;
  Protected guard;
  bool scores = false;
};

std::vector<ShortCase> ShortCases() {
  std::vector<ShortCase> cases;
  for (const double keep : {1.0, 0.5, 0.07})
    for (const int k : kBitWidths)
      for (const int v : kBitWidths) {
        const int64_t head_size = k == 4 ? 128 : v == 3 ? 80 : 64;
        cases.push_back({{1, head_size}, {keep, k, v}, {}, k == 8 && v < 8});
        if (k == v) cases.push_back({{1, 64}, {keep, k, v}, {3, 9}});
      }
  cases.push_back({{1, 16}, {0.3, 16, 16}, {0, 0}});
  cases.push_back({{1, 256}, {1.0, 16, 4}, {0, 1}});
  return cases;
}

void EvictExcess(LayerCache& cache) {
  Random random(1);
  ASSERT_TRUE(cache.PackExcess());
  const auto scores = RandomScores(random, cache.view(0).n_pages * kPageTokens);
  ASSERT_TRUE(cache.Evict(0, scores, cache.Excess(0)));
}

void ExpectShort(const LayerCache& cache, const Ledger& ledger) {
  const int64_t n = cache.tokens_seen();
  ASSERT_EQ(cache.bytes(), ledger.live());
  ASSERT_LE(cache.bytes() * 100, FullLayerBytes(cache.shape(), n) * 105) << n << " tokens";
}

TEST(ShortContext, TakesNoMoreWhileItGrows) {
  for (const ShortCase& c : ShortCases()) {
    SCOPED_TRACE(Named(c.shape, c.expert, c.guard, c.scores));
    for (const int64_t first : {0, 1, 33, 60}) {
      auto ledger = std::make_shared<Ledger>();
      LayerCache cache = MakeCache(ledger, c.shape, c.expert, c.guard, c.scores);
      Append(cache, first);
      while (cache.tokens_seen() < kLongest) {
        Append(cache, 1);
        if ((cache.tokens_seen() - first) % kEvictInterval == 0) EvictExcess(cache);
        ExpectShort(cache, *ledger);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(ShortContext, TakesNoMoreOnceItIsRead) {
  for (const ShortCase& c : ShortCases()) {
    SCOPED_TRACE(Named(c.shape, c.expert, c.guard, c.scores));
    Random random(2);
    for (int64_t n = 1; n <= kLongest; n += n < 70 ? 1 : 7) {
      const int64_t kept = KeptTokens(c.expert.keep, c.guard, n);
      const Dense dense = MakeDense(c.shape.head_size, 0, n);
      const std::vector<uint32_t> selection = RandomKept(random, c.guard, n, kept);
      auto ledger = std::make_shared<Ledger>();
      LayerCache cache = MakeCache(ledger, c.shape, c.expert, c.guard, c.scores);
      if (kept == 0) continue;  // an empty selection stands for all tokens
      ASSERT_TRUE(cache.Fill(std::span(&dense.view, 1), std::span(&selection, 1), {}));
      ExpectShort(cache, *ledger);
      ASSERT_LE(cache.bytes(), *LayerBytes(c.shape, c.expert, c.guard, n, c.scores ? 4 : 0)) << n;
      Append(cache, 3);
      ExpectShort(cache, *ledger);
      auto fork = cache.Fork();
      ASSERT_TRUE(fork);
      ASSERT_EQ(fork->bytes(), cache.bytes());
      if (HasFatalFailure()) return;
    }
  }
}

// What waits for a page that is too dear is evicted as what is in one: nothing stays but what may, and up to
// 15 tokens that are about to be packed.
TEST(ShortContext, WhatWaitsForAPageIsEvicted) {
  for (const ShortCase& c : ShortCases()) {
    SCOPED_TRACE(Named(c.shape, c.expert, c.guard, c.scores));
    for (int64_t n = 90; n < 400; n += 11) {
      auto ledger = std::make_shared<Ledger>();
      LayerCache cache = MakeCache(ledger, c.shape, c.expert, c.guard, c.scores);
      Append(cache, n / 3);
      Append(cache, n - n / 3);
      auto fork = cache.Fork();
      ASSERT_TRUE(fork);
      const std::vector<uint32_t> all = cache.positions(0);
      EvictExcess(cache);
      ASSERT_LE(cache.bytes() * 100, FullLayerBytes(c.shape, n) * 105) << n;
      const int64_t kept = KeptTokens(c.expert.keep, c.guard, n);
      ASSERT_GE(cache.tokens(0), kept) << n;
      ASSERT_LT(cache.tokens(0), kept + kPackTokens) << n;
      ASSERT_LE(cache.bytes(), *LayerBytes(c.shape, c.expert, c.guard, n, c.scores ? 4 : 0)) << n;
      std::vector<uint32_t> left = cache.positions(0);
      std::ranges::sort(left);
      for (int64_t i = 0; i < c.guard.sinks; ++i) ASSERT_EQ(left[static_cast<std::size_t>(i)], i);
      for (int64_t i = 1; i <= c.guard.window; ++i)
        ASSERT_EQ(left[left.size() - static_cast<std::size_t>(i)], n - i);
      ASSERT_EQ(fork->positions(0), all);
      // It goes on as it should.
      Append(cache, 40);
      ASSERT_EQ(cache.tokens(0), std::ssize(left) + 40);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(ShortContext, ASlidingLayerStartsSmall) {
  auto ledger = std::make_shared<Ledger>();
  auto cache = LayerCache::CreateSliding(ledger, {1, 64}, 128);
  ASSERT_TRUE(cache);
  for (int64_t n = 1; n <= 200; ++n) {
    Append(*cache, 1);
    ASSERT_EQ(cache->bytes(), ledger->live());
    ASSERT_LE(cache->bytes(), *WindowBytes({1, 64}, 128, n));
    if (n <= 128) ExpectShort(*cache, *ledger);
  }
}

// Whole sessions, as `run` and the server report them.
TEST(ShortContext, SessionsUnderAnyPlan) {
  const TempDir dir;
  const std::string path = dir / "model.gguf";
  ASSERT_TRUE(WriteTestModel({}, path));
  auto model = moend::Model::Load(path, {1, false});
  ASSERT_TRUE(model);
  auto engine = Engine::Create(*model, {1});
  ASSERT_TRUE(engine);
  const Plan full = FullPlan((*engine)->fingerprint(), 4096);
  std::vector<Plan> plans = {full};
  const Expert mixed[] = {{0.1, 4, 2}, {0.3, 3, 3}, {1.0, 16, 16}, {0.05, 16, 8}, {0.6, 8, 4}};
  plans.push_back(full);  // by layer
  for (std::size_t i = 0; i < full.layers.size(); ++i) plans.back().layers[i] = mixed[i % 2];
  plans.push_back(full);  // 1d: only tokens go
  for (Expert& e : plans.back().layers) e.keep = 1.0 / 14;
  plans.push_back(full);  // 1d: only bits go
  for (Expert& e : plans.back().layers) e = {1.0, 2, 2};
  plans.push_back(full);  // by KV head
  const auto heads = std::ssize(full.layers) * full.model.shape.n_kv_heads;
  for (int64_t i = 0; i < heads; ++i) plans.back().heads.push_back(mixed[i % 5]);
  for (std::size_t p = 0; p < plans.size(); ++p) {
    SCOPED_TRACE(p);
    for (const int64_t prompt : {1, 2, 17, 34, 50, 100}) {
      auto session = Session::Create(*engine, plans[p]);
      ASSERT_TRUE(session) << session.error().message;
      ASSERT_TRUE(session->Prefill(RandomTokens(prompt, 1)));
      for (int64_t n = prompt; n < 200; ++n) {
        const auto stats = session->stats();
        ASSERT_LE(stats.bytes * 100, stats.bytes_full * 105) << n << " tokens after a prompt of " << prompt;
        if (n == prompt + 20 && prompt > 2) break;
        ASSERT_TRUE(session->Decode(static_cast<int32_t>(n % 200)));
      }
    }
  }
}

}  // namespace
}  // namespace moend::test
