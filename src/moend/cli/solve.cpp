// moend solve: picks an expert for every layer under a budget, into a plan.
#include <fmt/format.h>

#include <limits>

#include "moend/base/file.h"
#include "moend/cli/commands.h"
#include "moend/cli/common.h"
#include "moend/solve/solve.h"

namespace moend::cli {
namespace {

constexpr const char* kFooter = R"(
Examples:
  moend solve profile.json --compression 14 -o plan.json
  moend solve profile.json --budget-mib 64 -c 32768 --solver greedy -o plan.json
  moend solve profile.json --compression 14 --variant 1d

Variants at the same bytes: 1d evicts the same share of tokens in every layer at 16 bit; 2d_uniform does so
with K 8 bit, V 4 bit; 2d routes the bits of each layer; 2d_hetero routes bits and evicted share of each layer,
2d_heads those of each KV head (for profiles made with --heads).)";

struct SolveFlags {
  std::string profile, output;
  double compression = 0, budget_mib = 0;
  int64_t context_length = 0;
  std::string solver = "exact", metric = "kl", variant = "2d_hetero";
};

Expected<void> Run(const SolveFlags& flags) {
  if (!flags.output.empty()) MOEND_TRY(CheckWritable(flags.output));
  MOEND_ASSIGN(const Profile profile, LoadProfile(flags.profile));
  if (profile.chunks < profile.chunks_wanted)
    Note(fmt::format("{} is unfinished: {} of {} chunks", flags.profile, profile.chunks,
                     profile.chunks_wanted));
  SolveRequest request;
  MOEND_ASSIGN(request.solver, ParseSolver(flags.solver));
  MOEND_ASSIGN(request.metric, ParseMetric(flags.metric));
  MOEND_ASSIGN(request.variant, ParseVariant(flags.variant));
  MOEND_ASSIGN(request.score_bytes, ScoreBytes(profile.scorer));
  request.context_length = flags.context_length > 0 ? flags.context_length : profile.length;
  request.compression = flags.compression;
  if (flags.budget_mib > 0) {
    MOEND_ASSIGN(request.budget_bytes, BudgetBytes(flags.budget_mib));
  }
  MOEND_ASSIGN(const Solution solution, Solve(profile, request));
  fmt::print("{}", DescribePlan(solution.plan, OutputStyle()));
  fmt::print("predicted loss {:.6g}, no plan can be below {:.6g} (gap {:.3g}); solved by {} in {:.1f} ms\n",
             solution.loss, solution.lower_bound, solution.loss - solution.lower_bound, flags.solver,
             solution.milliseconds);
  if (flags.output.empty()) return {};
  MOEND_TRY(WriteFileAtomically(flags.output, ToJson(solution.plan)));
  Note(fmt::format("wrote {}", flags.output));
  return {};
}

}  // namespace

void AddSolve(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("solve", "Turn a profile and a budget into a plan");
  auto flags = std::make_shared<SolveFlags>();
  SolveFlags& f = *flags;
  command->add_option("profile", f.profile, "from 'moend calibrate'")->required()->type_name("PROFILE.json");
  auto* ratio = command->add_option("--compression", f.compression, "times smaller than 16 bit")
                    ->check(CLI::Range(1.0, 1e6))
                    ->type_name("R");
  auto* budget = command->add_option("--budget-mib", f.budget_mib, "K/V bytes at most, in MiB")
                     ->check(CLI::PositiveNumber)
                     ->excludes(ratio)
                     ->type_name("N");
  command
      ->add_option("-c,--ctx-size", f.context_length,
                   "tokens that the budget is for; 0: as many as the profile's chunks have")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{0}, int64_t{std::numeric_limits<int32_t>::max()}))
      ->type_name("LENGTH");
  const auto choice = [&](const std::string& flag, std::string& value, const char* text,
                          std::vector<std::string> names) {
    command->add_option(flag, value, text)
        ->capture_default_str()
        ->check(CLI::IsMember(std::move(names)))
        ->type_name("NAME");
  };
  choice("--solver", f.solver, "how the plan is found", kSolvers);
  choice("--metric", f.metric, "what it minimizes: KL of the logits or L2 of the attention output", kMetrics);
  choice("--variant", f.variant, "what is routed layer by layer", kVariants);
  command->add_option("-o,--output", f.output, "the plan; without it, it is only shown")
      ->type_name("PLAN.json");
  command->footer(kFooter);
  command->callback([flags, ratio, budget, &exit_code] {
    if (ratio->count() + budget->count() == 0) throw CLI::RequiredError("--compression R or --budget-mib N");
    exit_code = ExitCode(Run(*flags));
  });
}

}  // namespace moend::cli
