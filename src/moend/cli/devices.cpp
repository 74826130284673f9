// moend devices: what layers can run on here.
#include <fmt/format.h>

#include "moend/cli/commands.h"
#include "moend/cli/common.h"
#include "moend/cli/table.h"
#include "moend/model/device.h"

namespace moend::cli {
namespace {

constexpr const char* kFooter = R"(
Other commands take one with --device NAME, and with -ngl how many layers it gets. GPUs need a back end of
ggml's beside the program: 'make GPU=1' builds that for NVIDIA's (libggml-cuda.so).)";

void List() {
  std::vector<std::vector<std::string>> rows;
  for (const Device& d : ListDevices())
    rows.push_back({d.name, d.description, MiBText(d.free_bytes), MiBText(d.total_bytes)});
  fmt::print("{}", Table({{"name", 12}, {"device", 48}, {"free MiB", 12}, {"MiB", 12}}, rows));
}

}  // namespace

void AddDevices(CLI::App& app, int& exit_code) {
  CLI::App* command = app.add_subcommand("devices", "What layers can run on here: the CPU, and GPUs");
  command->footer(kFooter);
  command->callback([&exit_code] {
    List();
    exit_code = 0;
  });
}

}  // namespace moend::cli
