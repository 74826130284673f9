// A method against the full cache on the same questions: differences instead of two means, whose interval is
// as wide as what the questions differ, not as what the contexts do.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "moend/eval/results.h"

namespace moend::eval {

// A mean over values that come in clusters (the questions of a context), with its 95% interval.
struct ClusterMean {
  double mean = 0, low = 0, high = 0;
  int64_t n = 0, clusters = 0;
  bool has_interval() const { return clusters > 1; }  // else low = high = mean
};

struct Cluster {
  double sum = 0;
  int64_t n = 0;
};

// The bootstrap over clusters: 2,000 resamples of whole clusters, the mean over all their values in each,
// 2.5% and 97.5% points. Spread by sqrt(k / (k - 1)) around the mean, since resampling k clusters
// underestimates the spread by that much. The same every time.
ClusterMean Bootstrap(std::span<const Cluster> clusters);

struct Paired {
  ClusterMean difference;        // score less the full cache's, -1 to 1; negative: worse
  ClusterMean kld;               // nats a token of the right answers, against the full cache
  double kld_99 = 0;             // 99% point over the tokens
  double same_top = 0;           // share of those tokens
  double nll = 0, nll_full = 0;  // nats a token of the right answers
  // Tokens that an answer goes on before it first differs from the full cache's, and how many those have.
  double agreed = 0, answer_tokens = 0;
  int64_t n_agreed = 0;  // answers compared
};

// Over the questions that both have answered, of one data set or, if empty, of all. `full` may be null: then
// only the divergences are there, which the run holds itself.
Paired ComparePaired(const Run& run, const Run* full, const std::string& dataset = "");

// The run of the full cache, or null.
const Run* FullRun(const Results& results);

}  // namespace moend::eval
