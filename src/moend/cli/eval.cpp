// moend eval: answers of a task suite under many ways of compressing, scored.
#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <optional>

#include "moend/base/file.h"
#include "moend/cli/commands.h"
#include "moend/cli/common.h"
#include "moend/cli/progress.h"
#include "moend/eval/run.h"
#include "moend/score/scorer.h"

namespace moend::cli {
namespace {

constexpr const char* kFooter = R"(
Examples:
  moend eval -m model.gguf --suite suite.jsonl --profile profile.json --compression 4,14,40 \
    --variant full,1d,2d_uniform,2d,2d_hetero -o out.json
  moend eval -m model.gguf --suite suite.jsonl --plan plan.json --scorer snapkv,h2o

Suites are JSON lines: moend's own, LongBench v1, RULER (niah_*.jsonl, vt.jsonl, ...), or mathematical problems
(aime*.jsonl, math*.jsonl, gsm8k*.jsonl). A context is read once and compressed by every method at the same
allocated bytes. With -o, what is answered survives Ctrl-C, and the same command goes on; other methods can be
added to the same file later.)";

struct EvalFlags {
  ModelFlags model;
  std::string suite, output, profile, mode = "agnostic", solver = "exact", metric = "kl";
  std::vector<std::string> plans, variants, scorers, datasets;
  std::vector<double> compressions;
  int64_t limit = 0, context_length = 0;
  eval::EvalOptions options;
  bool restart = false, recompute = false;
};

constexpr std::size_t kMalformedShown = 5;

void NoteMalformed(const eval::Suite& suite) {
  for (std::size_t i = 0; i < std::min(suite.malformed.size(), kMalformedShown); ++i)
    Note("left out: " + suite.malformed[i].message);
  if (suite.malformed.size() > kMalformedShown)
    Note(fmt::format("left out: {} more malformed rows", suite.malformed.size() - kMalformedShown));
}

Expected<std::vector<eval::Method>> Methods(const EvalFlags& flags, const Engine& engine,
                                            int64_t context_length) {
  std::vector<eval::Method> methods;
  const Fingerprint running = engine.fingerprint();
  for (const std::string& path : flags.plans) {
    MOEND_ASSIGN(const Plan plan, LoadPlan(path));
    MOEND_TRY(CheckSameModel(plan.model, running, path));
    const std::vector<std::string> own = {plan.scorer};
    for (const std::string& scorer : flags.scorers.empty() ? own : flags.scorers)
      methods.push_back(eval::MethodOf(plan, scorer));
  }
  eval::MethodRequest request;
  request.variants = flags.variants;
  if (request.variants.empty() && flags.plans.empty())
    request.variants = flags.profile.empty() ? std::vector<std::string>{"full"}
                                             : std::vector<std::string>{"full", "2d_hetero"};
  request.compressions = flags.compressions;
  request.scorers = flags.scorers;
  request.context_length = context_length;
  MOEND_ASSIGN(request.solver, ParseSolver(flags.solver));
  MOEND_ASSIGN(request.metric, ParseMetric(flags.metric));
  std::optional<Profile> profile;
  if (!flags.profile.empty()) {
    MOEND_ASSIGN(profile, LoadProfile(flags.profile));
  }
  std::vector<std::string> skipped;
  MOEND_ASSIGN(auto made, eval::MakeMethods(running, profile ? &*profile : nullptr, request, skipped));
  for (const std::string& text : skipped) Note(text);
  std::ranges::move(made, std::back_inserter(methods));
  if (methods.empty()) return Fail(ErrorCode::kBudget, "no method is left to evaluate");
  return methods;
}

// What an earlier run left at the output path, or nothing yet.
Expected<eval::Results> Unfinished(const EvalFlags& flags, const Fingerprint& model,
                                   const eval::Settings& settings) {
  eval::Results results;
  results.model = model;
  results.settings = settings;
  std::error_code ignored;
  if (flags.output.empty() || flags.restart || !std::filesystem::exists(flags.output, ignored))
    return results;
  auto loaded = eval::LoadResults(flags.output);
  if (!loaded) return Fail(loaded.error().code, "{} (--restart writes over it)", loaded.error().message);
  MOEND_TRY(eval::CheckContinues(*loaded, model, settings, flags.output));
  return std::move(*loaded);
}

Expected<void> Run(EvalFlags& flags) {
  // Everything that can be wrong is found before the long work.
  if (!flags.output.empty()) MOEND_TRY(CheckWritable(flags.output));
  MOEND_ASSIGN(eval::Suite suite, eval::LoadSuite(flags.suite));
  NoteMalformed(suite);
  MOEND_TRY(eval::KeepDatasets(suite, flags.datasets));
  eval::Limit(suite, flags.limit);
  MOEND_ASSIGN(auto engine, flags.model.Load());
  const int64_t trained = engine->model().hparams().n_ctx_train;
  MOEND_ASSIGN(const auto prepared,
               eval::PrepareSuite(engine->model().tokenizer(), suite, trained, flags.options.lengths));
  if (prepared.n_truncated > 0)
    Note(fmt::format("{} of {} contexts lose their middle to fit", prepared.n_truncated,
                     suite.contexts.size()));
  int64_t past = 0;
  for (std::size_t c = 0; c < suite.contexts.size(); ++c) {
    int64_t most = 0;
    for (std::size_t q = 0; q < suite.contexts[c].questions.size(); ++q)
      most = std::max(most, static_cast<int64_t>(prepared.contexts[c].questions[q].size()) +
                                eval::MaxNewTokens(suite.contexts[c].questions[q], flags.options.lengths));
    past += static_cast<int64_t>(prepared.contexts[c].context.size()) + most > trained;
  }
  if (past > 0)
    Note(fmt::format("answers to {} of {} contexts may run past the {} tokens that {} was trained for", past,
                     suite.contexts.size(), trained, flags.model.path));
  flags.options.aware = flags.mode == "aware";
  flags.options.capture = !flags.recompute;
  if (flags.context_length == 0)
    flags.context_length = flags.options.aware ? prepared.longest_prompt : prepared.longest_context;
  MOEND_ASSIGN(const auto methods, Methods(flags, *engine, flags.context_length));
  const auto settings = eval::SettingsOf(suite, flags.options, flags.context_length);
  MOEND_ASSIGN(auto results, Unfinished(flags, engine->fingerprint(), settings));
  Note(fmt::format("{}: {} contexts, {} questions, {} methods, {}", suite.name, suite.contexts.size(),
                   suite.n_questions(), methods.size(), flags.mode));

  const Interrupt interrupt;
  ProgressBar bar("evaluating", 0);
  const auto progress = [&](const eval::EvalProgress& p) {
    bar.Update(p.share, p.method.empty() ? "reading " + p.context : p.context + ", " + p.method);
    return !Interrupt::requested();
  };
  const auto save = [&](const eval::Results& so_far) -> Expected<void> {
    if (flags.output.empty()) return {};
    return WriteFileAtomically(flags.output, eval::ToJson(so_far));
  };
  auto finished =
      eval::Evaluate(engine, suite, prepared, methods, flags.options, std::move(results), progress, save);
  bar.Clear();
  if (!finished && finished.error().code == ErrorCode::kCancelled)
    return Fail(ErrorCode::kCancelled, "interrupted; {}",
                flags.output.empty()
                    ? "without -o nothing was kept"
                    : flags.output + " keeps what was answered, and the same command goes on");
  if (!finished) return Forward(finished);
  fmt::print("{}", eval::FormatTable(*finished));
  return {};
}

}  // namespace

void AddEval(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("eval", "Score a task suite under many ways of compressing");
  auto flags = std::make_shared<EvalFlags>();
  EvalFlags& f = *flags;
  f.model.AddTo(*command);
  command->add_option("--suite", f.suite, "questions with answers, JSON lines")
      ->required()
      ->type_name("FILE.jsonl");
  command->add_option("-o,--output", f.output, "every answer and score; also for going on later")
      ->type_name("OUT.json");
  command->add_option("--plan", f.plans, "evaluate these plans")->type_name("PLAN.json...");
  auto* profile = command->add_option("--profile", f.profile, "solve for the variants from this profile");
  profile->type_name("PROFILE.json");
  command->add_option("--compression", f.compressions, "times smaller than 16 bit, as 4,14,40")
      ->delimiter(',')
      ->check(CLI::Range(1.0, 1e6))
      ->needs(profile)
      ->type_name("R,...");
  command->add_option("--variant", f.variants, "ways of compressing")
      ->delimiter(',')
      ->check(CLI::IsMember(eval::MethodNames()))
      ->type_name("NAME,...");
  command->add_option("--scorer", f.scorers, "how tokens are chosen; default: the profile's or plan's")
      ->delimiter(',')
      ->check(CLI::IsMember(ScorerNames()))
      ->type_name("NAME,...");
  command->add_option("--mode", f.mode, "agnostic: compress, then ask; aware: the question is compressed too")
      ->capture_default_str()
      ->check(CLI::IsMember({"agnostic", "aware"}))
      ->type_name("NAME");
  constexpr int64_t kMost = INT32_MAX;
  const auto number = [&](const char* flag, int64_t& value, const char* text) {
    command->add_option(flag, value, text)->check(CLI::Range(int64_t{0}, kMost))->type_name("N");
  };
  command->add_option("--dataset", f.datasets, "only these data sets of the suite; default: all")
      ->delimiter(',')
      ->type_name("NAME,...");
  number("--limit", f.limit, "at most so many questions of each data set; 0: all");
  number("--prompt-tokens", f.options.lengths.prompt_tokens,
         "longer prompts lose their middle; 0: as many as the model takes");
  number("--context-length", f.context_length,
         "at which the methods' bytes are equal; 0: the longest context's");
  number("--max-new-tokens", f.options.lengths.max_new_tokens, "instead of the suite's own; 0: the suite's");
  command
      ->add_option("--max-new-scale", f.options.lengths.max_new_scale,
                   "times the suite's own (16 for reasoning models)")
      ->capture_default_str()
      ->check(CLI::Range(0.01, 1e4))
      ->type_name("X");
  command->add_option("--solver", f.solver, "how plans are found")
      ->capture_default_str()
      ->check(CLI::IsMember(kSolvers))
      ->type_name("NAME");
  command->add_option("--metric", f.metric, "what plans minimize")
      ->capture_default_str()
      ->check(CLI::IsMember(kMetrics))
      ->type_name("NAME");
  command->add_flag("--recompute", f.recompute,
                    "read a context anew for each method: slow, with the least memory");
  command
      ->add_option("--spill", f.options.spill,
                   "keep a context's uncompressed K/V in files in this folder, not in memory")
      ->check(CLI::ExistingDirectory)
      ->type_name("FOLDER");
  command->add_flag("--restart", f.restart, "start anew even if the output holds answers");
  command->footer(kFooter);
  command->callback([flags, &exit_code] { exit_code = ExitCode(Run(*flags)); });
}

}  // namespace moend::cli
