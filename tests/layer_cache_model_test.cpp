#include <gtest/gtest.h>

#include "moend/cache/layer_cache.h"
#include "moend/cache/serialize.h"
#include "tests/support/layer_model.h"

namespace moend::test {
namespace {

// Prefill, then a long generation with an eviction every kEvictInterval tokens: the budget holds at each.
TEST(LayerCache, BudgetHoldsThroughALongGeneration) {
  Random random(3);
  for (int round = 0; round < 40; ++round) {
    const KvShape shape{Pick(random, 1, 2), 16 * Pick(random, 1, 4)};
    const Protected guard{Pick(random, 0, 20), Pick(random, 0, 70)};
    const Expert expert{static_cast<double>(Pick(random, 1, 20)) / 20, kBitWidths[random() % 5],
                        kBitWidths[random() % 5]};
    auto ledger = std::make_shared<Ledger>();
    LayerCache cache = MakeCache(ledger, shape, expert, guard, true);
    const int64_t page = cache.view(0).layout.bytes;
    if (random() % 4) {
      const int64_t n = Pick(random, 1, 700);
      std::vector<Dense> dense;
      std::vector<DenseView> views;
      std::vector<std::vector<uint32_t>> kept;
      for (int64_t h = 0; h < shape.n_kv_heads; ++h) {
        dense.push_back(MakeDense(shape.head_size, h, n));
        kept.push_back(RandomKept(random, guard, n, KeptTokens(expert.keep, guard, n)));
      }
      for (auto& d : dense) views.push_back(d.view);
      ASSERT_TRUE(cache.Fill(views, kept, {}));
    }
    for (int step = 0; step < 6; ++step) {
      for (int64_t left = kEvictInterval; left > 0;) {
        const int64_t m = Pick(random, 1, std::min<int64_t>(left, 50));
        Append(cache, m);
        left -= m;
        const int64_t pages = shape.n_kv_heads * (page + 4 * TableEntryBytes(4));
        ASSERT_LE(cache.bytes(), *LayerBytes(shape, expert, guard, cache.tokens_seen(), 4) + 3 * pages);
      }
      for (int64_t h = 0; h < shape.n_kv_heads; ++h) {
        const int64_t excess = cache.Excess(h);
        const int64_t paged = cache.tokens(h) - cache.view(h).n_raw;
        ASSERT_GE(excess, 0);
        ASSERT_LE(excess, paged);
        ASSERT_TRUE(cache.Evict(h, RandomScores(random, cache.view(h).n_pages * 64), excess));
        ASSERT_LE(cache.tokens(h),
                  std::max(KeptTokens(expert.keep, guard, cache.tokens_seen()), cache.view(h).n_raw));
        ASSERT_EQ(cache.view(h).n_pages, (paged - excess + 63) / 64);
        ASSERT_LE(cache.view(h).n_pages, KeptPages(expert.keep, guard, cache.tokens_seen()));
        ASSERT_EQ(cache.Excess(h), 0);
      }
      ASSERT_EQ(cache.bytes(), ledger->live());
      ASSERT_LE(cache.bytes(), *LayerBytes(shape, expert, guard, cache.tokens_seen(), 4));
      if (expert.keep == 1.0) {
        ASSERT_EQ(cache.tokens(0), cache.tokens_seen());
      }
    }
  }
}

// Where eviction leaves no remainder LayerBytes is not just a bound.
TEST(LayerCache, LayerBytesIsExactInTheFullState) {
  Random random(4);
  for (int round = 0; round < 60; ++round) {
    const bool wide = round % 10 == 0;
    const int64_t heads = Pick(random, 1, 3);
    const KvShape shape{heads, 16 * Pick(random, 1, wide ? 2 : 6)};
    const Protected guard{Pick(random, 0, 30), Pick(random, 0, 70)};
    const auto bits = [&] { return kBitWidths[wide ? random() % 5 : 1 + random() % 4]; };
    const Expert expert{static_cast<double>(Pick(random, 1, 10)) / 10, bits(), bits()};
    const bool keep_scores = random() % 2;
    auto ledger = std::make_shared<Ledger>();
    LayerCache cache = MakeCache(ledger, shape, expert, guard, keep_scores);
    // At a multiple of pages the raw part is at its least but its memory is all there. Pages of many bits are
    // opened as for few only in long contexts.
    const int64_t n = guard.sinks + guard.window + 64 * (Pick(random, 1, 12) + (wide ? 70 : 4));
    Append(cache, n - 15);
    Append(cache, 15);
    for (int64_t h = 0; h < shape.n_kv_heads; ++h)
      ASSERT_TRUE(cache.Evict(h, RandomScores(random, cache.view(h).n_pages * 64), cache.Excess(h)));
    // Where nothing had to go there is no bitmap yet.
    const int64_t bitmaps =
        expert.keep < 1.0 && KeptTokens(expert.keep, guard, n) == n ? heads * BitmapBytes(n) : 0;
    ASSERT_EQ(cache.bytes(), *LayerBytes(shape, expert, guard, n, keep_scores ? 4 : 0) - bitmaps);
    ASSERT_EQ(cache.bytes(), ledger->live());
    ASSERT_EQ(ledger->allocations() > 0, true);
  }
}

// Any sequence of operations against a model that knows only which positions must be there.
TEST(LayerCache, RandomOperationsAgreeWithTheModel) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE(seed);
    Random random(seed);
    const int64_t sizes[] = {16, 64, 80, 96, 128, 256};
    const KvShape shape{Pick(random, 1, 3), sizes[random() % (seed % 8 ? 4 : 6)]};
    const Protected guard{Pick(random, 0, 20), Pick(random, 0, 40)};
    const bool keep_scores = random() % 2;
    auto ledger = std::make_shared<Ledger>();
    Expert expert{static_cast<double>(Pick(random, 1, 100)) / 100, kBitWidths[seed % 5],
                  kBitWidths[seed / 5 % 5]};
    LayerCache cache = MakeCache(ledger, shape, expert, guard, keep_scores);
    Model model = Everything(shape.n_kv_heads, 0);
    for (int step = 0; step < 25; ++step) {
      switch (random() % 6) {
        case 0:
        case 1: {
          const int64_t first = cache.tokens_seen(),
                        n = random() % 3 ? Pick(random, 0, 150) : Pick(random, 0, 5);
          Append(cache, n);
          for (auto& set : model.positions)
            for (int64_t p = first; p < first + n; ++p) set.insert(static_cast<uint32_t>(p));
          ++model.packings;
          break;
        }
        case 2: {
          const int64_t h = Pick(random, 0, shape.n_kv_heads - 1);
          const auto scores = RandomScores(random, cache.view(h).n_pages * 64);
          const int64_t count = random() % 2 ? cache.Excess(h) : Pick(random, 0, 150);
          EvictModel(model, cache, h, scores, count);
          ASSERT_TRUE(cache.Evict(h, scores, count));
          ++model.packings;
          break;
        }
        case 3: {
          auto fork = cache.Fork();
          ASSERT_TRUE(fork);
          if (random() % 2) std::swap(cache, *fork);
          Append(*fork, 70);
          ASSERT_TRUE(fork->Evict(0, RandomScores(random, fork->view(0).n_pages * 64), 90));
          break;
        }
        case 4: {
          const auto blob = SerializeCache(cache);
          ASSERT_TRUE(blob);
          auto loaded = DeserializeCache(ledger, *blob, "test");
          ASSERT_TRUE(loaded) << loaded.error().message;
          cache = std::move(*loaded);
          break;
        }
        default: {
          auto packed = cache.Repack({0.5, expert.k_bits, expert.v_bits});
          ASSERT_TRUE(packed);
          cache = std::move(*packed);
        }
      }
      ASSERT_EQ(cache.bytes(), ledger->live());
      Check(cache, model);
      if (HasFatalFailure()) return;
    }
  }
}

}  // namespace
}  // namespace moend::test
