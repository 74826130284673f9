// What several subcommands share: flags, loading, and how they report.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moend/base/error.h"
#include "moend/engine/engine.h"
#include "moend/plan/describe.h"
#include "moend/plan/plan.h"
#include "moend/solve/solve.h"

namespace moend::cli {

inline constexpr int kExitFailure = 1;
inline constexpr int kExitUsage = 2;
inline constexpr int kExitInterrupted = 130;  // as shells count a Ctrl-C

// Prints "moend: error: ..." on stderr and returns the exit code that the error asks for.
int Report(const Error& error);
int ExitCode(Expected<void> result);  // 0, or Report()

// "moend: ..." on stderr.
void Note(const std::string& text);

// 0, or kExitFailure with a message when stdout took less than was printed (a full disk, a closed pipe).
int FlushOutput();

// Every long flag --some-name also answers to the environment variable MOEND_ARG_SOME_NAME, the way
// llama.cpp's do to LLAMA_ARG_*. Empty values are refused: mostly they are variables that were never set, and
// what they stand for (a key, a plan) would silently be missing. Call when all flags of a command are
// declared.
void AddEnvironment(CLI::App& app);
// The first of these variables that is set and empty; empty when none is.
std::string EmptyVariable(const CLI::App& app);

// -m, -t, --no-repack, --no-mmap, --device, -ngl
struct ModelFlags {
  std::string path, device, gpu_layers = "auto";
  int threads = 0;
  bool no_repack = false, no_mmap = false;

  void AddTo(CLI::App& app);
  Expected<std::shared_ptr<Engine>> Load() const;

 private:
  Expected<DeviceOptions> Device() const;
};

// The names that ParseVariant(), ParseSolver() and ParseMetric() know.
inline const std::vector<std::string> kVariants = {"full", "1d", "2d_uniform", "2d", "2d_hetero", "2d_heads"};
// The one named, or the finest that the profile has losses for where `name` is empty.
Expected<Variant> VariantOf(const std::string& name, const Profile& profile);
inline constexpr const char* kVariantText =
    "what is routed; default: KV heads where the profile measures them, else layers";
inline const std::vector<std::string> kSolvers = {"greedy", "hull", "exact"};
inline const std::vector<std::string> kMetrics = {"kl", "l2"};

// --plan, or --profile with --compression or --budget-mib and the solver's flags; neither: the full cache.
struct PlanFlags {
  std::string plan, profile, scorer;
  double compression = 0, budget_mib = 0;
  std::optional<double> min_keep;
  std::string variant, solver = "exact", metric = "kl";

  void AddTo(CLI::App& app);
  void Check() const;  // throws CLI11's error when flags do not go together; call when all are parsed
  // A plan for contexts of up to `n_tokens` tokens; made for another model: kMismatch.
  Expected<Plan> Make(const Engine& engine, int64_t n_tokens) const;
};

// --min-keep, wherever a plan is solved for.
CLI::Option* AddMinKeep(CLI::App& app, std::optional<double>& min_keep);
void SetMinKeep(SolveRequest& request, std::optional<double> min_keep);  // without one: the default

// How DescribeProfile() and DescribePlan() should look on this stdout: in colour on a terminal, unless
// NO_COLOR is set.
TextStyle OutputStyle();

// Bytes that `scorer` keeps a cached slot, as LayerBytes() wants them.
Expected<int64_t> ScoreBytes(const std::string& scorer);

// --budget-mib as bytes; kInvalidArgument when that is no number of bytes.
Expected<int64_t> BudgetBytes(double mib);

// The whole of `path`, or of stdin for "-".
Expected<std::string> ReadInput(const std::string& path);

// The tokens of each file, "-" being stdin; special tokens that the text spells out count as such.
Expected<std::vector<std::vector<int32_t>>> ReadTexts(const std::vector<std::string>& files,
                                                      const Tokenizer& tokenizer);

double MiB(int64_t bytes);
std::string MiBText(int64_t bytes);  // for people: 0.5, 847.3, 12,050
int64_t PeakResidentBytes();         // of this process so far

// Reads Ctrl-C as a request while it lives; a second Ctrl-C ends the process at once.
class Interrupt {
 public:
  Interrupt();
  ~Interrupt();
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;
  static bool requested();
};

}  // namespace moend::cli
