#include "moend/score/query_model.h"

namespace moend {

Expected<QueryModel> QueryModel::Create(std::shared_ptr<const QueryStats> stats,
                                        std::vector<std::vector<RopePair>> turns, const KvShape& shape) {
  const auto n_layers = static_cast<int64_t>(turns.size());
  MOEND_TRY(CheckQueryStats(*stats, n_layers, shape));
  QueryModel model;
  model.stats_ = std::move(stats);
  model.turns_ = std::move(turns);
  model.n_kv_heads_ = shape.n_kv_heads;
  const int64_t group = model.stats_->n_heads / shape.n_kv_heads;
  for (int64_t l = 0; l < n_layers; ++l) {
    const std::vector<RopePair>& layer = model.turns_[static_cast<std::size_t>(l)];
    if (std::ssize(layer) != model.stats_->n_pairs)
      return Fail(ErrorCode::kMismatch, "RoPE turns {} pairs of channels where the statistics have {}",
                  layer.size(), model.stats_->n_pairs);
    for (int64_t h = 0; h < shape.n_kv_heads; ++h)
      model.heads_.push_back({layer, model.stats_->head(l, h * group), group});
  }
  return model;
}

}  // namespace moend
