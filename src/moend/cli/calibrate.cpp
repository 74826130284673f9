// moend calibrate: measures what every expert costs every layer, into a profile.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <limits>
#include <optional>

#include "moend/base/file.h"
#include "moend/base/number.h"
#include "moend/calibrate/calibrate.h"
#include "moend/calibrate/default_text.h"
#include "moend/calibrate/paper.h"
#include "moend/calibrate/reconstruction.h"
#include "moend/calibrate/sensitivity.h"
#include "moend/cli/commands.h"
#include "moend/cli/common.h"
#include "moend/cli/progress.h"
#include "moend/score/scorer.h"

namespace moend::cli {
namespace {

constexpr const char* kCalibrateFooter = R"(
Examples:
  moend calibrate -m model.gguf -o profile.json
  moend calibrate -m model.gguf -f text.txt -o profile.json -c 8192 --chunks 4

Without -f it measures on a mixed text that is a part of the program (prose, code, tables, dialogue, records,
labels, eight languages, with questions; some 70,000 tokens), in the model's chat template. A text of one's own
should resemble what the model will read, ask for what was read, and be at least a chunk long. The profile is saved after
every chunk; after Ctrl-C, or with more --chunks, the same command goes on where the profile ends.

--paper measures what the paper did: on the first 27 tokens of the text, for keep 0.1 to 1 and 16, 8 or 4 bit,
the relative L2 error of each layer's attention output, tokens being evicted at random. Its profile is for
moend solve --metric l2, with -c for the length that the budget is for.)";

// What ProfileMethod::kReconstruction reads where nothing is asked for: more kinds of text say more than
// longer ones.
constexpr int64_t kRepeatedLength = 4096, kRepeatedChunks = 6;

constexpr const char* kAutoMethod = "auto";

struct CalibrateFlags {
  ModelFlags model;
  std::vector<std::string> files;
  std::string output;
  CalibrateOptions options;
  std::vector<double> keeps;
  std::vector<std::string> bits;
  std::optional<int64_t> chunks;
  std::string method = kAutoMethod;
  bool restart = false, paper = false;
};

// "4/2" is K 4 bit, V 2 bit; "4" is both.
Expected<std::pair<int, int>> ParseBits(const std::string& text) {
  const auto number = [](std::string_view s) { return ParseNumber<int>(s).value_or(0); };
  const std::size_t slash = std::min(text.find('/'), text.size());
  const int k = number(std::string_view(text).substr(0, slash));
  const int v = slash < text.size() ? number(std::string_view(text).substr(slash + 1)) : k;
  if (!IsBitWidth(k) || !IsBitWidth(v))
    return Fail(ErrorCode::kInvalidArgument, "--bits {}: K/V bits are written as 4/2; possible: {}", text,
                fmt::join(kBitWidths, ", "));
  return std::pair(k, v);
}

// Every keep ratio with every pair of bits; what is not given comes from the default list.
Expected<std::vector<Expert>> Experts(const CalibrateFlags& flags) {
  if (flags.keeps.empty() && flags.bits.empty()) return std::vector<Expert>();
  std::vector<double> keeps = flags.keeps;
  std::vector<std::pair<int, int>> bits;
  for (const std::string& text : flags.bits) {
    MOEND_ASSIGN(const auto pair, ParseBits(text));
    bits.push_back(pair);
  }
  for (const Expert& e :
       flags.options.method == ProfileMethod::kLogits ? DefaultExperts() : ReconstructionExperts()) {
    if (flags.keeps.empty()) keeps.push_back(e.keep);
    if (flags.bits.empty()) bits.emplace_back(e.k_bits, e.v_bits);
  }
  std::vector<Expert> experts;
  for (const double keep : keeps) {
    if (!(keep > 0 && keep <= 1))
      return Fail(ErrorCode::kInvalidArgument, "--keep {}: a share of tokens is above 0 and at most 1", keep);
    for (const auto& [k, v] : bits) experts.push_back({keep, k, v});
  }
  std::sort(experts.begin(), experts.end());
  experts.erase(std::unique(experts.begin(), experts.end()), experts.end());
  return experts;
}

// What an earlier run left at the output path; an empty profile when there is nothing.
Expected<Profile> Unfinished(const CalibrateFlags& flags) {
  std::error_code ignored;
  if (flags.restart || !std::filesystem::exists(flags.output, ignored)) return Profile();
  auto profile = LoadProfile(flags.output);
  if (!profile) return Fail(profile.error().code, "{} (--restart writes over it)", profile.error().message);
  return std::move(*profile);
}

// The files, or the program's own text.
Expected<std::vector<std::vector<int32_t>>> Texts(const CalibrateFlags& flags, const Tokenizer& tokenizer) {
  if (!flags.files.empty()) return ReadTexts(flags.files, tokenizer);
  MOEND_ASSIGN(const std::string text, DefaultCalibrationText(tokenizer));
  MOEND_ASSIGN(auto tokens, tokenizer.Tokenize(text, false, true));
  return std::vector<std::vector<int32_t>>{std::move(tokens)};
}

// The first tokens of the text, in a moment.
Expected<void> RunPaper(const CalibrateFlags& flags) {
  MOEND_TRY(CheckWritable(flags.output));
  MOEND_ASSIGN(auto engine, flags.model.Load());
  MOEND_ASSIGN(const auto texts, Texts(flags, engine->model().tokenizer()));
  const std::vector<int32_t>& text = texts[0];
  if (std::ssize(text) < kPaperTokens)
    return Fail(ErrorCode::kInvalidArgument, "{} has {} tokens; --paper takes the first {}",
                flags.files.empty() ? "the mixed text" : flags.files[0], text.size(), kPaperTokens);
  MOEND_ASSIGN(Profile profile, CalibrateLikePaper(*engine, std::span(text).first(kPaperTokens)));
  profile.scorer = flags.options.scorer == kAutoScorer ? kDefaultScorer : flags.options.scorer;
  profile.guard = flags.options.guard;
  MOEND_TRY(SaveProfile(profile, flags.output));
  Note(fmt::format("wrote {}; it has no KL: moend solve {} --metric l2 -c TOKENS ...", flags.output,
                   flags.output));
  fmt::print("{}", DescribeProfile(profile, OutputStyle()));
  return {};
}

Expected<void> RunMethod(CalibrateFlags flags, ProfileMethod method, const std::shared_ptr<Engine>& engine,
                         Profile profile) {
  flags.options.method = method;
  MOEND_ASSIGN(flags.options.experts, Experts(flags));
  const int64_t trained = engine->model().hparams().n_ctx_train;
  const bool by_logits = flags.options.method == ProfileMethod::kLogits;
  if (flags.options.length == 0)
    flags.options.length = std::min(by_logits ? CalibrateOptions().length : kRepeatedLength, trained);
  flags.options.chunks = flags.chunks.value_or(by_logits ? CalibrateOptions().chunks : kRepeatedChunks);
  if (flags.options.length > trained)
    return Fail(ErrorCode::kInvalidArgument, "chunks of {} tokens are not possible; {} was trained for {}",
                flags.options.length, flags.model.path, trained);
  const Tokenizer& tokenizer = engine->model().tokenizer();
  MOEND_ASSIGN(const auto texts, Texts(flags, tokenizer));
  MOEND_ASSIGN(const auto chunks, MakeChunks(texts, tokenizer.bos(), flags.options));
  const auto n_chunks = static_cast<int64_t>(chunks.size());
  const bool learns = !by_logits && flags.options.learn && !profile.learned;
  if (profile.chunks >= n_chunks && (learns || !IsProbed(profile, n_chunks))) {
    Note(fmt::format("{} has its {} chunks already; going on with {}", flags.output, profile.chunks,
                     learns ? "what they teach, for which they are read again" : "its probes and checks"));
  } else if (profile.chunks >= n_chunks) {
    Note(fmt::format("{} has its {} chunks already; --restart measures anew", flags.output, profile.chunks));
  } else if (profile.chunks > 0) {
    Note(fmt::format("going on with {} after {} of {} chunks", flags.output, profile.chunks, n_chunks));
  }

  const Interrupt interrupt;
  ProgressBar bar("calibrating", 0);
  const auto start = std::chrono::steady_clock::now();
  int64_t saved = profile.chunks;
  CalibrateProgress now;
  const auto progress = [&](const CalibrateProgress& p) {
    now = p;
    bar.Update(p.done, fmt::format("{} {} of {}", p.step, p.index + 1, p.count));
    return !Interrupt::requested();
  };
  const auto save = [&](const Profile& so_far) -> Expected<void> {
    MOEND_TRY(SaveProfile(so_far, flags.output));
    saved = so_far.chunks;
    bar.Clear();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    Note(fmt::format("{} {} of {} saved to {} after {}", now.step, now.index + 1, now.count, flags.output,
                     Duration(seconds)));
    return {};
  };
  auto finished = Calibrate(engine, chunks, flags.options, std::move(profile), progress, save);
  bar.Clear();
  if (!finished && finished.error().code == ErrorCode::kCancelled)
    return Fail(ErrorCode::kCancelled, "interrupted; {}",
                saved > 0 ? fmt::format("{} keeps {} of {} chunks, and the same command goes on from there",
                                        flags.output, saved, n_chunks)
                          : "no chunk was finished, so nothing was saved");
  if (!finished) return Forward(finished);
  fmt::print("{}", DescribeProfile(*finished, OutputStyle()));
  return {};
}

Expected<void> Run(const CalibrateFlags& flags) {
  if (flags.paper) return RunPaper(flags);
  MOEND_TRY(CheckWritable(flags.output));
  MOEND_ASSIGN(Profile profile, Unfinished(flags));
  MOEND_ASSIGN(const auto engine, flags.model.Load());
  const bool started = !profile.cells.empty();
  ProfileMethod method = started ? profile.method : ProfileMethod::kReconstruction;
  if (flags.method != kAutoMethod)
    method = flags.method == Name(ProfileMethod::kLogits) ? ProfileMethod::kLogits
                                                          : ProfileMethod::kReconstruction;
  auto done = RunMethod(flags, method, engine, std::move(profile));
  const bool in_vain = !done && done.error().code == ErrorCode::kUnsupported;
  if (flags.method != kAutoMethod || started || method == ProfileMethod::kLogits || !in_vain) return done;
  Note(fmt::format("{}, which is done now", done.error().message));
  return RunMethod(flags, ProfileMethod::kLogits, engine, {});
}

}  // namespace

void AddCalibrate(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("calibrate", "Measure what each compression costs each layer");
  auto flags = std::make_shared<CalibrateFlags>();
  CalibrateFlags& f = *flags;
  f.options.length = 0;
  f.model.AddTo(*command);
  command->add_option("-f,--file", f.files, "texts to measure on; - is standard input; default: a mixed text")
      ->type_name("TEXT...");
  command->add_option("-o,--output", f.output, "the profile")->required()->type_name("PROFILE.json");
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  command
      ->add_option("-c,--ctx-size", f.options.length,
                   fmt::format("tokens of a chunk; 0: {}, with --method logits {}, or what the model has",
                               kRepeatedLength, CalibrateOptions().length))
      ->capture_default_str()
      ->check(CLI::Range(int64_t{0}, kMost))
      ->type_name("LENGTH");
  command
      ->add_option(
          "--chunks", f.chunks,
          fmt::format("how many chunks; 0: all that the texts give; default: {}, with --method logits {}",
                      kRepeatedChunks, CalibrateOptions().chunks))
      ->check(CLI::Range(int64_t{0}, kMost))
      ->type_name("N");
  command
      ->add_option("--evaluated", f.options.evaluated,
                   "with --method logits: tokens at the end of a chunk that are measured")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{1}, kMost))
      ->type_name("N");
  std::vector<std::string> scorers = ScorerNames();
  std::erase(scorers, kLearnedScorer);  // which this makes
  scorers.insert(scorers.begin(), kAutoScorer);
  f.options.scorer = kAutoScorer;
  command
      ->add_option("--scorer", f.options.scorer,
                   "how tokens are chosen; auto: reconstruct; with --method logits keydiff, or expected in "
                   "layers that "
                   "lose clearly less with it")
      ->capture_default_str()
      ->check(CLI::IsMember(std::move(scorers)))
      ->type_name("NAME");
  command->add_option("--keep", f.keeps, "shares of the tokens to try, as 0.1,0.25,1")
      ->delimiter(',')
      ->type_name("SHARE,...");
  command->add_option("--bits", f.bits, "K/V bits to try, as 4/2,8/4")->delimiter(',')->type_name("K/V,...");
  command->add_option("--sinks", f.options.guard.sinks, "first tokens that are never compressed")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 20))
      ->type_name("N");
  command->add_option("--window", f.options.guard.window, "newest tokens that are never compressed")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->type_name("N");
  command
      ->add_option(
          "--method", f.method,
          "how: by what is lost of the attention of a model that repeats the text, for each KV head at "
          "once; or by the logits of a run for each layer (and, with --heads, KV head) and compression; "
          "auto: the "
          "first, if the model repeats")
      ->capture_default_str()
      ->check(CLI::IsMember({std::string(kAutoMethod), std::string(Name(ProfileMethod::kReconstruction)),
                             std::string(Name(ProfileMethod::kLogits))}))
      ->type_name("NAME");
  command->add_flag("--heads", f.options.heads, "with --method logits: measure each KV head too");
  command->add_flag("!--no-learn", f.options.learn,
                    "do not learn to expect what a repetition says, which the scorer learned goes by");
  command
      ->add_flag("--paper", f.paper,
                 "the MoE-nD paper's calibration, to compare with: 27 tokens, random eviction, L2 only")
      ->excludes("--chunks", "--evaluated", "--ctx-size", "--keep", "--bits", "--heads");
  command->add_flag("--restart", f.restart, "start anew even if the output has finished chunks");
  command->footer(kCalibrateFooter);
  command->callback([flags, &exit_code] { exit_code = ExitCode(Run(*flags)); });
}

}  // namespace moend::cli
