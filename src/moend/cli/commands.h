// The subcommands of `moend`. To add one, add its line here and define the function in a file of its own: it
// declares the command's flags on `app` and sets `exit_code` when the command has run.
#pragma once

#include <CLI/CLI.hpp>

namespace moend::cli {

// In the order of `moend --help`.
#define MOEND_COMMANDS(X) \
  X(AddRun)               \
  X(AddCalibrate)         \
  X(AddSolve)             \
  X(AddInspect)           \
  X(AddAsk)               \
  X(AddEval)              \
  X(AddPerplexity)        \
  X(AddReport)            \
  X(AddBench)             \
  X(AddDevices)           \
  X(AddServe)

#define MOEND_DECLARE_COMMAND(add) void add(CLI::App& app, int& exit_code);
MOEND_COMMANDS(MOEND_DECLARE_COMMAND)
#undef MOEND_DECLARE_COMMAND

}  // namespace moend::cli
