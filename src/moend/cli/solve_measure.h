// The parts of moend solve that run the model: --validate and --refine.
#pragma once

#include <string>
#include <vector>

#include "moend/cli/common.h"
#include "moend/solve/solve.h"

namespace moend::cli {

struct MeasureFlags {
  ModelFlags model;
  std::vector<std::string> files;
  int64_t chunks = 3, evaluated = 256;
  int64_t validate = 0;  // plans; 0: do not
  bool refine = false;
  double seconds = 300;

  void AddTo(CLI::App& app);
  bool wanted() const { return refine || validate > 0; }
  void Check() const;  // throws CLI11's error when a flag is missing
};

// Prints the rank correlation; writes the pairs to `output` unless it is empty.
Expected<void> RunValidate(const MeasureFlags& flags, const Profile& profile, const SolveRequest& request,
                           const std::string& output);

// The plan, improved; prints what it was and is.
Expected<Plan> RunRefine(const MeasureFlags& flags, const Profile& profile, const SolveRequest& request,
                         const Plan& plan);

}  // namespace moend::cli
