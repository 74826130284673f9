#include "moend/cache/compaction.h"

#include <gtest/gtest.h>

#include <bit>
#include <map>
#include <numeric>

#include "tests/support/layer_model.h"

namespace moend::test {
namespace {

using Plan = std::vector<std::pair<int64_t, int64_t>>;  // tokens, source

Plan PlanOf(const std::vector<int>& live_counts) {
  Plan plan;
  for (const PlannedPage& page : PlanCompaction(live_counts)) plan.emplace_back(page.tokens, page.source);
  return plan;
}

TEST(PlanCompaction, LeavesPagesAloneBelowAPageOfDeadSlots) {
  EXPECT_EQ(PlanOf({}), Plan());
  EXPECT_EQ(PlanOf({1}), (Plan{{1, 0}}));
  EXPECT_EQ(PlanOf({64, 64}), (Plan{{64, 0}, {64, 1}}));
  EXPECT_EQ(PlanOf({40, 40, 49}), (Plan{{40, 0}, {40, 1}, {49, 2}}));
}

TEST(PlanCompaction, DropsDeadPagesWithoutPacking) {
  EXPECT_EQ(PlanOf({0}), Plan());
  EXPECT_EQ(PlanOf({64, 0, 50, 0}), (Plan{{64, 0}, {50, 2}}));
}

TEST(PlanCompaction, PacksTheShortestRun) {
  EXPECT_EQ(PlanOf({32, 32}), (Plan{{64, -1}}));
  EXPECT_EQ(PlanOf({44, 44, 30, 30, 64}), (Plan{{44, 0}, {44, 1}, {60, -1}, {64, 4}}));
  // 20 + 24 + 20 dead: only the whole row has a page's worth.
  EXPECT_EQ(PlanOf({44, 40, 44}), (Plan{{64, -1}, {64, -1}}));
}

TEST(PlanCompaction, NeverPacksTwiceAndKeepsOrder) {
  Random random(1);
  for (int round = 0; round < 3000; ++round) {
    std::vector<int> counts(static_cast<std::size_t>(Pick(random, 0, 40)));
    const int64_t low = Pick(random, 0, 64);
    for (int& count : counts) count = static_cast<int>(Pick(random, low, 64));
    const int64_t tokens = std::accumulate(counts.begin(), counts.end(), int64_t{0});
    const auto plan = PlanCompaction(counts);
    EXPECT_EQ(std::ssize(plan), (tokens + 63) / 64);
    int64_t planned = 0, last = -1;
    for (const PlannedPage& page : plan) {
      EXPECT_GE(page.tokens, 1);
      EXPECT_LE(page.tokens, 64);
      planned += page.tokens;
      if (page.source < 0) continue;
      EXPECT_GT(page.source, last);
      last = page.source;
      EXPECT_EQ(page.tokens, counts[static_cast<std::size_t>(page.source)]);
      // Tokens before an untouched page are as many as before.
      EXPECT_EQ(planned - page.tokens,
                std::accumulate(counts.begin(), counts.begin() + page.source, int64_t{0}));
    }
    EXPECT_EQ(planned, tokens);
  }
}

// V of every token, by position.
std::map<uint32_t, std::vector<float>> ValuesByPosition(const LayerCache& cache) {
  std::map<uint32_t, std::vector<float>> values;
  const StreamView view = cache.view(0);
  const int64_t hs = view.layout.head_size;
  const auto positions = cache.positions(0);
  std::vector<float> v(static_cast<std::size_t>(64 * hs));
  std::size_t next = 0;
  for (int64_t page = 0; page < view.n_pages; ++page) {
    UnpackPage(view.layout, view.pages[page], nullptr, v.data());
    for (uint64_t left = view.live[page]; left; left &= left - 1) {
      const float* from = v.data() + std::countr_zero(left) * hs;
      values[positions[next++]].assign(from, from + hs);
    }
  }
  return values;
}

TEST(Compact, NeverChangesV) {
  Random random(2);
  for (int bits : kBitWidths) {
    for (int64_t hs : {16, 64, 80, 128}) {
      LayerCache cache = MakeCache(nullptr, {1, hs}, {0.5, 2, bits});
      Append(cache, 1000);
      const auto before = ValuesByPosition(cache);
      for (int step = 0; step < 6; ++step) {
        ASSERT_TRUE(cache.Evict(0, RandomScores(random, cache.view(0).n_pages * 64), 130));
        for (const auto& [position, values] : ValuesByPosition(cache)) ASSERT_EQ(values, before.at(position));
      }
    }
  }
}

TEST(Compact, PagesOfOthersStayAsTheyAre) {
  Random random(3);
  auto ledger = std::make_shared<Ledger>();
  LayerCache cache = MakeCache(ledger, {1, 32}, {0.5, 4, 4}, {}, true);
  Append(cache, 1500);
  for (int round = 0; round < 20; ++round) {
    auto fork = cache.Fork();
    ASSERT_TRUE(fork);
    // Part of the pages is shared, part is not.
    ASSERT_TRUE(fork->Evict(0, RandomScores(random, fork->view(0).n_pages * 64), Pick(random, 0, 700)));
    auto second = fork->Fork();
    ASSERT_TRUE(second);
    Model model;
    const auto positions = second->positions(0);
    model.positions.emplace_back(positions.begin(), positions.end());
    model.packings = 5;
    for (int i = 0; i < 3; ++i)
      ASSERT_TRUE(fork->Evict(0, RandomScores(random, fork->view(0).n_pages * 64), Pick(random, 0, 300)));
    Check(*second, model);
    Check(cache, Everything(1, 1500));
    ASSERT_LE(ledger->live(), cache.bytes() + fork->bytes() + second->bytes());
  }
  EXPECT_EQ(ledger->live(), cache.bytes());
}

}  // namespace
}  // namespace moend::test
