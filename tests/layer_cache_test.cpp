#include "moend/cache/layer_cache.h"

#include <gtest/gtest.h>

#include <cstring>
#include <thread>
#include <vector>

#include "tests/support/layer_model.h"

namespace moend::test {
namespace {

TEST(LayerCache, EmptyHoldsNothing) {
  auto ledger = std::make_shared<Ledger>();
  LayerCache cache = MakeCache(ledger, {2, 64}, {0.5, 4, 4});
  EXPECT_EQ(ledger->live(), 0);
  EXPECT_EQ(cache.bytes(), 0);
  EXPECT_EQ(cache.tokens(0), 0);
  EXPECT_EQ(cache.Excess(1), 0);
  EXPECT_TRUE(cache.positions(1).empty());
  EXPECT_EQ(cache.view(0).n_pages, 0);
  EXPECT_EQ(cache.view(0).n_raw, 0);
  EXPECT_TRUE(cache.Append(nullptr, nullptr, 0));
  EXPECT_TRUE(cache.Evict(0, {}, 5));
  EXPECT_TRUE(cache.Fork());
  EXPECT_EQ(ledger->live(), 0);
}

TEST(LayerCache, RefusesNonsense) {
  EXPECT_FALSE(LayerCache::Create(nullptr, {0, 64}, {}, {}, false));
  EXPECT_FALSE(LayerCache::Create(nullptr, {1, 65}, {}, {}, false));
  EXPECT_FALSE(LayerCache::Create(nullptr, {1, 64}, {0.0, 4, 4}, {}, false));
  EXPECT_FALSE(LayerCache::Create(nullptr, {1, 64}, {1.0, 5, 4}, {}, false));
  EXPECT_FALSE(LayerCache::Create(nullptr, {1, 64}, {1.0, 4, 4}, {-1, 4}, false));
  LayerCache cache = MakeCache(nullptr, {2, 64}, {0.5, 4, 4});
  EXPECT_FALSE(cache.Append(nullptr, nullptr, -1));
  Append(cache, 32 + 128);
  std::vector<float> scores(3 * 64);
  EXPECT_FALSE(cache.Evict(0, scores, 1));
  EXPECT_FALSE(cache.Evict(2, std::span(scores).first(128), 1));
  EXPECT_FALSE(cache.Evict(-1, std::span(scores).first(128), 1));
  EXPECT_TRUE(cache.Evict(0, std::span(scores).first(128), -3));
  EXPECT_EQ(cache.tokens(0), 160);
  const Dense d = MakeDense(64, 0, 50);
  const std::vector<DenseView> views = {d.view, d.view};
  EXPECT_FALSE(cache.Fill(views, std::vector<std::vector<uint32_t>>(2), {}));  // not empty
}

// V, and K of 16 bits, are stored as they come; K that is quantized is rounded again when a page's ranges
// grow.
TEST(LayerCache, AppendOneByOneEqualsAppendAtOnce) {
  for (const auto& [guard, n] : std::vector<std::pair<Protected, int64_t>>{
           {{4, 28}, 300}, {{0, 0}, 200}, {{5, 0}, 150}, {{0, 7}, 150}, {{17, 30}, 333}, {{16, 16}, 97}}) {
    const Expert expert{1.0, n % 2 ? 4 : 16, 3};
    auto ledger = std::make_shared<Ledger>(), other = std::make_shared<Ledger>();
    LayerCache one = MakeCache(ledger, {2, 80}, expert, guard),
               all = MakeCache(other, {2, 80}, expert, guard);
    Append(all, n);
    for (int64_t i = 0; i < n; ++i) {
      Append(one, 1);
      ASSERT_EQ(one.bytes(), ledger->live());
      ASSERT_LE(one.bytes(), *LayerBytes({2, 80}, expert, guard, i + 1, 0));
      if (i % 13 == 0) Check(one, Everything(2, i + 1));
    }
    Check(one, Everything(2, n));
    Check(all, Everything(2, n));
    EXPECT_EQ(all.bytes(), other->live());
    EXPECT_EQ(one.bytes(), all.bytes());
    for (int64_t h = 0; h < 2; ++h) {
      const StreamView a = one.view(h), b = all.view(h);
      ASSERT_EQ(a.n_pages, b.n_pages);
      ASSERT_TRUE(std::equal(a.live, a.live + a.n_pages, b.live));
      for (int64_t i = 0; i < a.n_pages; ++i)
        for (const auto& [begin, end] :
             {std::pair(a.layout.v_scale, a.layout.k_codes),
              std::pair(expert.k_bits < 16 ? a.layout.v_codes : a.layout.k_codes, a.layout.refs)})
          ASSERT_EQ(std::memcmp(a.pages[i] + begin, b.pages[i] + begin, end - begin), 0);
    }
  }
}

TEST(LayerCache, FillEqualsAppendWhenEverythingStays) {
  for (int64_t n : {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 160, 333}) {
    auto ledger = std::make_shared<Ledger>();
    LayerCache filled = MakeCache(ledger, {2, 48}, {1.0, 8, 4}),
               appended = MakeCache(nullptr, {2, 48}, {1.0, 8, 4});
    const Dense d0 = MakeDense(48, 0, n), d1 = MakeDense(48, 1, n);
    const std::vector<DenseView> views = {d0.view, d1.view};
    const auto done = filled.Fill(views, std::vector<std::vector<uint32_t>>(2), {});
    ASSERT_TRUE(done) << done.error().message;
    Append(appended, n);
    Check(filled, Everything(2, n));
    EXPECT_EQ(filled.bytes(), ledger->live());
    EXPECT_LE(filled.bytes(), *LayerBytes({2, 48}, {1.0, 8, 4}, {}, n, 0));
    // Prefill packs what is not protected to the last token, but for few tokens, for which a page is too
    // much.
    EXPECT_EQ(filled.view(0).n_raw, n == 33 ? 33 : std::min<int64_t>(n, 32));
    if (n > 32 && n % kPackTokens != 0) continue;
    for (int64_t h = 0; h < 2; ++h) {
      const StreamView a = filled.view(h), b = appended.view(h);
      ASSERT_EQ(a.n_pages, b.n_pages);
      for (int64_t i = 0; i < a.n_pages; ++i)
        ASSERT_EQ(std::memcmp(a.pages[i], b.pages[i], a.layout.refs), 0);
    }
  }
}

TEST(LayerCache, FillKeepsWhatWasSelected) {
  Random random(1);
  for (int round = 0; round < 150; ++round) {
    const int64_t heads = Pick(random, 1, 3), hs = 16 * Pick(random, 1, 8), n = Pick(random, 1, 900);
    const Protected guard{Pick(random, 0, 20), Pick(random, 0, 50)};
    const Expert expert{static_cast<double>(Pick(random, 1, 100)) / 100, kBitWidths[random() % 5],
                        kBitWidths[random() % 5]};
    const int64_t count = KeptTokens(expert.keep, guard, n);
    auto ledger = std::make_shared<Ledger>();
    LayerCache cache = MakeCache(ledger, {heads, hs}, expert, guard, true);
    std::vector<Dense> dense;
    std::vector<DenseView> views;
    std::vector<std::vector<uint32_t>> kept;
    std::vector<std::vector<float>> scores;
    std::vector<const float*> score_pointers;
    Model model;
    for (int64_t h = 0; h < heads; ++h) {
      dense.push_back(MakeDense(hs, h, n));
      kept.push_back(RandomKept(random, guard, n, count));
      model.positions.emplace_back(kept[h].begin(), kept[h].end());
      scores.emplace_back(n);
      for (int64_t p = 0; p < n; ++p) scores[h][p] = static_cast<float>(p) + 0.5f;
    }
    for (int64_t h = 0; h < heads; ++h) {
      views.push_back(dense[h].view);
      score_pointers.push_back(scores[h].data());
    }
    const auto done = cache.Fill(views, kept, score_pointers);
    ASSERT_TRUE(done) << done.error().message;
    Check(cache, model);
    EXPECT_EQ(cache.tokens_seen(), n);
    EXPECT_EQ(cache.bytes(), ledger->live());
    EXPECT_LE(cache.bytes(), *LayerBytes({heads, hs}, expert, guard, n, 4));
    for (int64_t h = 0; h < heads; ++h) {
      EXPECT_EQ(cache.Excess(h), 0);
      // The last page may wait.
      EXPECT_GE(cache.view(h).n_pages, KeptPages(expert.keep, guard, n) - 1);
      EXPECT_LE(cache.view(h).n_pages, KeptPages(expert.keep, guard, n));
      const auto positions = cache.positions(h);
      for (int64_t i = 0; i < cache.tokens(h) - cache.view(h).n_raw; ++i)
        EXPECT_EQ(cache.scores(h)[i], static_cast<float>(positions[i]) + 0.5f);
    }
  }
}

TEST(LayerCache, FillRefusesBadSelections) {
  const Dense d = MakeDense(16, 0, 200);
  const auto fill = [&](const std::vector<uint32_t>& kept) {
    auto ledger = std::make_shared<Ledger>();
    LayerCache cache = MakeCache(ledger, {1, 16}, {0.5, 4, 4}, {4, 8});
    const auto done = cache.Fill(std::span(&d.view, 1), std::span(&kept, 1), {});
    if (done) return true;
    EXPECT_EQ(done.error().code, ErrorCode::kInvalidArgument);
    EXPECT_EQ(cache.tokens_seen(), 0);
    EXPECT_EQ(cache.bytes(), ledger->live());
    Append(cache, 100);  // still usable
    Check(cache, Everything(1, 100));
    return false;
  };
  std::vector<uint32_t> good = {0, 1, 2, 3, 50, 51, 90, 192, 193, 194, 195, 196, 197, 198, 199};
  EXPECT_TRUE(fill(good));
  for (const auto& [index, value] : std::vector<std::pair<int, uint32_t>>{
           {0, 1}, {3, 4}, {4, 3}, {5, 50}, {6, 40}, {7, 191}, {14, 200}, {14, 0xFFFFFFFF}}) {
    auto bad = good;
    bad[index] = value;
    EXPECT_FALSE(fill(bad)) << index;
  }
  EXPECT_FALSE(fill({0, 1, 2, 3, 199}));
}

TEST(LayerCache, HeadsCanBeFilledByThreads) {
  const KvShape shape{8, 32};
  auto ledger = std::make_shared<Ledger>();
  LayerCache cache = MakeCache(ledger, shape, {1.0, 4, 2});
  std::vector<Dense> dense;
  for (int64_t h = 0; h < 8; ++h) dense.push_back(MakeDense(32, h, 500));
  ASSERT_TRUE(cache.BeginFill(500, 500));
  std::vector<std::thread> threads;
  std::vector<char> ok(8);
  for (int64_t h = 0; h < 8; ++h)
    threads.emplace_back([&, h] { ok[h] = cache.FillHead(h, dense[h].view, {}, nullptr).has_value(); });
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(ok, std::vector<char>(8, 1));
  EXPECT_FALSE(cache.FillHead(0, dense[0].view, {}, nullptr));  // twice
  ASSERT_TRUE(cache.EndFill());
  Check(cache, Everything(8, 500));
  EXPECT_EQ(cache.bytes(), ledger->live());
}

TEST(LayerCache, UnfinishedFillLeavesItEmpty) {
  auto ledger = std::make_shared<Ledger>();
  LayerCache cache = MakeCache(ledger, {2, 32}, {1.0, 4, 2});
  const Dense d = MakeDense(32, 0, 500);
  ASSERT_TRUE(cache.BeginFill(500, 500));
  ASSERT_TRUE(cache.FillHead(0, d.view, {}, nullptr));
  EXPECT_FALSE(cache.Append(nullptr, nullptr, 0));
  EXPECT_FALSE(cache.EndFill());
  EXPECT_EQ(ledger->live(), 0);
  Append(cache, 100);
  Check(cache, Everything(2, 100));
}

TEST(LayerCache, EvictTakesTheLowestAndCompacts) {
  Random random(2);
  for (int round = 0; round < 100; ++round) {
    const int64_t hs = 16 * Pick(random, 1, 6), n = Pick(random, 100, 1200);
    const Expert expert{0.5, kBitWidths[random() % 5], kBitWidths[random() % 5]};
    auto ledger = std::make_shared<Ledger>();
    LayerCache cache = MakeCache(ledger, {2, hs}, expert, {4, 28}, true);
    Append(cache, n);
    Model model = Everything(2, n);
    for (int64_t h = 0; h < 2; ++h) {
      const int64_t slots = cache.view(h).n_pages * 64, paged = cache.tokens(h) - cache.view(h).n_raw;
      // Scores that say which position they belong to.
      const auto before = cache.positions(h);
      for (int64_t i = 0; i < paged; ++i) cache.scores(h)[i] = static_cast<float>(before[i]);
      const auto scores = RandomScores(random, slots);
      const int64_t count = Pick(random, 0, slots + 10);
      EvictModel(model, cache, h, scores, count);
      const auto done = cache.Evict(h, scores, count);
      ASSERT_TRUE(done) << done.error().message;
      const StreamView view = cache.view(h);
      EXPECT_EQ(view.n_pages, (paged - std::min(count, paged) + 63) / 64);
      const auto after = cache.positions(h);
      std::size_t next = 0;
      for (int64_t i = 0; i < view.n_pages * 64; ++i)
        if (view.live[i / 64] >> (i % 64) & 1) {
          EXPECT_EQ(cache.scores(h)[i], static_cast<float>(after[next++]));
        }
    }
    model.packings = 5;
    Check(cache, model);
    EXPECT_EQ(cache.bytes(), ledger->live());
  }
}

TEST(LayerCache, UntouchedPagesKeepTheirCodes) {
  LayerCache cache = MakeCache(nullptr, {1, 64}, {0.5, 4, 4});
  Append(cache, 32 + 64 * 10);
  const StreamView before = cache.view(0);
  std::vector<const uint8_t*> pages(before.pages, before.pages + 10);
  std::vector<std::vector<uint8_t>> codes;
  for (const uint8_t* page : pages) codes.emplace_back(page, page + before.layout.bytes);
  // Pages 3 and 4 lose 40 tokens each, page 7 loses 10: the first two become one, the others stay.
  std::vector<float> scores(640, 1.0f);
  for (int64_t i = 0; i < 40; ++i) scores[3 * 64 + i] = scores[4 * 64 + 20 + i] = 0.0f;
  for (int64_t i = 0; i < 10; ++i) scores[7 * 64 + 6 * i] = 0.0f;
  ASSERT_TRUE(cache.Evict(0, scores, 90));
  const StreamView after = cache.view(0);
  ASSERT_EQ(after.n_pages, 9);
  for (int64_t i = 0; i < 9; ++i) {
    if (i == 3) continue;
    const int64_t old = i < 3 ? i : i + 1;
    EXPECT_EQ(after.pages[i], pages[old]);
    EXPECT_EQ(std::memcmp(after.pages[i], codes[old].data(), codes[old].size()), 0);
    EXPECT_EQ(std::popcount(after.live[i]), old == 7 ? 54 : 64);
  }
  EXPECT_EQ(std::popcount(after.live[3]), 48);
}

TEST(LayerCache, EverythingPagedCanBeEvicted) {
  auto ledger = std::make_shared<Ledger>();
  LayerCache cache = MakeCache(ledger, {1, 96}, {0.01, 3, 2}, {4, 12});
  Append(cache, 1000);
  std::vector<float> scores(cache.view(0).n_pages * 64, std::nanf(""));
  ASSERT_TRUE(cache.Evict(0, scores, INT64_MAX));
  EXPECT_EQ(cache.view(0).n_pages, 0);
  EXPECT_EQ(cache.tokens(0), cache.view(0).n_raw);
  EXPECT_EQ(cache.bytes(), ledger->live());
  Append(cache, 300);
  Model model;
  model.positions.resize(1);
  for (uint32_t p = 0; p < 4; ++p) model.positions[0].insert(p);
  for (uint32_t p = 976 + 4; p < 1300; ++p) model.positions[0].insert(p);
  EXPECT_EQ(cache.tokens(0), static_cast<int64_t>(model.positions[0].size()));
  Check(cache, model);
}

TEST(LayerCache, EvictionNeedsNoMemoryBeyondWhatItFrees) {
  Random random(5);
  auto ledger = std::make_shared<Ledger>();
  LayerCache cache = MakeCache(ledger, {1, 64}, {0.5, 4, 4});
  Append(cache, 2000);
  ledger->ResetPeak();
  const int64_t before = ledger->live();
  ASSERT_TRUE(cache.Evict(0, RandomScores(random, cache.view(0).n_pages * 64), 900));
  EXPECT_LT(ledger->live(), before);
  // But for the bitmap: until a position goes there is none.
  EXPECT_LE(ledger->peak(), before + BitmapBytes(2000));
}

TEST(LayerCache, ForkSharesPagesUntilOneSideChanges) {
  Random random(6);
  auto ledger = std::make_shared<Ledger>();
  LayerCache cache = MakeCache(ledger, {2, 64}, {0.5, 4, 4}, {}, true);
  Append(cache, 700);
  const int64_t one = ledger->live(), pages = 2 * cache.view(0).n_pages, page = cache.view(0).layout.bytes;
  {
    auto fork = cache.Fork();
    ASSERT_TRUE(fork);
    EXPECT_EQ(fork->bytes(), cache.bytes());
    EXPECT_EQ(ledger->live(), one + cache.bytes() - pages * page);
    EXPECT_EQ(fork->view(0).pages[0], cache.view(0).pages[0]);
    // The fork goes its own way; the original does not notice.
    Model model = Everything(2, 700), forked = model;
    for (int64_t h = 0; h < 2; ++h) {
      const auto scores = RandomScores(random, fork->view(h).n_pages * 64);
      EvictModel(forked, *fork, h, scores, 200);
      ASSERT_TRUE(fork->Evict(h, scores, 200));
    }
    forked.packings = 5;
    Append(*fork, 100);
    for (auto& set : forked.positions)
      for (uint32_t p = 700; p < 800; ++p) set.insert(p);
    Check(*fork, forked);
    Check(cache, model);
    // And the other way round.
    auto second = fork->Fork();
    ASSERT_TRUE(second);
    for (int64_t h = 0; h < 2; ++h)
      ASSERT_TRUE(fork->Evict(h, RandomScores(random, fork->view(h).n_pages * 64), 300));
    Check(*second, forked);
    cache = std::move(*second);
    Check(cache, forked);
  }
  EXPECT_EQ(cache.bytes(), ledger->live());
  cache = MakeCache(ledger, {1, 16}, {});
  EXPECT_EQ(ledger->live(), 0);
  EXPECT_EQ(ledger->allocations(), 0);
}

TEST(LayerCache, ForksCanBeUsedByThreads) {
  auto ledger = std::make_shared<Ledger>();
  {
    LayerCache cache = MakeCache(ledger, {1, 32}, {0.5, 4, 2});
    Append(cache, 900);
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
      auto fork = cache.Fork();
      ASSERT_TRUE(fork);
      threads.emplace_back([fork = std::move(*fork), i]() mutable {
        Random random(static_cast<uint64_t>(i));
        for (int step = 0; step < 5; ++step) {
          Append(fork, 64);
          ASSERT_TRUE(fork.Evict(0, RandomScores(random, fork.view(0).n_pages * 64), 100));
        }
      });
    }
    for (auto& thread : threads) thread.join();
    Check(cache, Everything(1, 900));
    EXPECT_EQ(cache.bytes(), ledger->live());
  }
  EXPECT_EQ(ledger->live(), 0);
}

TEST(LayerCache, RepackChangesBitsAndNothingElse) {
  Random random(7);
  for (int k_bits : kBitWidths) {
    for (int v_bits : kBitWidths) {
      auto ledger = std::make_shared<Ledger>();
      LayerCache cache = MakeCache(ledger, {2, 80}, {0.5, 8, 4}, {4, 28}, true);
      Append(cache, 500);
      Model model = Everything(2, 500);
      const auto scores = RandomScores(random, cache.view(0).n_pages * 64);
      EvictModel(model, cache, 0, scores, 100);
      ASSERT_TRUE(cache.Evict(0, scores, 100));
      cache.scores(0)[3] = 7.0f;
      auto packed = cache.Repack({0.25, k_bits, v_bits});
      ASSERT_TRUE(packed);
      EXPECT_EQ(packed->expert(), (Expert{0.25, k_bits, v_bits}));
      EXPECT_EQ(packed->scores(0)[3], 7.0f);
      EXPECT_EQ(packed->tokens_seen(), 500);
      const StreamView a = cache.view(0), b = packed->view(0);
      ASSERT_EQ(a.n_pages, b.n_pages);
      EXPECT_TRUE(std::equal(a.live, a.live + a.n_pages, b.live));
      std::vector<float> ka(64 * 80), va(64 * 80), kb(64 * 80), vb(64 * 80);
      for (int64_t i = 0; i < a.n_pages; ++i) {
        UnpackPage(a.layout, a.pages[i], ka.data(), va.data());
        UnpackPage(b.layout, b.pages[i], kb.data(), vb.data());
        for (int64_t j = 0; j < 64 * 80; ++j) {
          if (!(a.live[i] >> (j / 80) & 1)) continue;
          ASSERT_NEAR(ka[j], kb[j], k_bits == 8 ? 0.0 : RoundTripBound(k_bits, -8.3, 8.3));
          ASSERT_NEAR(va[j], vb[j], v_bits == 4 ? 0.0 : RoundTripBound(v_bits, -8.8, 8.8));
        }
      }
      for (int64_t h = 0; h < 2; ++h) EXPECT_EQ(packed->positions(h), cache.positions(h));
      cache = std::move(*packed);
      EXPECT_EQ(cache.bytes(), ledger->live());
    }
  }
}

}  // namespace
}  // namespace moend::test
