#include "moend/calibrate/query_tap.h"

#include <cmath>

#include "moend/model/rope.h"

namespace moend {

QueryTap::QueryTap(const Model& model, AttentionHook& inner) : model_(model), inner_(inner) {
  const HyperParams& hp = model.hparams();
  sums_.n_heads = hp.n_heads;
  sums_.n_pairs = hp.head_size / 2;
  sums_.pairs.resize(static_cast<std::size_t>(hp.n_layers * hp.n_heads * sums_.n_pairs));
}

void QueryTap::Store(int64_t layer, const float* q, const float* k, const float* v, int64_t n) {
  const int64_t n_heads = sums_.n_heads, n_pairs = sums_.n_pairs, d = 2 * n_pairs;
  const std::vector<RopePair> turns = RopePairs(model_, layer);
  for (int64_t i = 0; i < n; ++i, ++position_) {
    for (int64_t f = 0; f < n_pairs; ++f) {
      const RopePair& turn = turns[static_cast<std::size_t>(f)];
      const double angle = turn.rate * static_cast<double>(position_);
      const double cosine = std::cos(angle), sine = std::sin(angle);
      for (int64_t h = 0; h < n_heads; ++h) {
        const float* head = q + (i * n_heads + h) * d;
        const double x = head[turn.first], y = head[turn.second];
        QueryPair& sum = sums_.pairs[static_cast<std::size_t>((layer * n_heads + h) * n_pairs + f)];
        sum.re += x * cosine + y * sine;
        sum.im += y * cosine - x * sine;
        sum.length += std::sqrt(x * x + y * y);
      }
    }
  }
  tokens_ += n;
  inner_.Store(layer, q, k, v, n);
}

void QueryTap::Attend(int64_t layer, const float* q, int64_t n, int thread, int n_threads) {
  inner_.Attend(layer, q, n, thread, n_threads);
}

void QueryTap::Combine(int64_t layer, float* out, int64_t n, int thread, int n_threads) {
  inner_.Combine(layer, out, n, thread, n_threads);
}

void QueryTap::LoadStates(int64_t layer, float* states, int64_t contexts) {
  inner_.LoadStates(layer, states, contexts);
}

void QueryTap::StoreStates(int64_t layer, const float* states, int64_t contexts) {
  inner_.StoreStates(layer, states, contexts);
}

std::shared_ptr<const QueryStats> QueryTap::Take() const {
  auto stats = std::make_shared<QueryStats>(sums_);
  stats->tokens = tokens_ / model_.hparams().n_layers;
  for (QueryPair& pair : stats->pairs) {
    const auto n = static_cast<double>(std::max<int64_t>(stats->tokens, 1));
    pair = {pair.re / n, pair.im / n, pair.length / n};
  }
  return stats;
}

}  // namespace moend
