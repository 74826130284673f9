// moend report: evaluations as one HTML page.
#include "moend/eval/report.h"

#include <fmt/format.h>

#include "moend/base/file.h"
#include "moend/cli/commands.h"
#include "moend/cli/common.h"

namespace moend::cli {
namespace {

constexpr const char* kReportFooter = R"(
Example:
  moend report out-2k.json out-16k.json --profile profile.json -o report.html

The page holds everything it shows and needs no network.)";

struct ReportFlags {
  std::vector<std::string> results;
  std::string profile, plan, output;
};

Expected<void> Run(const ReportFlags& flags) {
  MOEND_TRY(CheckWritable(flags.output));
  std::vector<eval::Results> results;
  for (const std::string& path : flags.results) {
    MOEND_ASSIGN(auto loaded, eval::LoadResults(path));
    results.push_back(std::move(loaded));
  }
  eval::ReportInput input;
  input.results = results;
  if (!flags.profile.empty()) {
    MOEND_ASSIGN(input.profile, LoadProfile(flags.profile));
  }
  if (!flags.plan.empty()) {
    MOEND_ASSIGN(input.plan, LoadPlan(flags.plan));
    input.plan_source = flags.plan;
  }
  MOEND_ASSIGN(const std::string page, eval::MakeReport(input));
  return WriteFileAtomically(flags.output, page);
}

}  // namespace

void AddReport(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("report", "Show evaluations as an HTML page");
  auto flags = std::make_shared<ReportFlags>();
  command->add_option("results", flags->results, "files that moend eval wrote")
      ->required()
      ->type_name("OUT.json...");
  command->add_option("--profile", flags->profile, "show what each expert costs each layer")
      ->type_name("PROFILE.json");
  command->add_option("--plan", flags->plan, "show this plan first")->type_name("PLAN.json");
  command->add_option("-o,--output", flags->output, "the page")->required()->type_name("REPORT.html");
  command->footer(kReportFooter);
  command->callback([flags, &exit_code] { exit_code = ExitCode(Run(*flags)); });
}

}  // namespace moend::cli
