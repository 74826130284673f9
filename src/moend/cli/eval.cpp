// moend eval: answers of a task suite under many ways of compressing, scored.
#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "moend/base/file.h"
#include "moend/cli/commands.h"
#include "moend/cli/common.h"
#include "moend/cli/method_flags.h"
#include "moend/cli/progress.h"
#include "moend/eval/run.h"

namespace moend::cli {
namespace {

constexpr const char* kEvalFooter = R"(
Examples:
  moend eval -m model.gguf --suite suite.jsonl --profile profile.json --compression 4,14,40 \
    --variant full,1d,2d_uniform,2d,2d_hetero -o out.json
  moend eval -m model.gguf --suite suite.jsonl --plan plan.json --scorer snapkv,h2o
  moend eval -m instruct.gguf --suite choice.jsonl --chat-template --prompt-tokens 8192 --variant full,q4

Suites are JSON lines: moend's own, LongBench v1, RULER (niah_*.jsonl, vt.jsonl, ...), or mathematical problems
(aime*.jsonl, math*.jsonl, gsm8k*.jsonl). A context is read once and compressed by every method at the same
allocated bytes; "vs full" is the mean difference to the full cache's score on the same questions, with its
interval over contexts, KLD the divergence from the full cache on the right answers' tokens. With -o, what is answered survives Ctrl-C, and the same command goes on; other methods can be
added to the same file later.)";

struct EvalFlags {
  ModelFlags model;
  MethodFlags methods;
  std::string suite, output, mode = "agnostic", chat_template = "suite";
  std::vector<std::string> datasets;
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
  eval::SetChatTemplate(suite, flags.chat_template == "always"  ? eval::ChatTemplate::kAlways
                               : flags.chat_template == "never" ? eval::ChatTemplate::kNever
                                                                : eval::ChatTemplate::kSuite);
  MOEND_TRY(eval::KeepDatasets(suite, flags.datasets));
  eval::Limit(suite, flags.limit);
  MOEND_ASSIGN(auto engine, flags.model.Load());
  if (flags.chat_template == "always" && !engine->model().tokenizer().has_chat_template())
    return Fail(ErrorCode::kUnsupported, "{} has no chat template for --chat-template", flags.model.path);
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
  MOEND_ASSIGN(const auto methods, flags.methods.Make(*engine, flags.context_length, {"full", "2d_hetero"}));
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
  f.methods.AddTo(*command);
  command->add_option("--mode", f.mode, "agnostic: compress, then ask; aware: the question is compressed too")
      ->capture_default_str()
      ->check(CLI::IsMember({"agnostic", "aware"}))
      ->type_name("NAME");
  command
      ->add_flag("--chat-template{always}", f.chat_template,
                 "wrap every row in the model's chat template; =never: none, not even where the suite's "
                 "format wants it")
      ->check(CLI::IsMember({"suite", "always", "never"}));
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
  command->add_flag("--recompute", f.recompute,
                    "read a context anew for each method: slow, with the least memory");
  command
      ->add_option("--spill", f.options.spill,
                   "keep a context's uncompressed K/V in files in this folder, not in memory")
      ->check(CLI::ExistingDirectory)
      ->type_name("FOLDER");
  command->add_flag("--restart", f.restart, "start anew even if the output holds answers");
  command->footer(kEvalFooter);
  command->callback([flags, &exit_code] { exit_code = ExitCode(Run(*flags)); });
}

}  // namespace moend::cli
