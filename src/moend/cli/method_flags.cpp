#include "moend/cli/method_flags.h"

#include <fmt/format.h>

#include "moend/cli/common.h"
#include "moend/score/scorer.h"

namespace moend::cli {

void MethodFlags::AddTo(CLI::App& app) {
  app.add_option("--plan", plans, "these plans")->type_name("PLAN.json...");
  auto* from_profile = app.add_option("--profile", profile, "solve for the variants from this profile");
  from_profile->type_name("PROFILE.json");
  app.add_option("--compression", compressions, "times smaller than 16 bit, as 4,14,40")
      ->delimiter(',')
      ->check(CLI::Range(1.0, 1e6))
      ->needs(from_profile)
      ->type_name("R,...");
  app.add_option("--budget-mib", budgets_mib, "sizes of the cache, instead of --compression or beside it")
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->needs(from_profile)
      ->type_name("MIB,...");
  app.add_option("--variant", variants, "ways of compressing")
      ->delimiter(',')
      ->check(CLI::IsMember(eval::MethodNames()))
      ->type_name("NAME,...");
  app.add_option("--scorer", scorers, "how tokens are chosen; default: the profile's or plan's")
      ->delimiter(',')
      ->check(CLI::IsMember(ScorerNames()))
      ->type_name("NAME,...");
  app.add_option("--solver", solver, "how plans are found")
      ->capture_default_str()
      ->check(CLI::IsMember(kSolvers))
      ->type_name("NAME");
  app.add_option("--metric", metric, "what plans minimize")
      ->capture_default_str()
      ->check(CLI::IsMember(kMetrics))
      ->type_name("NAME");
  AddMinKeep(app, min_keep)->needs(from_profile);
}

Expected<std::vector<eval::Method>> MethodFlags::Make(
    const Engine& engine, int64_t context_length, const std::vector<std::string>& variants_of_profile) const {
  std::vector<eval::Method> methods;
  const Fingerprint running = engine.fingerprint();
  for (const std::string& path : plans) {
    MOEND_ASSIGN(const Plan plan, LoadPlan(path));
    MOEND_TRY(CheckSameModel(plan.model, running, path));
    const std::vector<std::string> own = {plan.scorer};
    for (const std::string& scorer : scorers.empty() ? own : scorers)
      methods.push_back(eval::MethodOf(plan, scorer));
  }
  eval::MethodRequest request;
  request.variants = variants;
  if (request.variants.empty() && plans.empty())
    request.variants = profile.empty() ? std::vector<std::string>{"full"} : variants_of_profile;
  request.scorers = scorers;
  request.context_length = context_length;
  request.min_keep = min_keep;
  MOEND_ASSIGN(request.solver, ParseSolver(solver));
  MOEND_ASSIGN(request.metric, ParseMetric(metric));
  std::optional<Profile> measured;
  if (!profile.empty()) {
    MOEND_ASSIGN(measured, LoadProfile(profile));
  }
  const auto make = [&](std::vector<std::string>& skipped) -> Expected<std::vector<eval::Method>> {
    request.compressions = compressions;
    for (const double mib : budgets_mib) {
      MOEND_ASSIGN(const int64_t bytes, BudgetBytes(mib));
      request.compressions.push_back(static_cast<double>(FullBytes(running, request.context_length)) /
                                     static_cast<double>(bytes));
    }
    return eval::MakeMethods(running, measured ? &*measured : nullptr, request, skipped);
  };
  std::vector<std::string> skipped;
  MOEND_ASSIGN(auto made, make(skipped));
  if (made.empty() && methods.empty() && measured && budgets_mib.empty() &&
      context_length < measured->length) {
    // The unquantized tokens alone exceed such a share of a short context.
    Note(fmt::format("{} tokens are too few to be so much smaller; the plans are for {}", context_length,
                     measured->length));
    request.context_length = measured->length;
    skipped.clear();
    MOEND_ASSIGN(made, make(skipped));
  }
  for (const std::string& text : skipped) Note(text);
  methods.insert(methods.end(), std::make_move_iterator(made.begin()), std::make_move_iterator(made.end()));
  if (methods.empty()) return Fail(ErrorCode::kBudget, "no method is left that these budgets allow");
  return methods;
}

}  // namespace moend::cli
