// moend solve: picks an expert for every layer under a budget, into a plan.
#include <fmt/format.h>

#include <cmath>
#include <limits>
#include <optional>

#include "moend/base/file.h"
#include "moend/cli/commands.h"
#include "moend/cli/common.h"
#include "moend/cli/solve_measure.h"
#include "moend/score/scorer.h"
#include "moend/solve/solve.h"

namespace moend::cli {
namespace {

constexpr const char* kSolveFooter = R"(
Examples:
  moend solve profile.json --compression 14 -o plan.json
  moend solve profile.json --budget-mib 64 -c 32768 --solver greedy -o plan.json
  moend solve profile.json --compression 14 --variant 1d
  moend solve profile.json --compression 14 --refine -m model.gguf -f text.txt -o plan.json
  moend solve profile.json --validate 50 -m model.gguf -f text.txt -o pairs.json

Variants at the same bytes: 1d evicts the same share of tokens in every layer at 16 bit; 2d_uniform does so
with K 8 bit, V 4 bit; 2d routes the bits of each layer; 2d_hetero routes bits and evicted share of each layer,
2d_heads those of each KV head (for profiles made with --heads).)";

struct SolveFlags {
  std::string profile, output;
  double compression = 0, budget_mib = 0;
  std::optional<double> min_keep;
  bool no_refit = false;
  int64_t context_length = 0;
  std::string solver = "exact", metric = "kl", variant, scorer;
  MeasureFlags measure;
};

Expected<void> Run(const SolveFlags& flags) {
  if (!flags.output.empty()) MOEND_TRY(CheckWritable(flags.output));
  MOEND_ASSIGN(Profile profile, LoadProfile(flags.profile));
  if (profile.chunks < profile.chunks_wanted)
    Note(fmt::format("{} is unfinished: {} of {} chunks", flags.profile, profile.chunks,
                     profile.chunks_wanted));
  SolveRequest request;
  MOEND_ASSIGN(request.solver, ParseSolver(flags.solver));
  MOEND_ASSIGN(request.metric, ParseMetric(flags.metric));
  MOEND_ASSIGN(request.variant, VariantOf(flags.variant, profile));
  request.refit = !flags.no_refit;
  if (!flags.scorer.empty()) profile.scorer = flags.scorer;
  MOEND_ASSIGN(const auto scorer, MakeScorer(profile.scorer));
  // In a file only where somebody will read them.
  if (!scorer->needs().query_stats) profile.queries = nullptr;
  const bool could_read_once = scorer->needs().repetition && profile.learned;
  if (!scorer->needs().learned) profile.learned = nullptr;
  if (scorer->needs().learned && !profile.learned)
    return Fail(ErrorCode::kInvalidArgument,
                "{} has learned nothing that the scorer learned could go by; moend calibrate --restart does, "
                "with a model that can repeat a text",
                flags.profile);
  if (scorer->needs().query_stats && !profile.queries)
    return Fail(ErrorCode::kInvalidArgument,
                "{} has no statistics of the model's queries, which the scorer {} needs; moend calibrate "
                "--restart measures them",
                flags.profile, profile.scorer);
  request.score_bytes = scorer->needs().accumulated ? 4 : 0;
  request.context_length = flags.context_length > 0 ? flags.context_length : profile.length;
  request.compression = flags.compression;
  SetMinKeep(request, flags.min_keep);
  if (flags.budget_mib > 0) {
    MOEND_ASSIGN(request.budget_bytes, BudgetBytes(flags.budget_mib));
  }
  if (flags.measure.validate > 0) return RunValidate(flags.measure, profile, request, flags.output);
  MOEND_ASSIGN(Solution solution, Solve(profile, request));
  fmt::print("{}", DescribePlan(solution.plan, OutputStyle()));
  fmt::print("predicted loss {:.6g}, no plan can be below {:.6g} (gap {:.3g}); solved by {} in {:.1f} ms\n",
             solution.loss, solution.lower_bound, solution.loss - solution.lower_bound, flags.solver,
             solution.milliseconds);
  if (std::isfinite(solution.expected_kl))
    fmt::print("expected KL(full || compressed) where the text must be looked up: {:.3g} nats a token\n",
               solution.expected_kl);
  if (solution.min_keep > 0 && !flags.min_keep)
    fmt::print(
        "every {} keeps {:g}% of its tokens or more, for {:.2g}% of predicted loss; --min-keep 0: no floor\n",
        request.variant == Variant::k2dHeads ? "KV head" : "layer", 100 * solution.min_keep,
        solution.lower_bound > 0 ? 100 * (solution.loss / solution.lower_bound - 1) : 0.0);
  if (flags.measure.refine) {
    request.min_keep = solution.min_keep;
    MOEND_ASSIGN(solution.plan, RunRefine(flags.measure, profile, request, solution.plan));
    fmt::print("{}", DescribePlan(solution.plan, OutputStyle()));
  }
  if (flags.output.empty()) return {};
  MOEND_TRY(WriteFileAtomically(flags.output, ToJson(solution.plan)));
  Note(fmt::format("wrote {}", flags.output));
  if (could_read_once && Evicts(solution.plan))
    Note(
        "prompts will be read twice, to know what they need; --scorer learned reads them once, and loses "
        "more");
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
  choice("--variant", f.variant, kVariantText, kVariants);
  command
      ->add_option("--scorer", f.scorer,
                   "how the plan chooses tokens; default: as the profile, whose losses were measured with it")
      ->check(CLI::IsMember(ScorerNames()))
      ->type_name("NAME");
  AddMinKeep(*command, f.min_keep);
  command->add_flag("--no-refit", f.no_refit,
                    "leave the values of kept tokens as they are; else the scorers reconstruct and learned "
                    "move them so that "
                    "they make up for what is gone");
  command->add_option("-o,--output", f.output, "the plan; without it, it is only shown")
      ->type_name("PLAN.json");
  f.measure.AddTo(*command);
  command->footer(kSolveFooter);
  command->callback([flags, ratio, budget, &exit_code] {
    flags->measure.Check();
    if (flags->measure.validate == 0 && ratio->count() + budget->count() == 0)
      throw CLI::RequiredError("--compression R or --budget-mib N");
    exit_code = ExitCode(Run(*flags));
  });
}

}  // namespace moend::cli
