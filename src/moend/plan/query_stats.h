// Statistics of a model's queries before RoPE turned them, which calibration gathers and the trigonometric
// scorer expects of queries to come (TriAttention, arXiv 2604.04921).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "moend/base/error.h"
#include "moend/plan/expert.h"

namespace moend {

// RoPE takes channels two by two for complex numbers, first + i * second, and multiplies each by
// exp(i * rate * position).
struct RopePair {
  int64_t first = 0, second = 0;
  double rate = 0;  // radians a position; 0 for channels that are not turned
};

// One pair of channels of one query head.
struct QueryPair {
  double re = 0, im = 0;  // mean of the complex numbers, turned back to position 0
  double length = 0;      // mean of their absolute values; |mean| / length is their concentration
};

// Constant scales of RoPE (YaRN's) are left in.
struct QueryStats {
  int64_t tokens = 0;            // that the means are over
  int64_t n_heads = 0;           // query heads of a layer
  int64_t n_pairs = 0;           // head_size / 2
  std::vector<QueryPair> pairs;  // [layer][query head][pair], pairs in the order of RopePairs()

  const QueryPair* head(int64_t layer, int64_t h) const {
    return pairs.data() + (layer * n_heads + h) * n_pairs;
  }
};

// The mean over the tokens of both; either may be null. They are of one model.
std::shared_ptr<const QueryStats> MergeQueryStats(std::shared_ptr<const QueryStats> a,
                                                  std::shared_ptr<const QueryStats> b);

// As a file holds them, with four digits: what goes on from a saved file and what was never interrupted are
// then the same.
std::shared_ptr<const QueryStats> RoundQueryStats(const std::shared_ptr<const QueryStats>& stats);

// kMismatch unless the statistics are of `n_layers` layers with such K/V heads.
Expected<void> CheckQueryStats(const QueryStats& stats, int64_t n_layers, const KvShape& shape);

}  // namespace moend
