#include "moend/solve/solve.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "moend/solve/relaxation.h"

namespace moend {
namespace {

using Table = std::vector<std::vector<Choice>>;

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  double Unit() { return std::uniform_real_distribution<double>(0, 1)(engine_); }
  int64_t Below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(engine_); }

 private:
  std::mt19937_64 engine_;
};

int64_t Bytes(const Table& table, const std::vector<int>& chosen) {
  int64_t bytes = 0;
  for (std::size_t l = 0; l < table.size(); ++l) bytes += table[l][static_cast<std::size_t>(chosen[l])].bytes;
  return bytes;
}

double Loss(const Table& table, const std::vector<int>& chosen) {
  double loss = 0;
  for (std::size_t l = 0; l < table.size(); ++l) loss += table[l][static_cast<std::size_t>(chosen[l])].loss;
  return loss;
}

int64_t Least(const Table& table) {
  int64_t bytes = 0;
  for (const auto& layer : table) {
    bytes += std::min_element(layer.begin(), layer.end(), [](const Choice& a, const Choice& b) {
               return a.bytes < b.bytes;
             })->bytes;
  }
  return bytes;
}

// The optimum by trying everything.
double BruteForce(const Table& table, int64_t budget) {
  double best = std::numeric_limits<double>::infinity();
  const std::function<void(std::size_t, int64_t, double)> go = [&](std::size_t l, int64_t left, double loss) {
    if (left < 0) return;
    if (l == table.size()) {
      best = std::min(best, loss);
      return;
    }
    for (const Choice& c : table[l]) go(l + 1, left - c.bytes, loss + c.loss);
  };
  go(0, budget, 0);
  return best;
}

// The textbook algorithm over every possible number of bytes in units of `unit`. Byte counts are rounded down
// to units, so that it solves a problem that allows at least as much: a bound from below. Exact for unit = 1.
double TextbookBound(const Table& table, int64_t budget, int64_t unit) {
  const auto cells = static_cast<std::size_t>(budget / unit) + 1;
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  std::vector<double> best(cells, 0.0), next(cells);
  for (const auto& layer : table) {
    std::fill(next.begin(), next.end(), kInfinity);
    for (const Choice& c : layer) {
      const auto units = static_cast<std::size_t>(c.bytes / unit);
      for (std::size_t b = units; b < cells; ++b) next[b] = std::min(next[b], best[b - units] + c.loss);
    }
    best.swap(next);
  }
  return best.back();
}

Table RandomTable(Random& random, int layers, int choices, int64_t max_bytes) {
  Table table(static_cast<std::size_t>(layers));
  for (auto& layer : table) {
    for (int c = 0; c < choices; ++c) layer.push_back({random.Below(max_bytes), random.Unit()});
  }
  return table;
}

// Losses as layers have them: falling with the tokens kept and the bits, each layer with its own
// sensitivities, and some noise.
Table RealisticTable(Random& random, int layers, const std::vector<Expert>& experts, int64_t tokens) {
  Table table(static_cast<std::size_t>(layers));
  for (auto& layer : table) {
    const double evict = std::exp(3 * random.Unit() - 5), power = 1 + 3 * random.Unit();
    const double k = std::exp(4 * random.Unit() - 4), v = std::exp(2 * random.Unit() - 5);
    for (const Expert& e : experts) {
      const double loss = evict * std::pow(1 - e.keep, power) + k * std::exp2(-2.0 * e.k_bits) +
                          v * std::exp2(-2.0 * e.v_bits);
      layer.push_back({*LayerBytes({8, 128}, e, {}, tokens, 0), loss * (0.95 + 0.1 * random.Unit())});
    }
  }
  return table;
}

std::vector<Expert> ManyExperts() {
  std::vector<Expert> experts;
  for (const double keep : {0.02, 0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 0.9, 1.0})
    for (const int k : {2, 3, 4, 8, 16})
      for (const int v : {2, 4, 8}) experts.push_back({keep, k, v});
  return experts;
}

void ExpectFeasible(const Table& table, const std::vector<int>& chosen, int64_t budget) {
  ASSERT_EQ(chosen.size(), table.size());
  for (std::size_t l = 0; l < table.size(); ++l) {
    ASSERT_GE(chosen[l], 0);
    ASSERT_LT(chosen[l], static_cast<int>(table[l].size()));
  }
  EXPECT_LE(Bytes(table, chosen), budget);
}

TEST(KnapsackTest, ExactEqualsBruteForce) {
  Random random(1);
  int better_than_greedy = 0;
  for (int round = 0; round < 400; ++round) {
    // Few distinct byte counts and losses make ties; many make none.
    const int64_t max_bytes = round % 3 == 0 ? 6 : 1000;
    Table table = RandomTable(random, 1 + round % 5, 1 + round % 7, max_bytes);
    if (round % 4 == 0) {
      for (auto& layer : table)
        for (Choice& c : layer) c.loss = static_cast<double>(random.Below(5)) - 1;
    }
    const int64_t least = Least(table);
    const int64_t budget = least + random.Below(1 + max_bytes * static_cast<int64_t>(table.size()) / 4);
    const double best = BruteForce(table, budget);
    double bound = 0;
    const auto exact = SolveKnapsack(table, budget, Solver::kExact, &bound);
    ASSERT_TRUE(exact);
    ExpectFeasible(table, *exact, budget);
    EXPECT_NEAR(Loss(table, *exact), best, 1e-9) << "round " << round;
    EXPECT_NEAR(bound, best, 1e-9);
    for (const Solver solver : {Solver::kGreedy, Solver::kHull}) {
      const auto chosen = SolveKnapsack(table, budget, solver, &bound);
      ASSERT_TRUE(chosen);
      ExpectFeasible(table, *chosen, budget);
      EXPECT_GE(Loss(table, *chosen), best - 1e-9);
      EXPECT_LE(bound, best + 1e-9);
      better_than_greedy += Loss(table, *chosen) > best + 1e-9;
    }
  }
  EXPECT_GT(better_than_greedy, 20) << "the cases are too easy to tell the solvers apart";
}

TEST(KnapsackTest, ExactEqualsTextbookOnManyLayers) {
  Random random(2);
  for (int round = 0; round < 20; ++round) {
    const Table table = RandomTable(random, 30, 12, 200);
    const int64_t budget = Least(table) + random.Below(2000);
    double bound = 0;
    const auto exact = SolveKnapsack(table, budget, Solver::kExact, &bound);
    ASSERT_TRUE(exact);
    ExpectFeasible(table, *exact, budget);
    EXPECT_NEAR(Loss(table, *exact), TextbookBound(table, budget, 1), 1e-9);
  }
}

TEST(KnapsackTest, ProvesTheOptimumOfEightyLayers) {
  Random random(3);
  const std::vector<Expert> experts = ManyExperts();
  ASSERT_EQ(experts.size(), 150u);
  for (int round = 0; round < 6; ++round) {
    const Table table = round % 2 ? RandomTable(random, 80, 150, 1'000'000)
                                  : RealisticTable(random, 80, experts, round == 0 ? 2048 : 16384);
    int64_t most = 0;
    for (const auto& layer : table) {
      int64_t largest = 0;
      for (const Choice& c : layer) largest = std::max(largest, c.bytes);
      most += largest;
    }
    const int64_t least = Least(table);
    for (const double share : {0.01, 0.07, 0.3, 0.8}) {
      const auto budget = least + static_cast<int64_t>(share * static_cast<double>(most - least));
      double relaxed = 0, bound = 0;
      const auto greedy = SolveKnapsack(table, budget, Solver::kGreedy, nullptr);
      const auto hull = SolveKnapsack(table, budget, Solver::kHull, &relaxed);
      const auto exact = SolveKnapsack(table, budget, Solver::kExact, &bound);
      ASSERT_TRUE(greedy && hull && exact);
      for (const auto& chosen : {*greedy, *hull, *exact}) ExpectFeasible(table, chosen, budget);
      const double loss = Loss(table, *exact);
      EXPECT_LE(loss, Loss(table, *greedy) + 1e-9);
      EXPECT_LE(loss, Loss(table, *hull) + 1e-9);
      EXPECT_GE(loss, relaxed - 1e-9);
      EXPECT_NEAR(bound, loss, 1e-9) << "not proven optimal";
    }
    // An independent bound: bytes rounded down to a grid.
    const int64_t budget = least + (most - least) / 14;
    double bound = 0;
    const auto exact = SolveKnapsack(table, budget, Solver::kExact, &bound);
    ASSERT_TRUE(exact);
    EXPECT_GE(Loss(table, *exact), TextbookBound(table, budget, budget / 2000) - 1e-9);
  }
}

TEST(KnapsackTest, HopelessTablesStayValid) {
  // All-or-nothing layers: every bound is useless. Losses along a line: every bound is met by everything.
  Random random(4);
  for (const bool concave : {true, false}) {
    Table table(60);
    for (auto& layer : table) {
      for (int c = 0; c < 100; ++c) {
        const int64_t bytes = random.Below(1'000'000);
        const double left = static_cast<double>(1'000'000 - bytes);
        layer.push_back({bytes, concave ? std::sqrt(left) : left});
      }
    }
    const int64_t least = Least(table);
    for (const int64_t more : {int64_t{100'000}, int64_t{10'000'000}, int64_t{40'000'000}}) {
      double relaxed = 0, bound = 0;
      const auto hull = SolveKnapsack(table, least + more, Solver::kHull, &relaxed);
      const auto greedy = SolveKnapsack(table, least + more, Solver::kGreedy, nullptr);
      const auto exact = SolveKnapsack(table, least + more, Solver::kExact, &bound);
      ASSERT_TRUE(hull && greedy && exact);
      EXPECT_LE(Loss(table, *exact), Loss(table, *greedy) + 1e-6);
      ExpectFeasible(table, *exact, least + more);
      EXPECT_LE(Loss(table, *exact), Loss(table, *hull) + 1e-6);
      EXPECT_LE(bound, Loss(table, *exact));
      EXPECT_GE(bound, relaxed * (1 - 1e-9));
    }
  }
}

TEST(KnapsackTest, GreedyIsThePapers) {
  // From (0, 10): +2 bytes saves 3 (1.5 a byte), +10 bytes saves 10 (1.0 a byte). The other layer: +5
  // saves 6.
  const Table table = {{{0, 10}, {2, 7}, {10, 0}}, {{0, 8}, {5, 2}}};
  EXPECT_EQ(*SolveKnapsack(table, 2, Solver::kGreedy, nullptr), (std::vector<int>{1, 0}));
  EXPECT_EQ(*SolveKnapsack(table, 9, Solver::kGreedy, nullptr), (std::vector<int>{1, 1}));
  // At 10 bytes the greedy choice is a trap: 7 + 2 against 0 + 8.
  double bound = 0;
  EXPECT_EQ(*SolveKnapsack(table, 10, Solver::kExact, &bound), (std::vector<int>{2, 0}));
  EXPECT_EQ(bound, 8);
  EXPECT_EQ(*SolveKnapsack(table, 10, Solver::kGreedy, nullptr), (std::vector<int>{1, 1}));
  EXPECT_EQ(*SolveKnapsack(table, 15, Solver::kGreedy, nullptr), (std::vector<int>{2, 1}));
}

TEST(KnapsackTest, DominatedChoicesAreNotTaken) {
  const Table table = {{{5, 1}, {4, 1}, {4, 2}, {9, 1.5}, {3, 3}}};
  for (const Solver solver : {Solver::kGreedy, Solver::kHull, Solver::kExact}) {
    EXPECT_EQ(*SolveKnapsack(table, 100, solver, nullptr), std::vector<int>{1});
    EXPECT_EQ(*SolveKnapsack(table, 3, solver, nullptr), std::vector<int>{4});
  }
}

TEST(KnapsackTest, BadInputIsRefused) {
  const auto code = [](const Table& table, int64_t budget) {
    return SolveKnapsack(table, budget, Solver::kExact, nullptr).error().code;
  };
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  EXPECT_EQ(code({{{5, 1}}, {}}, 10), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code({{{5, kNan}}}, 10), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code({{{5, kInfinity}}}, 10), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code({{{-1, 0}}}, 10), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code({{{INT64_MAX, 0}}, {{INT64_MAX, 0}}}, INT64_MAX), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code(Table(9, {{int64_t{1} << 60, 0}}), INT64_MAX), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code({{{5, 1}}, {{7, 1}}}, 11), ErrorCode::kBudget);
  EXPECT_EQ(code({{{5, 1}}}, INT64_MIN), ErrorCode::kBudget);
  double bound = 1;
  EXPECT_TRUE(SolveKnapsack({}, 0, Solver::kExact, &bound)->empty());
  EXPECT_EQ(bound, 0);
}

TEST(HullTest, CornersOnly) {
  const Items hull = LowerHull(Undominated({{0, 10}, {1, 9.5}, {2, 4}, {3, 3}, {4, 2}, {6, 1.9}, {5, 2}}));
  std::vector<int> corners;
  for (const Item& item : hull) corners.push_back(item.choice);
  EXPECT_EQ(corners, (std::vector<int>{0, 2, 4, 5}));
}

}  // namespace
}  // namespace moend
