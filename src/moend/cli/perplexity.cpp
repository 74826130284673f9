// moend perplexity: how much a compressed cache changes the model's predictions of a text.
#include "moend/eval/perplexity.h"

#include <fmt/format.h>

#include <algorithm>

#include "moend/cli/commands.h"
#include "moend/cli/common.h"
#include "moend/cli/progress.h"

namespace moend::cli {
namespace {

constexpr const char* kFooter = R"(
Examples:
  moend perplexity -m model.gguf -f text.txt
  moend perplexity -m model.gguf -f text.txt --plan plan.json -c 8192

The text is cut into chunks; the first half of each is read and compressed, the second half predicted. With a
plan, every prediction is compared with the full cache's (KL divergence). Terms and layout are llama.cpp's; as
there, "<|end|>" and the like in the text are read as text.)";

struct PerplexityFlags {
  ModelFlags model;
  PlanFlags plan;
  std::string file;
  bool parse_special = false;
  eval::PerplexityOptions options;
};

Expected<void> Run(PerplexityFlags& flags) {
  MOEND_ASSIGN(const std::string text, ReadInput(flags.file));
  MOEND_ASSIGN(auto engine, flags.model.Load());
  const int64_t trained = engine->model().hparams().n_ctx_train;
  if (flags.options.n_ctx > trained)
    return Fail(ErrorCode::kInvalidArgument, "chunks of {} tokens are not possible; {} was trained for {}",
                flags.options.n_ctx, flags.model.path, trained);
  MOEND_ASSIGN(const auto tokens, engine->model().tokenizer().Tokenize(text, true, flags.parse_special));
  MOEND_ASSIGN(const Plan plan, flags.plan.Make(*engine, flags.options.n_ctx));
  flags.options.scorer = flags.plan.scorer;

  const Interrupt interrupt;
  ProgressBar bar("predicting", 0);
  const auto progress = [&](const eval::PerplexityProgress& p) {
    bar.Update(p.share, fmt::format("chunk {} of {}{}", p.chunk + 1, p.chunks,
                                    p.ppl > 0 ? fmt::format(", PPL {:.4f}", p.ppl) : ""));
    return !Interrupt::requested();
  };
  auto result = eval::Perplexity(engine, tokens, plan, flags.options, progress);
  bar.Clear();
  if (!result && result.error().code == ErrorCode::kCancelled)
    return Fail(ErrorCode::kCancelled, "interrupted");
  if (!result) return Forward(result);
  fmt::print("{}", eval::FormatPerplexity(*result));
  return {};
}

}  // namespace

void AddPerplexity(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("perplexity", "Perplexity and KL divergence of a compressed cache");
  auto flags = std::make_shared<PerplexityFlags>();
  PerplexityFlags& f = *flags;
  f.model.AddTo(*command);
  command->add_option("-f,--file", f.file, "the text; - is standard input")->required()->type_name("TEXT");
  f.plan.AddTo(*command);
  command->add_option("-c,--ctx-size", f.options.n_ctx, "tokens of a chunk")
      ->capture_default_str()
      ->check(CLI::Range(8, INT32_MAX))
      ->type_name("N");
  command->add_option("--chunks", f.options.chunks, "at most so many chunks; 0: all")
      ->capture_default_str()
      ->check(CLI::Range(0, INT32_MAX))
      ->type_name("N");
  command->add_flag("--parse-special", f.parse_special,
                    "special tokens that the text spells out are tokens, not text");
  command->footer(kFooter);
  command->callback([flags, &exit_code] {
    flags->plan.Check();
    exit_code = ExitCode(Run(*flags));
  });
}

}  // namespace moend::cli
