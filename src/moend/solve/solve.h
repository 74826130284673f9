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
  kHull,    // greedy on each layer's lower convex hull, optimal for the relaxed problem; then what is left of
            // the budget goes to the single upgrades that save most
  kExact,   // dynamic programming over Pareto optimal (bytes, loss) states, pruned with the dual bound; bytes
            // are never rounded. Optimal up to a relative rounding of 1e-12 whenever lower_bound equals the
            // loss. On tables that defeat every bound (all layers all-or-nothing, say) it keeps the most
            // promising states only, and lower_bound says what may have been missed
};
enum class Metric { kKl, kL2 };

// The variants of the paper, all at the same allocated bytes where they can meet the budget. A uniform keep
// ratio is not a fixed number of tokens, as in the paper, but the best one for the budget: for 1d and
// 2d_uniform the largest that fits (in steps of 1e-6), for 2d the one of the profile's with the least loss.
enum class Variant {
  kFull,       // nothing compressed; needs no budget
  k1d,         // the same eviction in every layer, 16 bit
  k2dUniform,  // the same eviction in every layer, K 8 bit, V 4 bit
  k2d,         // the same eviction in every layer, bits routed by layer
  k2dHetero,   // eviction and bits routed by layer: the method
  k2dHeads,    // eviction and bits routed by KV head, which the paper leaves open; needs Profile::head_cells
};

// What routes most finely with what the profile measured: 2d_heads, or 2d_hetero without KV heads.
Variant FinestVariant(const Profile& profile);

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
  // No layer or KV head keeps a smaller share of its tokens. Layers that look at what is near by lose hardly
  // anything a token when they forget nearly all else, but each of many generated tokens loses it, in many
  // layers.
  double min_keep = 0;
  // Plan::refit for plans that route eviction and whose scorer is kReconstructScorer.
  bool refit = true;
  // 0: the floor min_keep must hold. Above 0 it is a wish: it is lowered, along the profile's keep ratios,
  // until the predicted loss is at most (1 + floor_price) times that without a floor. Variants that do not
  // route eviction then have none.
  double floor_price = 0;
};
// Asks for full layers that are `compression` times smaller than at 16 bit; sliding layers, as they always
// are, come on top. Where all layers are full that is request.compression. request.context_length is set
// before.
void CompressFullLayers(const Fingerprint& model, double compression, SolveRequest& request);

// What `moend` takes where no floor is asked for. Predictions so near to each other hardly tell plans
// apart, and of two such plans the one that forgets less is the safer; docs/results.md has the answers with
// and without.
inline constexpr double kDefaultMinKeep = 0.05, kDefaultFloorPrice = 0.2;

struct Solution {
  Plan plan;
  double loss = 0;         // sum of the layers' predicted losses; NaN if the profile lacks the variant's bits
  double lower_bound = 0;  // no plan of these experts within the budget has a smaller loss (dual bound); with
                           // a floor_price: nor has any plan below the floor
  double expected_kl = 0;  // ExpectedKl() of the loss, for Metric::kKl; NaN where nothing is known of it
  double min_keep = 0;     // the floor that holds
  double milliseconds = 0;
};

// Bytes are those at request.context_length; the losses are the profile's, whatever length it was measured
// at. Losses are cleaned before (see losses.h): negative ones count as 0, and an expert that keeps more and
// stores more bits never counts as worse. kBudget names the smallest possible budget and the compression that
// it equals.
Expected<Solution> Solve(const Profile& profile, const SolveRequest& request);

// The bare knapsack, for tests and other objectives: items[layer][choice] = {bytes, loss}. Returns a choice a
// layer. Losses are finite, bytes >= 0. A choice that another one of its layer matches or beats in both is
// never taken. `lower_bound`, if not null, gets the relaxed (for kExact: the proven) lower bound of the loss.
struct Choice {
  int64_t bytes = 0;
  double loss = 0;
};
Expected<std::vector<int>> SolveKnapsack(const std::vector<std::vector<Choice>>& items, int64_t budget,
                                         Solver solver, double* lower_bound);

}  // namespace moend
