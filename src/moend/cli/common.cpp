#include "moend/cli/common.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "moend/base/file.h"
#include "moend/base/machine.h"
#include "moend/base/number.h"
#include "moend/model/device.h"
#include "moend/model/device_weights.h"
#include "moend/score/scorer.h"
#include "moend/solve/solve.h"

namespace moend::cli {
namespace {

constexpr int64_t kMaxInputBytes = int64_t{1} << 30;

std::atomic<bool> interrupted{false};
struct sigaction before;

void OnInterrupt(int) {
  interrupted.store(true, std::memory_order_relaxed);
}

}  // namespace

int Report(const Error& error) {
  fmt::print(stderr, "moend: error: {}\n", error.message);
  return error.code == ErrorCode::kCancelled ? kExitInterrupted : kExitFailure;
}

int ExitCode(Expected<void> result) {
  return result ? 0 : Report(result.error());
}

void Note(const std::string& text) {
  fmt::print(stderr, "moend: {}\n", text);
}

int FlushOutput() {
  errno = 0;
  if (std::fflush(stdout) == 0 && !std::ferror(stdout)) return 0;
  const int reason = errno;
  fmt::print(stderr, "moend: error: cannot write to standard output{}{}\n", reason ? ": " : "",
             reason ? std::strerror(reason) : "");
  return kExitFailure;
}

void AddEnvironment(CLI::App& app) {
  const CLI::Validator not_empty(
      [](std::string& text) {
        return text.empty() ? std::string("The value may not be empty") : std::string();
      },
      "");
  for (CLI::Option* option : app.get_options()) {
    if (option->get_items_expected_max() > 0) option->check(not_empty);
    if (option->get_lnames().empty() || option->get_lnames()[0] == "help") continue;
    std::string name = "MOEND_ARG_" + option->get_lnames()[0];
    std::transform(name.begin(), name.end(), name.begin(),
                   [](unsigned char c) { return c == '-' ? '_' : static_cast<char>(std::toupper(c)); });
    option->envname(name);
  }
}

std::string EmptyVariable(const CLI::App& app) {
  for (const CLI::Option* option : app.get_options()) {
    const std::string name = option->get_envname();
    const char* value = name.empty() ? nullptr : std::getenv(name.c_str());
    if (value && !*value) return name;
  }
  return {};
}

void ModelFlags::AddTo(CLI::App& app) {
  app.add_option("-m,--model", path, "GGUF file (docs/models.md lists the architectures)")
      ->required()
      ->type_name("FILE");
  app.add_option("-t,--threads", threads, "threads; 0: one for each CPU that the process may use")
      ->check(CLI::Range(0, 1024))
      ->type_name("N");
  app.add_flag("--no-mmap", no_mmap,
               "read the model into memory: it may then be overwritten while it is in use");
  app.add_flag("--no-repack", no_repack, "leave all weights as in the file: less memory, slower");
  app.add_option("--device", device,
                 "where layers run, by its name in 'moend devices', or none; default: the first GPU there is")
      ->type_name("NAME");
  app.add_option(
         "--gpu-layers,--n-gpu-layers", gpu_layers,
         "how many of the model's last layers run there, the output counting as one (-ngl): a number, "
         "all, or auto for as many as fit")
      ->capture_default_str()
      ->check(CLI::Validator(
          [](std::string& text) {
            const auto n = ParseNumber<int32_t>(text);
            return text == "auto" || text == "all" || (n && *n >= 0)
                       ? std::string()
                       : fmt::format("{} is neither a number of layers nor all or auto", text);
          },
          ""))
      ->type_name("N");
}

Expected<DeviceOptions> ModelFlags::Device() const {
  DeviceOptions options{device, DeviceOptions::kAllThatFit};
  if (gpu_layers == "auto") return options;
  options.n_gpu_layers = ParseNumber<int32_t>(gpu_layers).value_or(INT32_MAX);  // or "all"
  if (device.empty() && options.n_gpu_layers > 0) {
    MOEND_ASSIGN(const auto* const found, FindDevice(""));
    if (!found)
      Note(fmt::format(
          "-ngl {}: there is no GPU here that moend has a back end for, so all layers run on the CPU; "
          "see 'moend devices'",
          gpu_layers));
  }
  return options;
}

Expected<std::shared_ptr<Engine>> ModelFlags::Load() const {
  LoadOptions load;
  load.n_threads = threads;
  load.repack = !no_repack;
  load.map = !no_mmap;
  MOEND_ASSIGN(load.device, Device());
  MOEND_ASSIGN(auto model, Model::Load(path, load));
  EngineOptions options;
  options.n_threads = threads;
  MOEND_ASSIGN(auto engine, Engine::Create(std::move(model), options));
  if (const DeviceWeights* on_device = engine->model().device())
    Note(fmt::format("{} of {} layers on {} ({}), {} MiB{}",
                     engine->model().hparams().n_layers + 1 - on_device->first_layer,
                     engine->model().hparams().n_layers + 1, ggml_backend_dev_name(on_device->device),
                     ggml_backend_dev_description(on_device->device), MiBText(on_device->bytes),
                     engine->device_attends() ? "" : "; the CPU attends while text is generated"));
  const MachineLimits limits = ReadMachineLimits();
  const auto machine = static_cast<int>(std::thread::hardware_concurrency());
  if (engine->n_threads() < threads || (threads == 0 && engine->n_threads() < machine))
    Note(fmt::format("{} thread{}: the process may use {} of the machine's {} CPUs{}", engine->n_threads(),
                     engine->n_threads() == 1 ? "" : "s", limits.cpus, std::max(machine, limits.cpus),
                     limits.cpu_quota > 0 ? fmt::format(", {:g} at a time", limits.cpu_quota) : ""));
  return engine;
}

void PlanFlags::AddTo(CLI::App& app) {
  auto* from_plan = app.add_option("--plan", plan, "compress as this plan says (from 'moend solve')");
  from_plan->type_name("PLAN.json");
  auto* from_profile =
      app.add_option("--profile", profile, "solve for this prompt from a calibrated profile");
  from_profile->type_name("PROFILE.json")->excludes(from_plan);
  auto* ratio = app.add_option("--compression", compression, "with --profile: times smaller than 16 bit");
  ratio->type_name("R")->needs(from_profile)->check(CLI::Range(1.0, 1e6));
  auto* budget = app.add_option("--budget-mib", budget_mib, "with --profile: K/V bytes at most, in MiB");
  budget->type_name("N")->needs(from_profile)->excludes(ratio)->check(CLI::PositiveNumber);
  const auto choice = [&](const std::string& flag, std::string& value, const char* text,
                          std::vector<std::string> names) {
    app.add_option(flag, value, text)
        ->needs(from_profile)
        ->capture_default_str()
        ->check(CLI::IsMember(std::move(names)))
        ->type_name("NAME");
  };
  choice("--variant", variant, kVariantText, kVariants);
  choice("--solver", solver, "with --profile: how the plan is found", kSolvers);
  choice("--metric", metric, "with --profile: what the plan minimizes", kMetrics);
  AddMinKeep(app, min_keep)->needs(from_profile);
  app.add_option("--scorer", scorer, "how tokens are chosen instead of the plan's way")
      ->check(CLI::IsMember(ScorerNames()))
      ->type_name("NAME");
}

CLI::Option* AddMinKeep(CLI::App& app, std::optional<double>& min_keep) {
  return app
      .add_option(
          "--min-keep", min_keep,
          fmt::format("no layer or KV head keeps a smaller share of its tokens; default: {:g}, or less "
                      "where that would raise the predicted loss by more than {:g} %",
                      kDefaultMinKeep, 100 * kDefaultFloorPrice))
      ->type_name("SHARE")
      ->check(CLI::Range(0.0, 1.0));
}

void SetMinKeep(SolveRequest& request, std::optional<double> min_keep) {
  request.min_keep = min_keep.value_or(kDefaultMinKeep);
  request.floor_price = min_keep ? 0 : kDefaultFloorPrice;
}

void PlanFlags::Check() const {
  if (!profile.empty() && compression == 0 && budget_mib == 0)
    throw CLI::RequiredError("--profile needs --compression or --budget-mib, which");
}

Expected<Variant> VariantOf(const std::string& name, const Profile& profile) {
  if (name.empty()) return FinestVariant(profile);
  return ParseVariant(name);
}

Expected<Plan> PlanFlags::Make(const Engine& engine, int64_t n_tokens) const {
  const Fingerprint running = engine.fingerprint();
  if (!plan.empty()) {
    MOEND_ASSIGN(Plan loaded, LoadPlan(plan));
    MOEND_TRY(CheckSameModel(loaded.model, running, plan));
    return loaded;
  }
  if (profile.empty()) return FullPlan(running, n_tokens);
  MOEND_ASSIGN(Profile measured, LoadProfile(profile));
  MOEND_TRY(CheckSameModel(measured.model, running, profile));
  SolveRequest request;
  MOEND_ASSIGN(request.solver, ParseSolver(solver));
  MOEND_ASSIGN(request.metric, ParseMetric(metric));
  MOEND_ASSIGN(request.variant, VariantOf(variant, measured));
  MOEND_ASSIGN(request.score_bytes, ScoreBytes(scorer.empty() ? measured.scorer : scorer));
  request.context_length = n_tokens;
  request.compression = compression;
  SetMinKeep(request, min_keep);
  if (budget_mib > 0) {
    MOEND_ASSIGN(request.budget_bytes, BudgetBytes(budget_mib));
  }
  auto solution = Solve(measured, request);
  if (!solution && solution.error().code == ErrorCode::kBudget && budget_mib == 0 &&
      n_tokens < measured.length) {
    // The unquantized tokens alone exceed such a share of a short prompt. Its cache is small anyway; what
    // counts is that a long one gets the ratio.
    Note(fmt::format("{} tokens are too few to be {:g}x smaller; the plan is for {}", n_tokens, compression,
                     measured.length));
    request.context_length = measured.length;
    solution = Solve(measured, request);
  }
  if (!solution) return Forward(solution);
  return std::move(solution->plan);
}

TextStyle OutputStyle() {
  TextStyle style;
  const char* term = std::getenv("TERM");
  const char* no_color = std::getenv("NO_COLOR");
  const bool plain = (no_color && *no_color) || (term && std::strcmp(term, "dumb") == 0);
  style.color = isatty(STDOUT_FILENO) == 1 && !plain;
  winsize size{};
  if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0)
    style.width = std::max(80, int{size.ws_col});
  return style;
}

Expected<int64_t> ScoreBytes(const std::string& scorer) {
  MOEND_ASSIGN(const auto made, MakeScorer(scorer));
  return made->needs().accumulated ? 4 : 0;
}

Expected<int64_t> BudgetBytes(double mib) {
  const double bytes = mib * 1024 * 1024;
  if (!(bytes >= 1 && bytes < 0x1p62))
    return Fail(ErrorCode::kInvalidArgument, "a budget of {} MiB is not possible", mib);
  return static_cast<int64_t>(bytes);
}

Expected<std::string> ReadInput(const std::string& path) {
  if (path != "-") return ReadFile(path, kMaxInputBytes);
  std::string text;
  char block[1 << 16];
  while (const std::size_t n = std::fread(block, 1, sizeof block, stdin)) {
    text.append(block, n);
    if (static_cast<int64_t>(text.size()) > kMaxInputBytes)
      return Fail(ErrorCode::kTooLong, "standard input has more than {} bytes", kMaxInputBytes);
  }
  if (std::ferror(stdin)) return Fail(ErrorCode::kIo, "cannot read standard input");
  return text;
}

Expected<std::vector<std::vector<int32_t>>> ReadTexts(const std::vector<std::string>& files,
                                                      const Tokenizer& tokenizer) {
  std::vector<std::vector<int32_t>> texts;
  for (const std::string& file : files) {
    MOEND_ASSIGN(const std::string text, ReadInput(file));
    MOEND_ASSIGN(auto tokens, tokenizer.Tokenize(text, false, true));
    texts.push_back(std::move(tokens));
  }
  return texts;
}

std::string MiBText(int64_t bytes) {
  const double mib = MiB(bytes);
  if (mib < 1000) return fmt::format("{:.4g}", mib);
  std::string text = fmt::format("{:.0f}", mib);
  for (std::size_t at = text.size(); at > 3;) text.insert(at -= 3, ",");
  return text;
}

double MiB(int64_t bytes) {
  return static_cast<double>(bytes) / (1024.0 * 1024.0);
}

int64_t PeakResidentBytes() {
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) != 0) return 0;
  return int64_t{usage.ru_maxrss} * 1024;
}

Interrupt::Interrupt() {
  interrupted = false;
  struct sigaction action {};
  action.sa_handler = OnInterrupt;
  // No SA_RESTART: waiting for input ends as well.
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, &before);
}

Interrupt::~Interrupt() {
  sigaction(SIGINT, &before, nullptr);
}

bool Interrupt::requested() {
  return interrupted.load(std::memory_order_relaxed);
}

}  // namespace moend::cli
