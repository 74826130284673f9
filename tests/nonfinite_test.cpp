// A model that computes no numbers is an error of every command, never a text, a loss or a saved null.
#include <ggml-cpp.h>
#include <gguf.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moend/base/file.h"
#include "moend/engine/engine.h"
#include "moend/eval/perplexity.h"
#include "moend/plan/plan.h"
#include "moend/serve/engine_backend.h"
#include "tests/support/process.h"
#include "tests/support/serve_client.h"
#include "tests/support/test_model.h"

namespace moend {
namespace {

// A small model one of whose norms holds `value`.
bool WriteModelWithNorm(const std::string& path, float value, const char* norm) {
  test::TestModelOptions options;
  options.chat_template = true;
  if (!test::WriteTestModel(options, path)) return false;
  const gguf_context_ptr file(gguf_init_from_file(path.c_str(), {/*no_alloc=*/true, nullptr}));
  const int64_t id = file ? gguf_find_tensor(file.get(), norm) : -1;
  if (id < 0) return false;
  std::string bytes = test::ReadAll(path);
  const std::size_t at = gguf_get_data_offset(file.get()) + gguf_get_tensor_offset(file.get(), id);
  for (std::size_t i = 0; i < gguf_get_tensor_size(file.get(), id); i += sizeof value)
    std::memcpy(bytes.data() + at + i, &value, sizeof value);
  return WriteFileAtomically(path, bytes).has_value();
}

struct NanWorld {
  test::TempDir dir;
  std::string model = dir / "nan.gguf", text = dir / "text.txt", suite = dir / "suite.jsonl",
              out = dir / "out.json";
  explicit NanWorld(float value = std::numeric_limits<float>::quiet_NaN(),
                    const char* norm = "output_norm.weight") {
    EXPECT_TRUE(WriteModelWithNorm(model, value, norm));
    std::string words;
    for (int i = 0; i < 400; ++i) words += fmt::format("word{} ", i * 31 % 97);
    EXPECT_TRUE(WriteFileAtomically(text, words));
    const nlohmann::json question = {{"dataset", "one"},
                                     {"input", "What?"},
                                     {"answers", {"x"}},
                                     {"max_new_tokens", 4},
                                     {"metric", "exact"}};
    const nlohmann::json row = {{"_id", "a"}, {"context", words}, {"questions", {question}}};
    EXPECT_TRUE(WriteFileAtomically(suite, row.dump() + "\n"));
  }
};

void ExpectRefused(std::vector<std::string> arguments) {
  SCOPED_TRACE(arguments[0]);
  test::ProcessOptions options;
  options.environment.emplace_back("MOEND_ARG_THREADS", "1");
  const auto r = test::RunProcess(MOEND_BINARY, arguments, options);
  EXPECT_EQ(r.code, 1) << r.err;
  EXPECT_NE(r.err.find("not finite"), std::string::npos) << r.err;
  EXPECT_EQ(r.out.find("nan"), std::string::npos) << r.out;
}

TEST(NotFinite, Run) {
  const NanWorld world, infinite(std::numeric_limits<float>::infinity());
  ExpectRefused({"run", "-m", world.model, "-p", "Hello", "-n", "4"});
  ExpectRefused({"run", "-m", infinite.model, "-p", "Hello", "-n", "4", "--json"});
}

TEST(NotFinite, Chat) {
  const NanWorld world;
  ExpectRefused({"run", "-m", world.model, "--chat", "-p", "Hello", "-n", "4"});
}

TEST(NotFinite, Ask) {
  const NanWorld world;
  ExpectRefused({"ask", "-m", world.model, "-f", world.text, "-q", "What?"});
}

TEST(NotFinite, Bench) {
  const NanWorld world;
  ExpectRefused({"bench", "-m", world.model, "-p", "16", "-n", "0", "-r", "1"});
  ExpectRefused({"bench", "-m", world.model, "-p", "0", "-n", "2", "-r", "1"});
}

TEST(NotFinite, Perplexity) {
  const NanWorld world;
  ExpectRefused({"perplexity", "-m", world.model, "-f", world.text, "-c", "64", "--chunks", "1"});
}

TEST(NotFinite, Eval) {
  const NanWorld world;
  ExpectRefused({"eval", "-m", world.model, "--suite", world.suite, "--variant", "full", "-o", world.out});
}

TEST(NotFinite, Calibrate) {
  const NanWorld world;
  ExpectRefused({"calibrate", "-m", world.model, "-f", world.text, "-o", world.out, "-c", "600", "--chunks",
                 "1", "--keep", "0.5", "--bits", "4"});
  EXPECT_EQ(test::ReadAll(world.out), "") << "nothing was measured, so nothing is saved";
}

TEST(NotFinite, SolveThatMeasures) {
  const NanWorld world;
  LoadOptions options;
  options.vocabulary = false;
  const auto model = Model::Load(world.model, options);
  ASSERT_TRUE(model);
  const HyperParams& hp = (*model)->hparams();
  Profile profile;
  profile.model = {
      hp.architecture_name, hp.name, hp.n_layers, {hp.n_kv_heads, hp.head_size}, (*model)->hash()};
  profile.length = 512;
  profile.evaluated = 64;
  profile.chunks = profile.chunks_wanted = 1;
  profile.experts = {{0.1, 4, 2}, {0.5, 4, 4}, {1.0, 8, 8}, {1.0, 16, 16}};
  profile.cells.assign(static_cast<std::size_t>(hp.n_layers), {{0.4, 0.4}, {0.2, 0.2}, {0.1, 0.1}, {0, 0}});
  const std::string path = world.dir / "profile.json";
  ASSERT_TRUE(SaveProfile(profile, path));
  ExpectRefused({"solve", path, "--compression", "2", "-c", "512", "-m", world.model, "-f", world.text,
                 "--refine", "--chunks", "2", "-o", world.out});
  ExpectRefused({"solve", path, "--compression", "2", "-c", "512", "-m", world.model, "-f", world.text,
                 "--validate", "3", "--chunks", "1", "-o", world.out});
}

TEST(NotFinite, ServeAnswers500) {
  const NanWorld world;
  auto model = Model::Load(world.model);
  ASSERT_TRUE(model);
  auto engine = Engine::Create(*model, {.n_threads = 1, .block_tokens = 128});
  ASSERT_TRUE(engine);
  serve::EngineBackendOptions settings;
  settings.plan = FullPlan((*engine)->fingerprint(), 512);
  settings.n_ctx = 512;
  auto backend = serve::MakeEngineBackend(*engine, settings);
  ASSERT_TRUE(backend);
  serve::ServerOptions options;
  options.port = 0;
  serve::Server server(std::move(options), serve::Log());
  const int port = server.Start().value();
  server.Serve(std::move(*backend), nullptr);
  const std::string prompt = R"({"prompt": "Hello", "max_tokens": 4})";
  const std::string chat = R"({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4})";
  for (const auto& [path, body] : {std::pair{"/v1/completions", prompt}, {"/v1/chat/completions", chat}}) {
    const auto r = serve::test::Ask(port, serve::test::Post(path, body));
    EXPECT_EQ(r.status, 500) << r.body;
    EXPECT_NE(r.body.find("not finite"), std::string::npos) << r.body;
    EXPECT_EQ(r.body.find(world.dir / ""), std::string::npos) << "a path of the server: " << r.body;
  }
}

// The session that met it cannot be used further; one of another plan or model can.
TEST(NotFinite, TheSessionSaysSo) {
  const NanWorld world;
  auto model = Model::Load(world.model, {1, false});
  ASSERT_TRUE(model);
  auto engine = Engine::Create(*model, {1});
  ASSERT_TRUE(engine);
  auto session = Session::Create(*engine, FullPlan((*engine)->fingerprint(), 512));
  ASSERT_TRUE(session);
  EXPECT_FALSE(session->Prefill(test::RandomTokens(20, 1)));
  EXPECT_FALSE(session->usable());
}

// Nor does anything on the way to the logits choose, pack or refit what is no number without an end.
TEST(NotFinite, APromptThatIsReadTwice) {
  for (const char* norm : {"output_norm.weight", "blk.0.attn_norm.weight"}) {
    const NanWorld world(std::numeric_limits<float>::quiet_NaN(), norm);
    auto model = Model::Load(world.model, {1, false});
    ASSERT_TRUE(model);
    auto engine = Engine::Create(*model, {1});
    ASSERT_TRUE(engine);
    Plan plan = FullPlan((*engine)->fingerprint(), 512);
    for (Expert& e : plan.layers) e = {0.25, 4, 4};
    plan.scorer = "reconstruct";
    plan.refit = true;
    auto session = Session::Create(*engine, plan);
    ASSERT_TRUE(session);
    const auto read = session->Prefill(test::RandomTokens(300, 1));
    ASSERT_FALSE(read);
    EXPECT_NE(read.error().message.find("not finite"), std::string::npos) << read.error().message;
    EXPECT_FALSE(session->usable());
  }
}

TEST(NotFinite, CalibrateByRepetition) {
  for (const char* norm : {"output_norm.weight", "blk.0.attn_norm.weight"}) {
    const NanWorld world(std::numeric_limits<float>::quiet_NaN(), norm);
    test::ProcessOptions options;
    options.environment.emplace_back("MOEND_ARG_THREADS", "1");
    const auto r = test::RunProcess(MOEND_BINARY,
                                    {"calibrate", "-m", world.model, "-f", world.text, "-o", world.out, "-c",
                                     "600", "--chunks", "1", "--method", "reconstruction"},
                                    options);
    EXPECT_EQ(r.code, 1) << r.err;
    const bool in_logits = std::string_view(norm).starts_with("output");
    EXPECT_NE(r.err.find(in_logits ? "not finite" : "no number"), std::string::npos) << r.err;
    EXPECT_EQ(test::ReadAll(world.out), "");
  }
}

TEST(NotFinite, NoDivergenceIsZeroForWantOfANumber) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  const std::vector<float> good = {1, 2, 3};
  for (const float bad : {nan, inf}) {
    for (std::size_t at = 0; at < good.size(); ++at) {
      std::vector<float> other = good;
      other[at] = bad;
      EXPECT_TRUE(std::isnan(eval::KlDivergence(good, other))) << bad << " at " << at;
      EXPECT_TRUE(std::isnan(eval::KlDivergence(other, good))) << bad << " at " << at;
    }
  }
}

TEST(NotFinite, ALossThatIsNoneIsNotSaved) {
  const test::TempDir dir;
  Profile profile;
  profile.model = {"llama", "m", 1, {1, 32}, "0123456789abcdef"};
  profile.length = 512;
  profile.evaluated = 64;
  profile.experts = {{1.0, 4, 4}};
  profile.cells = {{{0.1, 0.1}}};
  ASSERT_TRUE(SaveProfile(profile, dir / "good.json"));
  EXPECT_TRUE(LoadProfile(dir / "good.json"));
  for (double ProfileCell::*member : {&ProfileCell::kl, &ProfileCell::l2}) {
    for (const double bad :
         {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
      Profile broken = profile;
      broken.cells[0][0].*member = bad;
      const auto saved = SaveProfile(broken, dir / "bad.json");
      ASSERT_FALSE(saved);
      EXPECT_NE(saved.error().message.find("bad.json"), std::string::npos);
      EXPECT_EQ(test::ReadAll(dir / "bad.json"), "");
      broken = profile;
      broken.head_cells = {{{0.1, 0.1}}};
      broken.head_cells[0][0].*member = bad;
      EXPECT_FALSE(SaveProfile(broken, dir / "bad.json"));
    }
  }
}

}  // namespace
}  // namespace moend
