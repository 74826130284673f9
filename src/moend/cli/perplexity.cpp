// moend perplexity: how much a compressed cache changes the model's predictions of a text.
#include "moend/eval/perplexity.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "moend/base/file.h"
#include "moend/cli/commands.h"
#include "moend/cli/common.h"
#include "moend/cli/method_flags.h"
#include "moend/cli/progress.h"
#include "moend/eval/llama_cache.h"

namespace moend::cli {
namespace {

constexpr const char* kPerplexityFooter = R"(
Examples:
  moend perplexity -m model.gguf -f text.txt
  moend perplexity -m model.gguf -f text.txt --plan plan.json -c 8192
  moend perplexity -m model.gguf -f text.txt -c 8192 --profile profile.json --variant 2d_heads,q8,q4 \
    --compression 1.9,3.6,14 --llama-cache q8_0,q4_0

The text is cut into chunks; the first half of each is read and compressed, the second half predicted. Every
prediction of a compressed cache is compared with the full cache's (KL divergence). Terms and layout are
llama.cpp's; as there, "<|end|>" and the like in the text are read as text. Several caches make a table.
--llama-cache runs libllama on the same chunks with its own cache types and compares those with libllama's f16
cache, by the same code.)";

struct PerplexityFlags {
  ModelFlags model;
  MethodFlags methods;
  std::string file, output;
  bool parse_special = false;
  eval::PerplexityOptions options;
};

Expected<void> Run(PerplexityFlags& flags) {
  if (!flags.output.empty()) MOEND_TRY(CheckWritable(flags.output));
  MOEND_ASSIGN(const std::string text, ReadInput(flags.file));
  MOEND_ASSIGN(auto engine, flags.model.Load());
  const int64_t trained = engine->model().hparams().n_ctx_train;
  if (flags.options.n_ctx > trained)
    return Fail(ErrorCode::kInvalidArgument, "chunks of {} tokens are not possible; {} was trained for {}",
                flags.options.n_ctx, flags.model.path, trained);
  MOEND_ASSIGN(const auto tokens, engine->model().tokenizer().Tokenize(text, true, flags.parse_special));
  MOEND_ASSIGN(const auto methods, flags.methods.Make(*engine, flags.options.n_ctx, {"2d_hetero"}));

  const Interrupt interrupt;
  ProgressBar bar("predicting", 0);
  const auto progress = [&](const eval::PerplexityProgress& p) {
    bar.Update(p.share, fmt::format("chunk {} of {}{}", p.chunk + 1, p.chunks,
                                    p.ppl > 0 ? fmt::format(", PPL {:.4f}", p.ppl) : ""));
    return !Interrupt::requested();
  };
  auto results = eval::Perplexity(engine, tokens, methods, flags.options, progress);
  bar.Clear();
  if (!results && results.error().code == ErrorCode::kCancelled)
    return Fail(ErrorCode::kCancelled, "interrupted");
  if (!results) return Forward(results);
  if (!flags.output.empty())
    MOEND_TRY(WriteFileAtomically(
        flags.output, eval::PerplexitiesToJson(*results, engine->fingerprint(), flags.options.n_ctx,
                                               std::filesystem::path(flags.file).filename().string())));
  // Of one compressed cache, or of the full one alone, the long form.
  fmt::print("{}", results->size() <= 2 ? eval::FormatPerplexity(results->back())
                                        : eval::FormatPerplexities(*results));
  return {};
}

}  // namespace

void AddPerplexity(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("perplexity", "Perplexity and KL divergence of a compressed cache");
  auto flags = std::make_shared<PerplexityFlags>();
  PerplexityFlags& f = *flags;
  f.model.AddTo(*command);
  command->add_option("-f,--file", f.file, "the text; - is standard input")->required()->type_name("TEXT");
  f.methods.AddTo(*command);
  command->add_option("--llama-cache", f.options.llama_caches, "compare with these cache types of libllama")
      ->delimiter(',')
      ->check(CLI::IsMember(eval::LlamaCacheTypes()))
      ->type_name("TYPE,...");
  command->add_option("-o,--output", f.output, "the same as JSON")->type_name("OUT.json");
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
  command->footer(kPerplexityFooter);
  command->callback([flags, &exit_code] {
    const MethodFlags& m = flags->methods;
    if (!m.profile.empty() && m.compressions.empty() && m.budgets_mib.empty())
      throw CLI::RequiredError("--profile needs --compression or --budget-mib, which");
    exit_code = ExitCode(Run(*flags));
  });
}

}  // namespace moend::cli
