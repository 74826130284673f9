// The ways of compressing that a command compares, as flags: plans from files, and variants solved from a
// profile.
#pragma once

#include <CLI/CLI.hpp>
#include <optional>
#include <string>
#include <vector>

#include "moend/base/error.h"
#include "moend/engine/engine.h"
#include "moend/eval/methods.h"

namespace moend::cli {

struct MethodFlags {
  std::vector<std::string> plans, variants, scorers;
  std::string profile, solver = "exact", metric = "kl";
  std::vector<double> compressions, budgets_mib;
  std::optional<double> min_keep;

  void AddTo(CLI::App& app);
  // `variants_of_profile`: those of a profile when none are named. Without plans and profile the full cache
  // is all there is. Plans made for another model: kMismatch.
  Expected<std::vector<eval::Method>> Make(const Engine& engine, int64_t context_length,
                                           const std::vector<std::string>& variants_of_profile) const;
};

}  // namespace moend::cli
