// moend: run GGUF models with a K/V cache that is compressed layer by layer.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>

#include "moend/attention/attention.h"
#include "moend/attention/cuda/attention.h"
#include "moend/cli/arguments.h"
#include "moend/cli/commands.h"
#include "moend/cli/common.h"
#include "moend/cli/help.h"

namespace moend::cli {
namespace {

constexpr const char* kMainFooter = R"(
From a model to a smaller cache:
  moend calibrate -m model.gguf -f text.txt -o profile.json
  moend solve profile.json --compression 14 -o plan.json
  moend run -m model.gguf --plan plan.json -f prompt.txt

Results go to stdout, everything else to stderr. Exit code: 0; 1 for a failure; 2 for wrong usage; 130 after
Ctrl-C. A flag --some-name can also be given as the environment variable MOEND_ARG_SOME_NAME.)";

int UsageError(const std::string& message, const CLI::App* command) {
  const std::string name = command ? command->get_name() : std::string();
  fmt::print(stderr, "moend: error: {}\nSee 'moend {}{}--help'.\n", message, name, name.empty() ? "" : " ");
  return kExitUsage;
}

// With what computes: the CPU's instructions, and the kernels for NVIDIA GPUs.
std::string Version() {
  const auto number = [](int version) { return fmt::format("{}.{}", version / 1000, version % 1000 / 10); };
  std::string kernels = "no CUDA kernels";
  if (cuda::Compiled()) {
    const int driver = cuda::DriverVersion();
    kernels = fmt::format("kernels of CUDA {}, {}", number(cuda::ToolkitVersion()),
                          driver > 0 ? "a driver for " + number(driver) : "no driver");
  }
  return fmt::format("moend {} ({}; {})", MOEND_VERSION, simd::TargetName(), kernels);
}

int Run(int argc, const char* const* argv) {
  CLI::App app("Runs GGUF models with a K/V cache that is compressed layer by layer.", "moend");
  int exit_code = 0;
  app.formatter(std::make_shared<HelpFormatter>());  // handed on to the subcommands
  app.set_help_flag("-h,--help", "show this");
  app.set_version_flag("--version", Version, "show the version");
  app.footer(kMainFooter);
  app.require_subcommand(1);
#define MOEND_ADD_COMMAND(add) add(app, exit_code);
  MOEND_COMMANDS(MOEND_ADD_COMMAND)
#undef MOEND_ADD_COMMAND
  for (CLI::App* command : app.get_subcommands({})) AddEnvironment(*command);

  auto arguments = TranslateArguments(argc, argv);
  if (!arguments) return UsageError(arguments.error().message, nullptr);
  if (arguments->empty()) {
    fmt::print(stderr, "{}", app.help());
    return kExitUsage;
  }
  const std::string& first = arguments->front();
  const auto named_so = [&](const CLI::App* command) { return command->get_name() == first; };
  if (first[0] != '-' && app.get_subcommands(named_so).empty())
    return UsageError(fmt::format("there is no command '{}'", first), nullptr);
  for (const CLI::App* command : app.get_subcommands(named_so))
    if (const std::string name = EmptyVariable(*command); !name.empty())
      return UsageError(
          fmt::format("the environment variable {} is empty; give it a value or unset it", name), command);
  try {
    std::reverse(arguments->begin(), arguments->end());  // as CLI11 wants a vector
    app.parse(std::move(*arguments));
  } catch (const CLI::CallForHelp&) {
    const auto chosen = app.get_subcommands();
    fmt::print("{}", (chosen.empty() ? &app : chosen[0])->help());
  } catch (const CLI::CallForVersion& version) {
    fmt::print("{}\n", version.what());
  } catch (const CLI::ParseError& error) {
    const auto chosen = app.get_subcommands();
    return UsageError(error.what(), chosen.empty() ? nullptr : chosen[0]);
  }
  const int flushed = FlushOutput();
  return exit_code ? exit_code : flushed;
}

}  // namespace
}  // namespace moend::cli

int main(int argc, char** argv) {
  try {
    return moend::cli::Run(argc, argv);
  } catch (const std::exception& error) {  // out of memory; our own code reports by value
    fmt::print(stderr, "moend: error: {}\n", error.what());
    return moend::cli::kExitFailure;
  }
}
