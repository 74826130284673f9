#include "moend/engine/queries.h"

#include "moend/model/rope.h"

namespace moend {

Expected<std::shared_ptr<const QueryModel>> MakeQueryModel(const Model& model,
                                                           std::shared_ptr<const QueryStats> stats) {
  if (!stats)
    return Fail(
        ErrorCode::kInvalidArgument,
        "the scorer trig needs statistics of the model's queries, and the plan has none: make a "
        "profile with moend calibrate (--restart if the profile is an older one), and the plan from it "
        "with moend solve --scorer trig");
  const HyperParams& hp = model.hparams();
  if (stats->n_heads != hp.n_heads)
    return Fail(ErrorCode::kMismatch, "statistics of {} query heads a layer; the model has {}",
                stats->n_heads, hp.n_heads);
  std::vector<std::vector<RopePair>> turns;
  for (int64_t l = 0; l < hp.n_layers; ++l) turns.push_back(RopePairs(model, l));
  MOEND_ASSIGN(QueryModel made,
               QueryModel::Create(std::move(stats), std::move(turns), {hp.n_kv_heads, hp.head_size}));
  return std::make_shared<const QueryModel>(std::move(made));
}

Expected<void> CheckLearned(const Model& model, const LearnedScores* learned) {
  if (!learned)
    return Fail(ErrorCode::kInvalidArgument,
                "the scorer learned goes by what calibration learned of the model, and there is nothing of "
                "that here: make a profile with moend calibrate (--restart if the profile is an older one), "
                "and the plan from it with moend solve --scorer learned");
  const HyperParams& hp = model.hparams();
  return CheckLearnedScores(*learned, hp.n_layers, hp.n_kv_heads, hp.n_embd);
}

}  // namespace moend
