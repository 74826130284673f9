// moend serve as its operator meets it: how it starts, ends, and what it says to wrong flags.
#include <gtest/gtest.h>

#include <sys/stat.h>

#include <algorithm>
#include <cctype>
#include <csignal>
#include <filesystem>

#include "tests/support/process.h"
#include "tests/support/serve_client.h"
#include "tests/support/test_model.h"

namespace moend {
namespace {

using test::Contains;
using test::ProcessOptions;
using test::ProcessResult;
using test::TemporaryFolder;

struct SmallModel {
  test::TempDir dir;
  std::string path = dir / "small.gguf";
  SmallModel() { EXPECT_TRUE(test::WriteTestModel({}, path)); }
};

ProcessResult Serve(std::vector<std::string> arguments, ProcessOptions options = {}) {
  arguments.insert(arguments.begin(), "serve");
  if (std::ranges::find(arguments, "--port") == arguments.end())
    arguments.insert(arguments.end(), {"--port", "0"});
  options.environment.emplace_back("MOEND_ARG_THREADS", "1");
  return test::RunProcess(MOEND_BINARY, arguments, options);
}

// Starts, waits until it is ready, and sends SIGTERM.
ProcessResult StartAndStop(const std::vector<std::string>& arguments) {
  ProcessOptions options;
  options.signal = SIGTERM;
  options.when = "ready: ";
  return Serve(arguments, options);
}

void ExpectServeError(const ProcessResult& result, int code, const std::vector<std::string>& words) {
  EXPECT_EQ(result.code, code) << result.err;
  EXPECT_EQ(result.out, "");
  for (const std::string& w : words) EXPECT_TRUE(Contains(result.err, w)) << w << "\nnot in: " << result.err;
}

TEST(ServeCommand, StartsAndEndsWithZeroAfterSigterm) {
  const SmallModel model;
  const auto r = StartAndStop({"-m", model.path});
  EXPECT_EQ(r.code, 0) << r.err;
  EXPECT_EQ(r.out, "");
  for (const char* words : {"listening on http://127.0.0.1:", "ready: small, plan full", "finishing"})
    EXPECT_TRUE(Contains(r.err, words)) << words << "\nnot in: " << r.err;
}

TEST(ServeCommand, EveryLimitHasAFlag) {
  const SmallModel model;
  const std::vector<std::string> flags = {
      "--max-connections",   "--max-header-bytes",     "--max-headers",
      "--max-body-bytes",    "--max-total-body-bytes", "--max-json-depth",
      "--max-json-values",   "--max-messages",         "--max-stops",
      "--max-stop-bytes",    "--max-logit-bias",       "--max-top-logprobs",
      "--max-prompt-tokens", "--max-tokens",           "--default-max-tokens",
      "--max-queue",         "--max-queue-per-key",    "--max-requests-per-connection",
      "--queue-timeout",     "--header-timeout",       "--body-timeout",
      "--idle-timeout",      "--write-timeout",        "--drain-timeout"};
  std::vector<std::string> all = {"-m", model.path};
  for (const std::string& f : flags) {
    all.insert(all.end(), {f, "1024"});
    ExpectServeError(Serve({"-m", model.path, f, "-1"}), 2, {f});
  }
  const auto r = StartAndStop(all);
  EXPECT_EQ(r.code, 0) << r.err;
}

TEST(ServeCommand, SaysWhatIsWrong) {
  const SmallModel model;
  const TemporaryFolder folder;
  ExpectServeError(Serve({"-m", folder.path("none.gguf")}), 1, {"none.gguf"});
  ExpectServeError(Serve({"-m", folder.Write("text.gguf", "no model")}), 1, {"text.gguf"});
  ExpectServeError(Serve({}), 2, {"--model"});
  ExpectServeError(Serve({"-m", model.path, "-np", "0"}), 2, {"--parallel"});
  ExpectServeError(Serve({"-m", model.path, "--port", "70000"}), 2, {"--port"});
  for (const char* f :
       {"--kv-budget-mib", "--drain-timeout", "--queue-timeout", "--temp", "--top-p", "--min-p"})
    for (const char* value : {"nan", "-1", "inf", "1x"})
      ExpectServeError(Serve({"-m", model.path, f, value}), 2, {f});
  ExpectServeError(Serve({"-m", model.path, "--host", "no.such.host.invalid"}), 1, {"no.such.host.invalid"});
  ExpectServeError(Serve({"-m", model.path, "--api-key-file", folder.Write("empty", "# none\n")}), 1,
                   {"empty", "no API key"});
  ExpectServeError(Serve({"-m", model.path, "--api-key", "two words"}), 1, {"API key 1"});
  ExpectServeError(Serve({"-m", model.path, "--kv-dir", folder.Write("file", "x")}), 1, {"file"});
  ExpectServeError(Serve({"-m", model.path, "--kv-store", "http://host"}), 1, {"K/V store", "redis://"});
  ExpectServeError(Serve({"-m", model.path, "--profile", folder.Write("p.json", "{")}), 2,
                   {"--profile alone is no plan"});
  ExpectServeError(Serve({"-m", model.path, "--profile", folder.path("p.json"), "--compression", "8"}), 1,
                   {"p.json"});
}

// A secret that was not set must not leave the server open, nor a plan that was not set the cache whole.
TEST(ServeCommand, RefusesEmptyValues) {
  const SmallModel model;
  const std::vector<std::string> flags = {
      "--api-key", "--api-key-file", "--plan",   "--profile", "--kv-dir",   "--kv-store", "--host",
      "--alias",   "--cors-origin",  "--scorer", "--port",    "--ctx-size", "--temp"};
  for (const std::string& f : flags) {
    ExpectServeError(Serve({"-m", model.path, f, ""}), 2, {f});
    ExpectServeError(Serve({"-m", model.path, f + "="}), 2, {f, "empty"});  // and not the next word
    std::string name = "MOEND_ARG_" + f.substr(2);
    for (char& c : name) c = c == '-' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
    ProcessOptions options;
    options.environment.emplace_back(name, "");
    ExpectServeError(Serve({"-m", model.path}, options), 2, {name, "empty"});
  }
  ProcessOptions options;
  options.environment.emplace_back("MOEND_ARG_METRICS", "");  // a switch, too
  ExpectServeError(Serve({"-m", model.path}, options), 2, {"MOEND_ARG_METRICS", "empty"});
  ExpectServeError(Serve({"-m", ""}), 2, {"--model"});
}

// Loading may take long, or wait for a file for ever.
TEST(ServeCommand, SignalsEndItBeforeItIsReady) {
  const SmallModel model;
  const TemporaryFolder folder;
  const std::string fifo = folder.path("fifo"), socket = folder.path("sock");
  ASSERT_EQ(mkfifo(fifo.c_str(), 0600), 0);
  for (const int signal : {SIGINT, SIGTERM}) {
    ProcessOptions options;
    options.signal = signal;
    options.when = "listening on unix:" + socket;
    const auto r = Serve({"-m", model.path, "--plan", fifo, "--host", "unix:" + socket}, options);
    EXPECT_EQ(r.code, 128 + signal) << r.err;
    EXPECT_FALSE(Contains(r.err, "ready"));
    EXPECT_FALSE(std::filesystem::exists(socket));
  }
}

TEST(ServeCommand, NamesOriginsAndWarnsOfAll) {
  const SmallModel model;
  ExpectServeError(Serve({"-m", model.path, "--cors-origin", "example.org"}), 1, {"example.org", "origin"});
  const auto all = StartAndStop({"-m", model.path, "--cors-origin", "https://a.example,*"});
  EXPECT_EQ(all.code, 0) << all.err;
  EXPECT_TRUE(Contains(all.err, "warning: every web page")) << all.err;
}

TEST(ServeCommand, APortThatIsTaken) {
  const SmallModel model;
  serve::ServerOptions options;
  options.port = 0;
  serve::Server taken(std::move(options), serve::Log());
  const std::string port = std::to_string(taken.Start().value());
  ExpectServeError(Serve({"-m", model.path, "--port", port}), 1, {"port " + port, "in use"});
}

TEST(ServeCommand, ABudgetThatIsTooSmall) {
  const SmallModel model;
  ExpectServeError(Serve({"-m", model.path, "--kv-budget-mib", "0.001"}), 1,
                   {"--kv-budget-mib 0.001", "shortest request"});
  const auto r = StartAndStop({"-m", model.path, "--kv-budget-mib", "0.5"});
  EXPECT_EQ(r.code, 0) << r.err;
  EXPECT_TRUE(Contains(r.err, "warning: --kv-budget-mib 0.5 holds no context of")) << r.err;
}

}  // namespace
}  // namespace moend
