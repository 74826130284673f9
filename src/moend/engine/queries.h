// From the statistics of a Plan or Profile to what scorers of this model are handed.
#pragma once

#include <memory>

#include "moend/model/model.h"
#include "moend/plan/learned_scores.h"
#include "moend/score/query_model.h"

namespace moend {

// kInvalidArgument, saying what to do, when `stats` is null; kMismatch when it is of a model of another
// shape.
Expected<std::shared_ptr<const QueryModel>> MakeQueryModel(const Model& model,
                                                           std::shared_ptr<const QueryStats> stats);

// What the scorer `learned` goes by. kInvalidArgument, saying what to do, when it is null; kMismatch when it
// is of a model of another shape.
Expected<void> CheckLearned(const Model& model, const LearnedScores* learned);

}  // namespace moend
