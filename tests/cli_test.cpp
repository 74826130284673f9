// The program as a user meets it: exit codes, what goes to stdout and what to stderr, and words for
// everything that can be wrong.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <csignal>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moend/model/device.h"
#include "moend/model/model.h"
#include "moend/plan/plan.h"
#include "tests/support/process.h"
#include "tests/support/test_model.h"

namespace moend {
namespace {

using test::Contains;
using test::Moend;
using test::ProcessOptions;
using test::ProcessResult;
using test::ReadAll;
using test::TemporaryFolder;

const std::string kModel = MOEND_SOURCE_DIR "/models/moend-reference-23m-q8_0.gguf";
const std::string kDoor =
    "The access code of the red door is 12345.\nQuestion: What is the access code of the red door?\nAnswer:";

// Ends with `code`, nothing on stdout, "moend: error: " and all of `words` on stderr.
void ExpectError(const ProcessResult& result, int code, const std::vector<std::string>& words) {
  EXPECT_EQ(result.code, code) << result.err;
  EXPECT_EQ(result.out, "");
  EXPECT_TRUE(Contains(result.err, "moend: error: ")) << result.err;
  for (const std::string& w : words) EXPECT_TRUE(Contains(result.err, w)) << w << "\nnot in: " << result.err;
}

Fingerprint ReferenceFingerprint() {
  static const Fingerprint fingerprint = [] {
    LoadOptions options;
    options.vocabulary = false;
    const auto model = Model::Load(kModel, options);
    if (!model) return Fingerprint();
    const HyperParams& hp = (*model)->hparams();
    return Fingerprint{
        hp.architecture_name, hp.name, hp.n_layers, {hp.n_kv_heads, hp.head_size}, (*model)->hash()};
  }();
  return fingerprint;
}

// A finished profile in which later layers are harder and fewer bits cost more.
Profile MadeProfile() {
  Profile p;
  p.model = ReferenceFingerprint();
  p.length = 4096;
  p.evaluated = 64;
  p.chunks = p.chunks_wanted = 1;
  p.experts = {{0.1, 4, 2}, {0.25, 4, 2}, {0.5, 4, 4}, {1.0, 8, 8}, {1.0, 16, 16}};
  for (int64_t l = 0; l < p.model.n_layers; ++l) {
    std::vector<ProfileCell> row;
    for (std::size_t e = 0; e < p.experts.size(); ++e) {
      const double loss = static_cast<double>(l + 1) * 0.01 * static_cast<double>(p.experts.size() - 1 - e);
      row.push_back({loss, loss * 2});
    }
    p.cells.push_back(std::move(row));
  }
  return p;
}

TEST(Usage, WrongUsageIsExitCodeTwo) {
  const std::vector<std::vector<std::string>> wrong = {
      {"frobnicate"},
      {"--frobnicate"},
      {"run"},
      {"run", "-m", kModel},
      {"run", "-m", kModel, "-p", "a", "-f", "b"},
      {"run", "-m", kModel, "-p", "a", "-n", "many"},
      {"run", "-m", kModel, "-p", "a", "-n", "-7"},
      {"run", "-m", kModel, "-p", "a", "--no-such-flag"},
      {"run", "-m", kModel, "-p", "a", "--temp", "nan"},
      {"run", "-m", kModel, "-p", "a", "--temp", "-1"},
      {"run", "-m", kModel, "-p", "a", "--temp", "inf"},
      {"run", "-m", kModel, "-p", "a", "--temp", "1x"},
      {"run", "-m", kModel, "-p", "a", "--top-p", "2"},
      {"run", "-m", kModel, "-p", "a", "--top-p", "nan"},
      {"run", "-m", kModel, "-p", "a", "--min-p", "5"},
      {"run", "-m", kModel, "-p", "a", "--top-k", "-2"},
      {"run", "-m", kModel, "-p", "a", "--compression", "4"},
      {"run", "-m", kModel, "-p", "a", "--profile", "x"},
      {"run", "-m", kModel, "-p", "a", "--plan", "x", "--profile", "y", "--compression", "4"},
      {"run", "-m", kModel, "-p", "a", "--scorer", "magic"},
      {"run", "-m", kModel, "-p", "a", "-ngl", "-2"},
      {"calibrate", "-m", kModel},
      {"calibrate", "-m", kModel, "-f", "x"},
      {"solve"},
      {"solve", "x"},
      {"solve", "x", "--compression", "0"},
      {"solve", "x", "--compression", "4", "--budget-mib", "3"},
      {"solve", "x", "--compression", "4", "--solver", "magic"},
      {"inspect"},
      {"ask", "-m", kModel, "-f", "x"},
  };
  for (const auto& arguments : wrong) {
    std::string shown;
    for (const auto& a : arguments) shown += a + " ";
    SCOPED_TRACE(shown);
    ExpectError(Moend(arguments), 2, {"See 'moend "});
  }
  const ProcessResult nothing = Moend({});
  EXPECT_EQ(nothing.code, 2);
  EXPECT_EQ(nothing.out, "");
  EXPECT_TRUE(Contains(nothing.err, "calibrate"));
}

TEST(Usage, HelpGoesToStdout) {
  const ProcessResult all = Moend({"--help"});
  EXPECT_EQ(all.code, 0);
  EXPECT_EQ(all.err, "");
  for (const char* command : {"run", "calibrate", "solve", "inspect", "ask"}) {
    EXPECT_TRUE(Contains(all.out, std::string("\n  ") + command + " ")) << command;
    for (const char* flag : {"-h", "--help"}) {
      const ProcessResult help = Moend({command, flag});
      EXPECT_EQ(help.code, 0);
      EXPECT_EQ(help.err, "");
      EXPECT_TRUE(Contains(help.out, std::string("Usage: moend ") + command)) << help.out;
      EXPECT_TRUE(Contains(help.out, "Example")) << help.out;
    }
  }
  const ProcessResult version = Moend({"--version"});
  EXPECT_EQ(version.code, 0);
  EXPECT_TRUE(version.out.starts_with("moend ")) << version.out;
  EXPECT_NE(version.out.find("CUDA"), std::string::npos) << version.out;
}

TEST(Run, TextToStdoutFiguresToStderr) {
  const ProcessResult r = Moend({"run", "-m", kModel, "-p", kDoor, "-n", "16", "--temp", "0"});
  EXPECT_EQ(r.code, 0) << r.err;
  EXPECT_EQ(r.out, " 12345\n");
  EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
  for (const char* part : {"prompt tokens", "generated", "K/V", "MiB at 16 bit", "prefill", "decode"})
    EXPECT_TRUE(Contains(r.err, part)) << part << " not in " << r.err;
}

// As a command line for a machine with a GPU has it.
TEST(Run, WithoutAGpuTheCpuRunsAllLayers) {
  const std::vector<Device> devices = ListDevices();
  if (devices.front().gpu) GTEST_SKIP() << devices.front().name << " is here";
  const ProcessResult r = Moend({"run", "-m", kModel, "-p", "The", "-n", "2", "-ngl", "99"});
  EXPECT_EQ(r.code, 0);
  EXPECT_TRUE(Contains(r.err, "no GPU")) << r.err;
  const ProcessResult listed = Moend({"devices"});
  EXPECT_EQ(listed.code, 0);
  EXPECT_TRUE(Contains(listed.out, "CPU ")) << listed.out;
  ExpectError(Moend({"run", "-m", kModel, "-p", "The", "-n", "2", "--device", "CUDA9"}), 1,
              {"CUDA9", "there are CPU, and none"});
}

TEST(Run, JsonIsOneObject) {
  const ProcessResult r = Moend({"run", "-m", kModel, "-p", kDoor, "-n", "3", "--temp", "0", "--json"});
  ASSERT_EQ(r.code, 0) << r.err;
  const auto j = nlohmann::json::parse(r.out, nullptr, false);
  ASSERT_TRUE(j.is_object()) << r.out;
  EXPECT_TRUE(j["text"].is_string());
  EXPECT_EQ(j["generated_tokens"], 3);
  const int64_t tokens = j["prompt_tokens"].get<int64_t>() + 3;
  const auto& kv = j["kv"];
  EXPECT_EQ(kv["bytes_full"], tokens * 6144);
  EXPECT_GE(kv["peak_bytes"].get<int64_t>(), kv["bytes"].get<int64_t>());
  EXPECT_NEAR(kv["compression"].get<double>(), kv["bytes_full"].get<double>() / kv["bytes"].get<double>(),
              1e-9);
  ASSERT_EQ(kv["layers"].size(), 12u);
  int64_t sum = 0;
  for (const auto& layer : kv["layers"]) {
    EXPECT_EQ(layer["keep"], 1.0);
    EXPECT_EQ(layer["k_bits"], 16);
    EXPECT_EQ(layer["v_bits"], 16);
    EXPECT_EQ(layer["tokens"], tokens);
    sum += layer["bytes"].get<int64_t>();
  }
  EXPECT_EQ(kv["bytes"], sum);
  EXPECT_GT(j["speed"]["prefill_tps"].get<double>(), 0);
  EXPECT_GT(j["speed"]["decode_tps"].get<double>(), 0);
  EXPECT_GT(j["rss_peak_bytes"].get<int64_t>(), 1 << 20);
}

TEST(Run, ThePromptFromAFileOrStdinIsTheSame) {
  const TemporaryFolder folder;
  const std::string file = folder.Write("prompt.txt", kDoor + "\n");  // the last newline is no part of it
  ProcessOptions options;
  options.input = kDoor + "\n";
  const std::vector<std::string> common = {"run", "-m", kModel, "-n", "16", "--temp", "0"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), common.begin(), common.end());
    return more;
  };
  EXPECT_EQ(Moend(with({"-f", file})).out, " 12345\n");
  EXPECT_EQ(Moend(with({"-f", "-"}), options).out, " 12345\n");
  std::string escaped = kDoor;
  for (std::size_t at; (at = escaped.find('\n')) != std::string::npos;) escaped.replace(at, 1, "\\n");
  EXPECT_EQ(Moend(with({"-e", "-p", escaped})).out, " 12345\n");
}

TEST(Run, FlagsComeFromTheEnvironmentToo) {
  ProcessOptions options;
  options.environment = {{"MOEND_ARG_MODEL", kModel}, {"MOEND_ARG_PREDICT", "2"}, {"MOEND_ARG_JSON", "true"}};
  const ProcessResult r = Moend({"run", "-p", kDoor}, options);
  ASSERT_EQ(r.code, 0) << r.err;
  EXPECT_TRUE(Contains(r.out, "\"generated_tokens\":2")) << r.out;
}

TEST(Run, TheSeedDecidesTheText) {
  const auto text = [](const std::string& seed) {
    return Moend({"run", "-m", kModel, "-p", "Once upon a time", "-n", "12", "-s", seed}).out;
  };
  EXPECT_EQ(text("1"), text("1"));
  EXPECT_NE(text("1"), text("2"));
}

TEST(Run, TextKeepsToItsForm) {
  const TemporaryFolder folder;
  const std::string schema =
      R"({"type":"object","properties":{"b":{"enum":["x","y"]},"a":{"type":"boolean"}},"required":["b","a"],"additionalProperties":false})";
  const auto fits = [](const ProcessResult& r) {
    EXPECT_EQ(r.code, 0) << r.err;
    const auto j = nlohmann::ordered_json::parse(r.out, nullptr, false);
    ASSERT_TRUE(j.is_object()) << r.out;
    EXPECT_EQ(j.begin().key(), "b");
    EXPECT_TRUE((j["b"] == "x" || j["b"] == "y") && j["a"].is_boolean()) << r.out;
  };
  fits(Moend({"run", "-m", kModel, "-p", kDoor, "-j", schema}));
  fits(Moend({"run", "-m", kModel, "-p", kDoor, "--json-schema-file", folder.Write("s.json", schema),
              "--ignore-eos"}));
  const auto twice = Moend({"run", "-m", kModel, "-p", kDoor, "--grammar", "root ::= (\"ab\" \"\\n\"){2}"});
  EXPECT_EQ(twice.out, "ab\nab\n") << twice.err;
  // Before anything is read.
  ExpectError(Moend({"run", "-m", kModel, "-p", kDoor, "-j", R"({"not":{}})"}), 1, {"\"not\""});
  ExpectError(Moend({"run", "-m", kModel, "-p", kDoor, "-j", "{"}), 1, {"JSON"});
  ExpectError(Moend({"run", "-m", kModel, "-p", kDoor, "--grammar", "root ::= a"}), 1, {"'a'"});
  ExpectError(Moend({"run", "-m", kModel, "-p", kDoor, "--grammar-file", folder.path("none")}), 1, {"none"});
  for (const char* flag : {"--grammar-file", "--json-schema-file"})
    EXPECT_EQ(Moend({"run", "-m", kModel, "-p", kDoor, flag, folder.Write("empty", "")}).code, 1) << flag;
  ExpectError(Moend({"run", "-m", kModel, "-p", kDoor, "--grammar", "root ::= \"a\"", "-j", "{}"}), 2,
              {"--json-schema"});
}

TEST(Run, CtrlCEndsTheTextAndStillReports) {
  ProcessOptions options;
  options.signal = SIGINT;
  options.when = " ";
  const ProcessResult r = Moend({"run", "-m", kModel, "-p", "Once upon a time", "--ignore-eos"}, options);
  EXPECT_EQ(r.code, 130) << r.err;
  EXPECT_FALSE(r.out.empty());
  EXPECT_TRUE(Contains(r.err, "prompt tokens")) << r.err;
  EXPECT_TRUE(Contains(r.err, "interrupted")) << r.err;
}

TEST(Run, AFullDiskIsAFailure) {
  ProcessOptions options;
  options.stdout_path = "/dev/full";
  const ProcessResult r = Moend({"run", "-m", kModel, "-p", kDoor, "-n", "2", "--json"}, options);
  EXPECT_EQ(r.code, 1);
  EXPECT_TRUE(Contains(r.err, "moend: error: ")) << r.err;
}

TEST(Chat, ReadsEachTurnOnce) {
  const TemporaryFolder folder;
  const std::string model = folder.path("chat.gguf");
  test::TestModelOptions options;
  options.chat_template = true;
  ASSERT_TRUE(test::WriteTestModel(options, model));
  ProcessOptions conversation;
  conversation.input = "Hello there\n\nAnd again\n";
  const std::vector<std::string> common = {"run", "-m", model, "--chat", "-n", "4", "--temp", "0"};
  const ProcessResult both = Moend(common, conversation);
  ASSERT_EQ(both.code, 0) << both.err;
  EXPECT_FALSE(both.out.empty());
  conversation.input = "Hello there\n";
  const ProcessResult first = Moend(common, conversation);
  ASSERT_EQ(first.code, 0) << first.err;
  EXPECT_TRUE(both.out.starts_with(first.out)) << both.out << first.out;
  // The second turn reads its own message and the template around it, not the first turn again.
  const int64_t first_read = std::stoll(first.err.substr(first.err.find(':') + 1));
  const int64_t both_read = std::stoll(both.err.substr(both.err.find(':') + 1));
  EXPECT_GT(both_read, first_read);
  EXPECT_LT(both_read, 2 * first_read + 20);
  std::vector<std::string> one = common;
  one.insert(one.end(), {"-p", "Hello there", "--json"});
  const ProcessResult single = Moend(one);
  ASSERT_EQ(single.code, 0) << single.err;
  const auto j = nlohmann::json::parse(single.out, nullptr, false);
  EXPECT_EQ(j["prompt_tokens"], first_read);
  EXPECT_EQ(j["text"].get<std::string>() + "\n", first.out);
  ExpectError(Moend({"run", "-m", kModel, "--chat", "-p", "Hello"}), 1, {"chat template"});
  ExpectError(Moend({"run", "-m", kModel, "--chat"}, conversation), 1, {"chat template"});
}

// A context that is full loses its oldest turns, not the conversation; the system message stays.
TEST(Chat, DropsOldTurnsWhenTheContextIsFull) {
  const TemporaryFolder folder;
  const std::string model = folder.path("chat.gguf");
  test::TestModelOptions options;
  options.chat_template = true;
  ASSERT_TRUE(test::WriteTestModel(options, model));
  ProcessOptions conversation;
  for (int turn = 0; turn < 8; ++turn) conversation.input += fmt::format("This is message number {}\n", turn);
  std::vector<std::string> command = {"run", "-m",     model, "--chat",          "-n",
                                      "12",  "--temp", "0",   "--system-prompt", "Be brief"};
  command.insert(command.end(), {"-c", "200", "--ignore-eos"});
  const ProcessResult all = Moend(command, conversation);
  EXPECT_EQ(all.code, 0) << all.err;
  EXPECT_TRUE(Contains(all.err, "the context of 200 tokens is full: the oldest ")) << all.err;
  EXPECT_GE(std::count(all.out.begin(), all.out.end(), '\n'), 8) << "every message is answered: " << all.out;
  EXPECT_FALSE(Contains(all.err, "moend: error")) << all.err;
  // An answer that fills the context ends there, and the conversation goes on.
  conversation.input = "Hello\nHello\n";
  command = {"run", "-m", model, "--chat", "--temp", "0", "--ignore-eos", "-c", "100"};
  const ProcessResult full = Moend(command, conversation);
  EXPECT_EQ(full.code, 0) << full.err;
  EXPECT_TRUE(Contains(full.err, "the answer ends where the context of 100 tokens is full")) << full.err;
  EXPECT_TRUE(Contains(full.err, "the oldest turn is dropped")) << full.err;
  // A message that does not fit alone is refused, the next one is answered.
  conversation.input = std::string(300, 'x') + "\nHello\n";
  const ProcessResult large = Moend(command, conversation);
  EXPECT_EQ(large.code, 0) << large.err;
  EXPECT_TRUE(Contains(large.err, "this message takes ")) << large.err;
  EXPECT_FALSE(large.out.empty());
}

// A pipe where a model is meant is refused, not waited for.
TEST(BadInput, InspectDoesNotWaitForAPipe) {
  const TemporaryFolder folder;
  const std::string pipe = folder.path("pipe");
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  ExpectError(Moend({"inspect", pipe}), 1, {pipe, "not a regular file"});
  ExpectError(Moend({"run", "-m", pipe, "-p", "a"}), 1, {pipe, "not a regular file"});
}

TEST(BadInput, Models) {
  const TemporaryFolder folder;
  const std::string good = ReadAll(kModel);
  ASSERT_GT(good.size(), 1000000u);
  const auto run = [](const std::string& path) { return Moend({"run", "-m", path, "-p", "a", "-n", "1"}); };
  ExpectError(run(folder.path("missing.gguf")), 1, {"missing.gguf"});
  ExpectError(run(folder.path("")), 1, {});
  ExpectError(run(folder.Write("empty.gguf", "")), 1, {"empty.gguf"});
  ExpectError(run(folder.Write("text.gguf", "This is no model, but a letter.")), 1, {"text.gguf", "GGUF"});
  for (const std::size_t size :
       {std::size_t{3}, std::size_t{20}, std::size_t{5000}, good.size() / 2, good.size() - 1}) {
    SCOPED_TRACE(size);
    ExpectError(run(folder.Write("cut.gguf", good.substr(0, size))), 1, {"cut.gguf"});
  }
  // Every bit of the version and the two counts that follow the magic.
  for (std::size_t bit = 4 * 8; bit < 24 * 8; bit += 7) {
    SCOPED_TRACE(bit);
    std::string flipped = good.substr(0, 2000000);
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
    ExpectError(run(folder.Write("flipped.gguf", flipped)), 1, {"flipped.gguf"});
  }
}

TEST(BadInput, PlansAndProfilesOfOthers) {
  const TemporaryFolder folder;
  Plan plan = FullPlan(ReferenceFingerprint(), 1024);
  plan.model.hash = "0123456789abcdef";
  const std::string foreign = folder.Write("foreign.json", ToJson(plan));
  ExpectError(Moend({"run", "-m", kModel, "-p", "a", "--plan", foreign}), 1,
              {"foreign.json", "0123456789abcdef"});
  Profile profile = MadeProfile();
  profile.model.hash = "0123456789abcdef";
  const std::string other = folder.Write("other.json", ToJson(profile));
  ExpectError(Moend({"run", "-m", kModel, "-p", "a", "--profile", other, "--compression", "2"}), 1,
              {"other.json"});
  // Another schema version, broken JSON, another kind of file.
  std::string later = ToJson(FullPlan(ReferenceFingerprint(), 1024));
  later.replace(later.find("\"schema\": 1"), 11, "\"schema\": 9");
  ExpectError(Moend({"run", "-m", kModel, "-p", "a", "--plan", folder.Write("later.json", later)}), 1,
              {"later.json", "9"});
  ExpectError(
      Moend({"run", "-m", kModel, "-p", "a", "--plan", folder.Write("cut.json", later.substr(0, 90))}), 1,
      {"cut.json"});
  ExpectError(Moend({"solve", foreign, "--compression", "2"}), 1, {"foreign.json", "plan"});
  ExpectError(Moend({"inspect", folder.Write("odd.json", "{\"moend\": \"cake\", \"schema\": 1}")}), 1,
              {"cake"});
  ExpectError(Moend({"inspect", folder.Write("plain.json", "{}")}), 1, {"plain.json"});
}

TEST(BadInput, APromptLongerThanTheContext) {
  ExpectError(Moend({"run", "-m", kModel, "-p", kDoor, "-c", "8"}), 1, {" tokens", "8"});
  // More than the model was trained for runs, with a warning.
  const auto beyond = Moend({"run", "-m", kModel, "-p", kDoor, "-c", "99999", "-n", "1"});
  EXPECT_EQ(beyond.code, 0) << beyond.err;
  EXPECT_TRUE(Contains(beyond.err, "99999") && Contains(beyond.err, "16384")) << beyond.err;
  std::string word;
  for (int i = 0; i < 17000; ++i) word += " 7";
  const TemporaryFolder folder;
  ExpectError(Moend({"run", "-m", kModel, "-f", folder.Write("long.txt", word)}), 1, {"16384"});
}

TEST(BadInput, OutputsAreCheckedBeforeTheWork) {
  const TemporaryFolder folder;
  const std::string nowhere = folder.path("no/such/folder/out.json");
  const std::string text = folder.Write("text.txt", "Some text.");
  ExpectError(Moend({"calibrate", "-m", kModel, "-f", text, "-o", nowhere}), 1, {nowhere});
  const std::string profile = folder.Write("profile.json", ToJson(MadeProfile()));
  ExpectError(Moend({"solve", profile, "--compression", "4", "-o", nowhere}), 1, {nowhere});
  ExpectError(Moend({"calibrate", "-m", kModel, "-f", text, "-o", folder.path("new.json")}), 1,
              {"too short"});
  EXPECT_EQ(ReadAll(folder.path("new.json")), "");
}

TEST(Solve, MeetsTheBudgetAndSaysWhatItCosts) {
  const TemporaryFolder folder;
  const std::string profile = folder.Write("profile.json", ToJson(MadeProfile()));
  const std::string output = folder.path("plan.json");
  const ProcessResult r = Moend({"solve", profile, "--compression", "8", "-c", "8192", "-o", output});
  ASSERT_EQ(r.code, 0) << r.err;
  EXPECT_TRUE(Contains(r.out, "predicted loss")) << r.out;
  EXPECT_TRUE(Contains(r.out, " ms")) << r.out;
  const auto plan = LoadPlan(output);
  ASSERT_TRUE(plan) << plan.error().message;
  EXPECT_EQ(plan->context_length, 8192);
  EXPECT_LE(plan->bytes * 8, FullBytes(plan->model, 8192));
  ExpectError(Moend({"solve", profile, "--budget-mib", "0.01"}), 1, {"smallest"});
  ExpectError(Moend({"solve", profile, "--compression", "5000"}), 1, {"smallest"});
  const ProcessResult shown = Moend({"inspect", output});
  EXPECT_EQ(shown.code, 0) << shown.err;
  EXPECT_FALSE(shown.out.empty());
}

TEST(Solve, AProfileCanBeSolvedForThePromptAtHand) {
  const TemporaryFolder folder;
  const std::string profile = folder.Write("profile.json", ToJson(MadeProfile()));
  std::string text;
  while (text.size() < 3000) text += kDoor + " 12345\n";
  const std::string prompt = folder.Write("prompt.txt", text);
  const ProcessResult r = Moend(
      {"run", "-m", kModel, "-f", prompt, "-n", "1", "--profile", profile, "--compression", "4", "--json"});
  ASSERT_EQ(r.code, 0) << r.err;
  const auto j = nlohmann::json::parse(r.out, nullptr, false);
  EXPECT_GE(j["kv"]["compression"].get<double>(), 4.0) << r.out;
}

TEST(Solve, APromptTooShortForTheRatioIsAnsweredNonetheless) {
  const TemporaryFolder folder;
  const std::string profile = folder.Write("profile.json", ToJson(MadeProfile()));
  const ProcessResult r =
      Moend({"run", "-m", kModel, "-p", "a", "-n", "1", "--profile", profile, "--compression", "14"});
  EXPECT_EQ(r.code, 0) << r.err;
  EXPECT_TRUE(Contains(r.err, "too few to be 14x smaller")) << r.err;
  // What no length allows stays an error, and so does a budget in bytes.
  ExpectError(Moend({"run", "-m", kModel, "-p", "a", "--profile", profile, "--compression", "5000"}), 1,
              {"smallest"});
  ExpectError(Moend({"run", "-m", kModel, "-p", "a", "--profile", profile, "--budget-mib", "0.01"}), 1,
              {"smallest"});
}

TEST(Calibrate, SavesResumesAndExplains) {
  const TemporaryFolder folder;
  const std::string output = folder.path("profile.json");
  const std::string text =
      folder.Write("text.txt", ReadAll(MOEND_SOURCE_DIR "/models/suite/heldout.txt").substr(0, 40000));
  const std::vector<std::string> command = {
      "calibrate", "-m", kModel,        "-f", text,     "-o",    output,   "-c",    "256",
      "--chunks",  "5",  "--evaluated", "32", "--keep", "0.5,1", "--bits", "4/2,16"};
  ProcessOptions interrupt;
  interrupt.signal = SIGINT;
  interrupt.when = "chunk 1 of 5 saved";
  const ProcessResult first = Moend(command, interrupt);
  EXPECT_EQ(first.code, 130) << first.err;
  EXPECT_EQ(first.out, "");
  EXPECT_TRUE(Contains(first.err, "interrupted")) << first.err;
  auto profile = LoadProfile(output);
  ASSERT_TRUE(profile) << profile.error().message;
  EXPECT_GE(profile->chunks, 1);
  EXPECT_LT(profile->chunks, 5);

  const ProcessResult second = Moend(command);
  ASSERT_EQ(second.code, 0) << second.err;
  EXPECT_TRUE(Contains(second.err, "going on with")) << second.err;
  EXPECT_FALSE(second.out.empty());
  profile = LoadProfile(output);
  ASSERT_TRUE(profile) << profile.error().message;
  EXPECT_EQ(profile->chunks, 5);
  ASSERT_EQ(profile->experts.size(), 4u);
  for (const auto& row : profile->cells) {
    EXPECT_GT(row[1].l2, 0);          // keep 0.5
    EXPECT_GT(row[0].l2, row[1].l2);  // the same at K 4 bit, V 2 bit
    EXPECT_GT(row[2].l2, 0);          // these bits, every token
    EXPECT_EQ(row.back().kl, 0);      // nothing compressed
  }
  const ProcessResult third = Moend(command);
  EXPECT_EQ(third.code, 0) << third.err;
  EXPECT_TRUE(Contains(third.err, "already")) << third.err;
  EXPECT_EQ(third.out, second.out);
  const ProcessResult shown = Moend({"inspect", output});
  EXPECT_EQ(shown.out, second.out);

  // With other options it is another profile, and the finished one is kept.
  std::vector<std::string> other = command;
  other.insert(other.end(), {"--scorer", "streaming"});
  const std::string before = ReadAll(output);
  ExpectError(Moend(other), 1, {"scorer"});
  EXPECT_EQ(ReadAll(output), before);
}

TEST(Inspect, AModel) {
  const ProcessResult r = Moend({"inspect", kModel});
  EXPECT_EQ(r.code, 0) << r.err;
  const std::string hash = ReferenceFingerprint().hash;
  for (const char* part : {"llama", "16384", "6144 bytes a token", "14x", hash.c_str()})
    EXPECT_TRUE(Contains(r.out, part)) << part << " not in " << r.out;
}

TEST(Ask, EachQuestionSeesTheSameContext) {
  const TemporaryFolder folder;
  const std::string context = folder.Write("context.txt",
                                           "The access code of the red door is 12345.\n"
                                           "Variable A100 is set to 77777.\n"
                                           "The access code of the tall mill is 54321.\n");
  const std::string questions = folder.Write(
      "questions.jsonl",
      "{\"question\": \"What is the access code of the red door?\", \"answers\": [\"12345\"]}\n\n"
      "{\"question\": \"What is the access code of the tall mill?\", \"answers\": [\"54321\"]}\n"
      "{\"question\": \"What is the access code of the red door?\", \"answers\": [\"99999\"]}\n");
  const std::string plan = folder.Write("plan.json", ToJson(FullPlan(ReferenceFingerprint(), 1024)));
  const ProcessResult r =
      Moend({"ask", "-m", kModel, "-f", context, "--questions", questions, "--plan", "full", "--plan", plan});
  ASSERT_EQ(r.code, 0) << r.err;
  EXPECT_TRUE(Contains(r.out, "2 of 3")) << r.out;
  EXPECT_TRUE(Contains(r.out, "before the questions")) << r.out;
  EXPECT_TRUE(Contains(r.out, "\u2717 12345")) << r.out;
  const ProcessResult one =
      Moend({"ask", "-m", kModel, "-f", context, "-q", "What is the access code of the tall mill?"});
  EXPECT_TRUE(Contains(one.out, "54321")) << one.out << one.err;
  const std::string bad = folder.Write("bad.jsonl", "{\"question\": \"a\"}\n{\"answers\": []}\n");
  ExpectError(Moend({"ask", "-m", kModel, "-f", context, "--questions", bad}), 1, {"bad.jsonl:2"});
}

}  // namespace
}  // namespace moend
