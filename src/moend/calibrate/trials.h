// Whole plans measured on text that was read once: does the sum of a profile's losses predict them
// (Validate), and can the chosen one be improved (Refine)?
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "moend/calibrate/calibrate.h"
#include "moend/solve/losses.h"
#include "moend/solve/solve.h"

namespace moend {

class Trials {
 public:
  // Reads the chunks (MakeChunks) with nothing compressed; scorer, guard and statistics are the profile's;
  // kUnsupported for the scorer `learned`. The last `evaluated` tokens of each are predicted under every
  // plan.
  static Expected<Trials> Create(std::shared_ptr<Engine> engine, std::span<const std::vector<int32_t>> chunks,
                                 const Profile& profile, int64_t evaluated, const Progress& progress);
  Trials(Trials&&) noexcept;
  ~Trials();

  // KL(full || compressed) in nats of every evaluated token of all chunks. experts: one a layer, or one a KV
  // head ([layer * n_kv_heads + head]).
  Expected<std::vector<double>> Kl(std::span<const Expert> experts);

 private:
  struct Impl;
  explicit Trials(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

struct ValidateOptions {
  int64_t plans = 50;
  double least = 4, most = 40;  // compressions, five of them in equal ratios
  Metric metric = Metric::kKl;
  Rows rows = Rows::kLayers;
  int64_t context_length = 0;  // at which the plans' bytes count
  int64_t score_bytes = 0;
  uint64_t seed = 1;
};

struct ValidatedPlan {
  double compression = 0, predicted = 0, measured = 0;  // measured: mean KL
  std::vector<Expert> experts;                          // one a layer or KV head
};

struct Correlation {
  double value = 0, low = 0, high = 0;  // with a 95% bootstrap interval
};

struct Validation {
  std::vector<ValidatedPlan> plans;
  Correlation spearman;
  double within = 0;  // mean of the correlations among the plans of one compression
};

// Spearman's rank correlation, ties sharing their mean rank; 0 when either side does not vary.
double Spearman(std::span<const double> x, std::span<const double> y);
Correlation SpearmanInterval(std::span<const double> x, std::span<const double> y, uint64_t seed);

// Random plans: any expert in any row, then upgrades and downgrades of random rows until the bytes are just
// below the budget. The profile's losses have no say in it.
Expected<Validation> Validate(Trials& trials, const Profile& profile, const ValidateOptions& options,
                              const Progress& progress);

struct RefineOptions {
  double seconds = 300;  // no further measurement begins after so long
  Rows rows = Rows::kLayers;
  int64_t score_bytes = 0;
  double min_keep = 0;  // SolveRequest::min_keep
};

struct Refinement {
  Plan plan;                     // the improved one, or the given one
  double before = 0, after = 0;  // mean KL
  int64_t measured = 0, accepted = 0;
  bool finished = false;  // nothing near the plan is better; false: the time was up
};

// Local search around a plan of the profile's experts. Each round measures what a row's neighbouring experts
// (two cheaper and two dearer ones) change while all others stay, solves the knapsack over these differences,
// and takes the result, or else the best exchange between two rows, if its measured KL is lower by more than
// its standard error. The budget is the plan's budget_bytes. Deterministic unless time runs out.
Expected<Refinement> Refine(Trials& trials, const Profile& profile, const Plan& plan,
                            const RefineOptions& options, const Progress& progress);

}  // namespace moend
