// Picks an expert for every layer under a byte budget. The objective is separable (a sum of per-layer
// losses), so this is a multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger: Knapsack Problems,
// 2004, ch. 11).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "moend/base/error.h"
#include "moend/plan/plan.h"

namespace moend {

enum class Solver {
  kGreedy,  // the paper's: cheapest everywhere, then the upgrade with the best loss saved per byte, one at a
            // time
  kHull,    // greedy on each layer's lower convex hull; optimal for the relaxed problem
  kExact,   // dynamic programming over the byte budget, with the hull's dual bound for pruning
};
enum class Metric { kKl, kL2 };

// The variants of the paper, all at the same allocated bytes where they can meet the budget.
enum class Variant {
  kFull,       // nothing compressed
  k1d,         // the same eviction in every layer, 16 bit
  k2dUniform,  // the same eviction in every layer, K 8 bit, V 4 bit
  k2d,         // the same eviction in every layer, bits routed by layer
  k2dHetero,   // eviction and bits routed by layer: the method
};

Expected<Solver> ParseSolver(const std::string& name);
Expected<Metric> ParseMetric(const std::string& name);
Expected<Variant> ParseVariant(const std::string& name);
const char* Name(Solver solver);
const char* Name(Metric metric);
const char* Name(Variant variant);

struct SolveRequest {
  Solver solver = Solver::kExact;
  Metric metric = Metric::kKl;
  Variant variant = Variant::k2dHetero;
  int64_t context_length = 0;
  // One of the two; the other is 0.
  double compression = 0;  // FullBytes(context_length) / compression becomes the budget
  int64_t budget_bytes = 0;
  int64_t score_bytes = 0;  // the scorer's state a slot (LayerBytes)
};

struct Solution {
  Plan plan;
  double loss = 0;         // sum of the layers' predicted losses
  double lower_bound = 0;  // no plan of these experts within the budget has a smaller loss (dual bound)
  double milliseconds = 0;
};

// kBudget names the smallest possible budget and the compression that it equals.
Expected<Solution> Solve(const Profile& profile, const SolveRequest& request);

// The bare knapsack, for tests and other objectives: items[layer][choice] = {bytes, loss}. Returns a choice a
// layer.
struct Choice {
  int64_t bytes = 0;
  double loss = 0;
};
Expected<std::vector<int>> SolveKnapsack(const std::vector<std::vector<Choice>>& items, int64_t budget,
                                         Solver solver, double* lower_bound);

}  // namespace moend
