// What the trigonometric scorer expects of the queries to come: statistics of the model's queries before RoPE
// and how RoPE turns them.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "moend/base/error.h"
#include "moend/plan/query_stats.h"

namespace moend {

// The query heads that share one KV head. Borrows from its QueryModel.
struct HeadQueries {
  std::span<const RopePair> turns;   // [pair]
  const QueryPair* pairs = nullptr;  // [group][pair]
  int64_t group = 0;
};

class QueryModel {
 public:
  // turns: [layer][pair]. kMismatch when the statistics are not of such a model.
  static Expected<QueryModel> Create(std::shared_ptr<const QueryStats> stats,
                                     std::vector<std::vector<RopePair>> turns, const KvShape& shape);

  // One entry a KV head.
  std::span<const HeadQueries> layer(int64_t l) const {
    return std::span(heads_).subspan(static_cast<std::size_t>(l * n_kv_heads_),
                                     static_cast<std::size_t>(n_kv_heads_));
  }

 private:
  std::shared_ptr<const QueryStats> stats_;
  std::vector<std::vector<RopePair>> turns_;
  std::vector<HeadQueries> heads_;  // [layer][KV head]; point into the above, whose elements never move
  int64_t n_kv_heads_ = 0;
};

}  // namespace moend
