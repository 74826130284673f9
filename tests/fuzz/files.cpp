// What reads files: models, plans, profiles, caches, sessions, suites.
#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <memory>
#include <sstream>

#include "moend/cache/serialize.h"
#include "moend/engine/engine.h"
#include "moend/engine/session_state.h"
#include "moend/eval/suite.h"
#include "moend/model/gguf.h"
#include "moend/model/model.h"
#include "moend/plan/plan.h"
#include "tests/fuzz/fuzz.h"
#include "tests/support/layer_model.h"
#include "tests/support/seal.h"
#include "tests/support/test_model.h"

namespace moend::fuzz {
namespace {

Outcome RefusedFile(const Error& error) {
  return {.said = error.message};
}

std::string ReadAll(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

struct Folder {
  test::TempDir dir;
  std::string model = dir / "model.gguf", tried = dir / "tried.gguf";
};

std::string SmallModel(const Folder& folder, const test::TestModelOptions& options) {
  return test::WriteTestModel(options, folder.model) ? ReadAll(folder.model) : std::string();
}

test::TestModelOptions Small(const char* architecture) {
  test::TestModelOptions options;
  options.architecture = architecture;
  options.n_layers = 1;
  options.n_embd = 32;
  options.n_heads = 2;
  options.n_kv_heads = 1;
  options.head_size = 16;
  options.n_ff = 32;
  options.n_vocab = test::kLeastVocab;
  options.tied = true;
  return options;
}

Parser ModelParser() {
  const auto folder = std::make_shared<Folder>();
  Parser parser{.name = "model"};
  parser.seeds = {SmallModel(*folder, Small("llama")), SmallModel(*folder, Small("qwen2"))};
  parser.words = {"general.architecture",
                  "llama.block_count",
                  "tokenizer.ggml.tokens",
                  "qwen3",
                  "phi3",
                  "llama.attention.head_count_kv",
                  "llama.rope.scaling.type",
                  "split.count"};
  parser.run = [folder](const std::string& input) -> Outcome {
    const std::span bytes(reinterpret_cast<const uint8_t*>(input.data()), input.size());
    const auto file = GgufFile::Parse(bytes, "file");
    if (!file) return RefusedFile(file.error());
    for (const GgufTensor& tensor : file->tensors()) {
      const auto begin = tensor.data - bytes.data();
      if (begin < 0 || tensor.bytes < 0 || begin + tensor.bytes > std::ssize(input))
        return {.accepted = true, .wrong = "a tensor lies outside of the file"};
    }
    std::ofstream(folder->tried, std::ios::binary) << input;
    const auto model = Model::Load(folder->tried);
    if (!model) return RefusedFile(model.error());
    return {.accepted = true, .said = (*model)->hparams().architecture_name};
  };
  return parser;
}

Fingerprint SomeModel() {
  return {"llama", "tiny \"quoted\" \xc3\xa4", 3, {2, 64}, "0123456789abcdef"};
}

std::shared_ptr<const LearnedScores> SomeScores() {
  LearnedScores learned{3, 2, 5, {}};
  for (int i = 0; i < 30; ++i) learned.weights.push_back(static_cast<float>(i % 7 - 3) / 8);
  return std::make_shared<const LearnedScores>(learned);
}

// Whatever is accepted is written and read again to the same text.
template <class Parse>
std::function<Outcome(const std::string&)> RoundTrip(const Parse& parse) {
  return [parse](const std::string& input) -> Outcome {
    const auto value = parse(input, "file");
    if (!value) return RefusedFile(value.error());
    const std::string text = ToJson(*value);
    const auto again = parse(text, "file");
    if (!again)
      return {.accepted = true, .wrong = "what it accepted and wrote is refused: " + again.error().message};
    if (ToJson(*again) != text)
      return {.accepted = true, .wrong = "what it accepted, wrote and read is another"};
    return {.accepted = true, .said = "read"};
  };
}

Parser PlanParser() {
  Plan plan;
  plan.model = SomeModel();
  plan.context_length = 16384;
  plan.budget_bytes = 1 << 20;
  plan.bytes = 123456;
  plan.layers = {{0.1, 4, 2}, {0.7, 3, 8}, {1.0, 16, 16}};
  plan.predicted = {0.1, 1e-17, 0};
  Plan heads = plan;
  heads.variant = "2d_heads";
  heads.scorer = "learned";
  heads.refit = true;
  heads.learned = SomeScores();
  for (int i = 0; i < 6; ++i) heads.heads.push_back({0.5, 4, 4});
  return {.name = "plan",
          .seeds = {ToJson(plan), ToJson(heads)},
          .words = {"\"heads\"", "\"keep\"", "\"k_bits\"", "\"adaptive_heads\": true", "\"learned\"",
                    "\"windows\": [0, 8, 0]"},
          .run = RoundTrip(ParsePlan)};
}

Parser ProfileParser() {
  Profile profile;
  profile.model = SomeModel();
  profile.length = 4096;
  profile.chunks = profile.chunks_wanted = 2;
  profile.experts = {{0.1, 4, 2}, {1.0, 16, 16}};
  profile.cells.assign(3, {{0.1, 0.2}, {0, 0}});
  Profile heads = profile;
  heads.method = ProfileMethod::kReconstruction;
  heads.head_cells.assign(6, {{0.1, 0.1}, {0, 0}});
  heads.sensitivity.assign(6, {0.5, 0.25});
  heads.probed = 1;
  heads.learned = SomeScores();
  heads.checks = {{8, 0.1, 0.2}, {14, 0.3, 0.4}};
  return {.name = "profile",
          .seeds = {ToJson(profile), ToJson(heads)},
          .words = {"\"kl\"", "\"l2\"", "\"checks\"", "\"sensitivity\"", "\"queries\""},
          .run = RoundTrip(ParseProfile)};
}

Parser CacheParser() {
  Parser parser{.name = "cache"};
  for (const auto& [keep, bits] : {std::pair{0.5, 4}, {1.0, 16}, {0.3, 2}}) {
    LayerCache cache =
        test::MakeCache(std::make_shared<Ledger>(), {1, 16}, {keep, bits, bits}, {4, 28}, true);
    test::Append(cache, 150);
    parser.seeds.push_back(*SerializeCache(cache));
  }
  parser.seal = test::Seal;
  parser.run = [](const std::string& input) -> Outcome {
    const auto ledger = std::make_shared<Ledger>();
    const auto cache = DeserializeCache(ledger, input, "blob");
    if (!cache) return RefusedFile(cache.error());
    const auto written = SerializeCache(*cache);
    if (!written) return {.accepted = true, .wrong = "what it accepted cannot be written"};
    // What lies in lanes without a token is not kept; all else is.
    const auto again = DeserializeCache(ledger, *written, "blob");
    if (written->size() != input.size() || !again || *SerializeCache(*again) != *written)
      return {.accepted = true, .wrong = "what it accepted is written otherwise"};
    return {.accepted = true, .said = "read"};
  };
  return parser;
}

struct Machine {
  Folder folder;
  std::shared_ptr<Engine> engine;
  Plan plan;
  explicit Machine(const test::TestModelOptions& options) {
    SmallModel(folder, options);
    engine = *Engine::Create(*Model::Load(folder.model), {1, 64});
    plan = FullPlan(engine->fingerprint(), 512);
    for (Expert& e : plan.layers) e = {0.5, 4, 4};
  }
};

// The cache of the only KV head ends a session: its size and checksum are made right.
void SealSession(std::string& session) {
  constexpr std::size_t kCount = 24, kTokens = 32;  // where the number of tokens is, and where they are
  if (session.size() < kTokens) return;
  uint64_t n = 0;
  std::memcpy(&n, session.data() + kCount, sizeof n);
  const std::size_t left = session.size() - kTokens;
  if (n > left / sizeof(int32_t) || left - n * sizeof(int32_t) < 16) return;
  const std::size_t at = kTokens + n * sizeof(int32_t) + 8;  // behind the number of caches
  std::string cache = session.substr(at + 8);
  test::Seal(cache);
  const uint64_t size = cache.size();
  std::memcpy(session.data() + at, &size, sizeof size);
  session.replace(at + 8, cache.size(), cache);
}

Parser SessionParser() {
  const auto machine = std::make_shared<Machine>(Small("llama"));
  Parser parser{.name = "session"};
  for (const int64_t n : {5, 100, 400}) {
    auto session = *Session::Create(machine->engine, machine->plan);
    std::vector<int32_t> tokens;
    for (int64_t i = 0; i < n; ++i) tokens.push_back(static_cast<int32_t>(i % 200));
    if (session.Prefill(tokens)) parser.seeds.push_back(*SaveSession(session));
  }
  parser.seal = SealSession;
  parser.run = [machine](const std::string& input) -> Outcome {
    auto session = RestoreSession(machine->engine, machine->plan, {}, input);
    if (!session) return RefusedFile(session.error());
    if (!session->Decode(1) || !std::isfinite(session->logits()[0]))
      return {.accepted = true, .said = "cannot go on"};
    return {.accepted = true, .said = "read"};
  };
  return parser;
}

Parser SuiteParser() {
  return {
      .name = "suite",
      .seeds =
          {R"({"_id": "a", "context": "Some text. ", "questions": [{"dataset": "qa", "input": "What?", )"
           R"("answers": ["that"], "metric": "f1", "max_new_tokens": 8, "template": "Q: {input}\nA:"}]})",
           R"({"dataset": "hotpotqa", "context": "text", "input": "why?", "answers": ["so"], "_id": "b", )"
           R"("all_classes": null, "length": 3})",
           R"({"input": "a long text and what is the number of x?", "outputs": ["123"], "index": 0})",
           R"({"problem": "1 + 1?", "answer": "\\frac{4}{2}"})"},
      .words = {"\"metric\": \"choice\"", "\"metric\": \"exact\"", "\"stop\": [\"\\n\"]",
                "\"first_line\": true", "\"all_classes\": [\"a\"]", "\n", "{input}"},
      .run = [](const std::string& input) -> Outcome {
        const auto suite = eval::ParseSuite(input, "niah_single.jsonl");
        if (!suite) return RefusedFile(suite.error());
        for (const eval::Context& context : suite->contexts) {
          if (context.questions.empty()) return {.accepted = true, .wrong = "a context without questions"};
          for (const eval::Question& q : context.questions) {
            const double score = eval::ScoreAnswer(q, q.answers.empty() ? "" : q.answers[0]);
            if (!(score >= 0 && score <= 1)) return {.accepted = true, .wrong = "a score that is none"};
          }
        }
        return {.accepted = true, .said = suite->contexts[0].questions[0].dataset};
      }};
}

}  // namespace

void AddFileParsers(std::vector<Parser>& parsers) {
  for (auto* make : {ModelParser, PlanParser, ProfileParser, CacheParser, SessionParser, SuiteParser})
    parsers.push_back(make());
}

}  // namespace moend::fuzz
