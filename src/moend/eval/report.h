// One HTML page that shows evaluations: curves of quality against bytes, scores by data set, the plan, and
// what each expert costs each layer. The page holds all that it needs and reaches for nothing on a network.
#pragma once

#include <optional>
#include <span>
#include <string>

#include "moend/base/error.h"
#include "moend/eval/results.h"
#include "moend/plan/plan.h"

namespace moend::eval {

struct ReportInput {
  std::span<const Results> results;  // at least one; all of one model
  std::optional<Profile> profile;    // for the heat map
  std::optional<Plan> plan;          // shown first; without it, the plans of the runs
  std::string plan_source;           // its file's name
};

// kUnsupported when the build had no plotting library, kMismatch when the inputs are of several models.
Expected<std::string> MakeReport(const ReportInput& input);

}  // namespace moend::eval
