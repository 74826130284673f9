// moend bench: tokens a second, in llama-bench's manner.
#include "moend/engine/benchmark.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "moend/cli/commands.h"
#include "moend/cli/common.h"

namespace moend::cli {
namespace {

constexpr const char* kBenchFooter = R"(
Examples:
  moend bench -m model.gguf
  moend bench -m model.gguf -p 0 -n 64 -d 0,4096,16384 --plan full,plan.json
  moend bench -m model.gguf -p 16384 -n 0 -r 3 -o json

A test "pp512 @ d4096" reads 512 tokens behind 4096 others, the compression of their K/V included; "tg128"
generates 128. Tokens are random. Each test runs once to warm up and then as often as -r says; t/s is the mean
and its standard deviation. K/V is what the cache takes after the test. The flags, but for --plan, are those of
llama-bench; bench/against-llama-cpp runs both.)";

constexpr int64_t kMostTokens = 1 << 24;

struct BenchFlags {
  ModelFlags model;
  std::vector<int64_t> prompt = {512}, generate = {128}, depth = {0};
  std::vector<std::string> plans = {"full"};
  SpeedOptions options;
  std::string format = "md";
  bool no_warm_up = false;
};

struct BenchRow {
  std::string plan;
  SpeedResult result;
};

std::string TestName(const SpeedRun& run) {
  return fmt::format("{}{}{}", ShortName(run.test), run.n, run.depth ? fmt::format(" @ d{}", run.depth) : "");
}

nlohmann::ordered_json Json(const BenchRow& row, const Engine& engine) {
  const SpeedResult& r = row.result;
  return {{"test", ShortName(r.run.test)},
          {"n", r.run.n},
          {"depth", r.run.depth},
          {"plan", row.plan},
          {"tps", r.mean()},
          {"tps_stddev", r.stddev()},
          {"kv_bytes", r.kv_bytes},
          {"tps_median", r.median()},
          {"tps_samples", r.tps},
          {"model", engine.model().path()},
          {"threads", engine.n_threads()}};
}

// A field of RFC 4180.
std::string Csv(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"') quoted += '"';
    quoted += c;
  }
  return quoted + '"';
}

std::string MarkdownCell(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '|') out += '\\';
    out += c;
  }
  return out;
}

// Prints the rows as they come, JSON when all are there.
class Printer {
 public:
  Printer(const std::string& format, const Engine& engine) : format_(format), engine_(engine) {
    if (format_ == "md")
      fmt::print(
          "| model | size MiB | threads | plan | K/V MiB | test | t/s | median |\n"
          "|---|---:|---:|---|---:|---:|---:|---:|\n");
    if (format_ == "csv") fmt::print("model,threads,plan,test,n,depth,tps,tps_stddev,tps_median,kv_bytes\n");
    std::fflush(stdout);
  }

  void Add(const BenchRow& row) {
    const SpeedResult& r = row.result;
    const HyperParams& hp = engine_.model().hparams();
    const std::string& name = hp.name.empty() ? engine_.model().path() : hp.name;
    if (format_ == "md") {
      fmt::print("| {} | {:.2f} | {} | {} | {:.2f} | {} | {:.2f} ± {:.2f} | {:.2f} |\n", MarkdownCell(name),
                 MiB(engine_.model().file_bytes()), engine_.n_threads(), MarkdownCell(row.plan),
                 MiB(r.kv_bytes), TestName(r.run), r.mean(), r.stddev(), r.median());
    } else if (format_ == "csv") {
      fmt::print("{},{},{},{},{},{},{},{},{},{}\n", Csv(engine_.model().path()), engine_.n_threads(),
                 Csv(row.plan), ShortName(r.run.test), r.run.n, r.run.depth, r.mean(), r.stddev(), r.median(),
                 r.kv_bytes);
    } else {
      json_.push_back(Json(row, engine_));
    }
    std::fflush(stdout);
  }

  void Finish() {
    if (format_ == "json") fmt::print("{}\n", json_.dump(2));
  }

 private:
  const std::string& format_;
  const Engine& engine_;
  nlohmann::ordered_json json_ = nlohmann::ordered_json::array();
};

std::vector<SpeedRun> Runs(const BenchFlags& flags) {
  std::vector<SpeedRun> runs;
  for (const int64_t depth : flags.depth) {
    for (const int64_t n : flags.prompt)
      if (n > 0) runs.push_back({SpeedTest::kPrompt, n, depth});
    for (const int64_t n : flags.generate)
      if (n > 0) runs.push_back({SpeedTest::kGenerate, n, depth});
  }
  return runs;
}

Expected<void> Run(const BenchFlags& flags) {
  MOEND_ASSIGN(const auto engine, flags.model.Load());
  const std::vector<SpeedRun> runs = Runs(flags);
  int64_t longest = 1;
  for (const SpeedRun& run : runs) longest = std::max(longest, run.depth + run.n);
  // Every plan is read before the first measurement, which may take long.
  std::vector<Plan> plans;
  for (const std::string& name : flags.plans) {
    PlanFlags plan;
    if (name != "full") plan.plan = name;
    MOEND_ASSIGN(Plan made, plan.Make(*engine, longest));
    plans.push_back(std::move(made));
  }

  const Interrupt interrupt;
  SpeedOptions options = flags.options;
  options.warm_up = !flags.no_warm_up;
  options.go_on = [] { return !Interrupt::requested(); };
  Printer printer(flags.format, *engine);
  for (std::size_t i = 0; i < plans.size(); ++i) {
    auto done = MeasureSpeed(engine, plans[i], runs, options, [&](const SpeedResult& r) {
      printer.Add({flags.plans[i], r});
    });
    if (!done && done.error().code == ErrorCode::kCancelled)
      return Fail(ErrorCode::kCancelled, "interrupted");
    if (!done) return done;
  }
  printer.Finish();
  return {};
}

}  // namespace

void AddBench(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("bench", "Tokens a second of reading and generating");
  auto flags = std::make_shared<BenchFlags>();
  BenchFlags& f = *flags;
  f.model.AddTo(*command);
  const auto list = [&](const char* names, std::vector<int64_t>& values, const char* text) {
    command->add_option(names, values, text)
        ->delimiter(',')
        ->allow_extra_args(false)
        ->default_str(fmt::format("{}", values[0]))
        ->check(CLI::Range(int64_t{0}, kMostTokens))
        ->type_name("N,..");
  };
  list("-p,--n-prompt", f.prompt, "read so many tokens; 0: no such test");
  list("-n,--n-gen", f.generate, "generate so many tokens; 0: no such test");
  list("-d,--n-depth", f.depth, "with so many tokens in the context before");
  command->add_option("--plan", f.plans, "plans to measure, files of 'moend solve' or full")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->default_str("full")
      ->type_name("PLAN,..");
  command->add_option("-r,--repetitions", f.options.repetitions, "runs of each test")
      ->capture_default_str()
      ->check(CLI::Range(1, 1000000))
      ->type_name("N");
  command->add_option("-o,--output", f.format, "format")
      ->capture_default_str()
      ->check(CLI::IsMember({"md", "csv", "json"}))
      ->type_name("NAME");
  command->add_flag("--no-warmup", f.no_warm_up, "no run before those that count");
  command->footer(kBenchFooter);
  command->callback([flags, &exit_code] {
    if (Runs(*flags).empty()) throw CLI::ValidationError("there is nothing to measure: -p and -n are 0");
    exit_code = ExitCode(Run(*flags));
  });
}

}  // namespace moend::cli
