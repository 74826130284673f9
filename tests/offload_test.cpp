// Layers on a device against the same layers on the CPU. The device is ggml's own CPU back end here, which
// every machine has: the graphs, what passes between device and host, and who attends are those of a GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <iostream>
#include <string>
#include <vector>

#include "moend/engine/engine.h"
#include "moend/engine/own_attention.h"
#include "moend/model/device.h"
#include "moend/model/device_weights.h"
#include "moend/plan/plan.h"
#include "tests/support/libllama_logits.h"
#include "tests/support/test_model.h"

namespace moend::test {
namespace {

constexpr int64_t kAll = 1000;

struct OffloadCase {
  const char* name;
  TestModelOptions options;
};
void PrintTo(const OffloadCase& c, std::ostream* out) {
  *out << c.name;
}

std::vector<OffloadCase> OffloadCases() {
  std::vector<OffloadCase> cases = {
      {"Llama", {}}, {"Qwen2", {}}, {"Tied", {}}, {"Mistral3", {}}, {"Experts", {}}};
  cases[1].options.architecture = "qwen2";
  cases[1].options.biases = true;
  cases[2].options.tied = cases[2].options.rope_factors = true;
  TestModelOptions& mistral = cases[3].options;
  mistral.architecture = "mistral3";
  mistral.rope_scaling = "yarn";
  mistral.rope_factor = 4;
  mistral.rope_original_context = 64;
  mistral.temperature_scale = 0.2f;
  mistral.yarn_beta_fast = 32;
  mistral.yarn_log_multiplier = 1;
  TestModelOptions& experts = cases[4].options;
  experts.architecture = "qwen3moe";
  experts.n_experts = 4;
  experts.n_used = 2;
  // A size that GPUs have flash attention for.
  cases.push_back({"Heads64", {}});
  cases.back().options.head_size = 64;
  for (const char* sliding : {"gemma2", "gpt-oss"})
    cases.push_back({sliding, SlidingModelOptions(sliding, 70)});
  cases.push_back({"Hybrid", HybridModelOptions("qwen35")});
  for (std::size_t i = 0; i < cases.size(); ++i) cases[i].options.seed = i + 1;
  return cases;
}

std::shared_ptr<Engine> EngineOn(const std::string& path, const char* device, int64_t layers) {
  auto model = Model::Load(path, {.n_threads = 1, .repack = false, .device = {device, layers}});
  EXPECT_TRUE(model) << model.error().message;
  auto engine = Engine::Create(*model, {.n_threads = 1, .block_tokens = 64});
  EXPECT_TRUE(engine) << engine.error().message;
  return *engine;
}

// What a session gives on its way: a prompt, a further turn, and steps of two contexts together.
std::vector<std::vector<float>> Trip(const std::shared_ptr<Engine>& engine, const Plan& plan) {
  const std::vector<int32_t> tokens = RandomTokens(330, 5);
  std::vector<std::vector<float>> logits;
  const auto note = [&](const Session& s) { logits.emplace_back(s.logits().begin(), s.logits().end()); };
  auto session = Session::Create(engine, plan);
  EXPECT_TRUE(session) << session.error().message;
  std::vector<float> hidden;
  auto read = session->Prefill(std::span(tokens).first(250), {}, &hidden);
  EXPECT_TRUE(read) << read.error().message;
  note(*session);
  EXPECT_EQ(std::ssize(hidden), 250 * engine->model().hparams().n_embd);
  std::vector<float> rows(250 * static_cast<std::size_t>(engine->model().hparams().n_vocab));
  EXPECT_TRUE(engine->Logits(hidden, rows));
  for (std::size_t i = 0; i < 250; i += 50) {
    const auto width = static_cast<std::ptrdiff_t>(rows.size() / 250);
    const auto row = rows.begin() + static_cast<std::ptrdiff_t>(i) * width;
    logits.emplace_back(row, row + width);
  }
  read = session->Prefill(std::span(tokens).subspan(250, 70));
  EXPECT_TRUE(read) << read.error().message;
  note(*session);
  auto fork = session->Fork();
  EXPECT_TRUE(fork);
  Session* both[] = {&*session, &*fork};
  for (std::size_t i = 320; i < tokens.size(); ++i) {
    const int32_t next[] = {tokens[i], tokens[i - 1]};
    std::vector<float> states;
    const auto step = Session::DecodeBatch(both, next, i % 3 ? nullptr : &states);
    EXPECT_TRUE(step) << step.error().message;
    if (!states.empty()) {
      logits.emplace_back(static_cast<std::size_t>(engine->model().hparams().n_vocab));
      EXPECT_TRUE(engine->Logits(std::span(states).first(states.size() / 2), logits.back()));
      continue;
    }
    note(*session);
    note(*fork);
  }
  return logits;
}

class OffloadOf : public testing::TestWithParam<OffloadCase> {
 protected:
  void SetUp() override {
    path_ = dir_ / "m.gguf";
    ASSERT_TRUE(WriteTestModel(GetParam().options, path_));
    here_ = EngineOn(path_, "none", kAll);
    ASSERT_FALSE(here_->model().device());
  }

  TempDir dir_;
  std::string path_;
  std::shared_ptr<Engine> here_;
};

// How far results may be apart: a GPU rounds the factors of its products.
struct Tolerance {
  double mean, worst;
};
void ExpectClose(const LogitDistance& d, const Tolerance& most) {
  EXPECT_LT(d.mean_kl, most.mean);
  EXPECT_LT(d.worst_kl, most.worst);
}

TEST_P(OffloadOf, SessionsAreThoseOfTheCpu) {
  const int64_t layers = here_->model().hparams().n_layers;
  const Plan plan = FullPlan(here_->fingerprint(), 1024);
  const auto want = Trip(here_, plan);
  for (const Device& device : ListDevices()) {
    for (const int64_t there : {kAll, int64_t{1}, int64_t{2}, layers}) {
      SCOPED_TRACE(device.name + ", " + std::to_string(there));
      const auto engine = EngineOn(path_, device.name.c_str(), there);
      const DeviceWeights* weights = engine->model().device();
      ASSERT_TRUE(weights);
      EXPECT_EQ(weights->first_layer, std::max<int64_t>(0, layers + 1 - there));
      ASSERT_EQ(engine->fingerprint().hash, here_->fingerprint().hash);
      ExpectClose(Compare(want, Trip(engine, plan)),
                  device.gpu ? Tolerance{2e-3, 2e-2} : Tolerance{1e-4, 1e-3});
    }
  }
}

TEST_P(OffloadOf, SoAreCompressedOnes) {
  Plan plan = FullPlan(here_->fingerprint(), 1024);
  CompressAlike(plan, {0.5, 8, 8});
  plan.variant = "2d_uniform";
  for (const char* scorer : {"keydiff", "snapkv", "h2o", "reconstruct"}) {
    plan.scorer = scorer;
    const auto want = Trip(here_, plan);
    for (const Device& device : ListDevices()) {
      SCOPED_TRACE(device.name + ", " + scorer);
      // Rounding may choose another token where two are worth the same.
      ExpectClose(Compare(want, Trip(EngineOn(path_, device.name.c_str(), kAll), plan)),
                  device.gpu ? Tolerance{5e-2, 5e-1} : Tolerance{1e-2, 1e-1});
    }
  }
}

// Steps enough for tokens to be packed and evicted, of two contexts of which one sits out some of them.
TEST_P(OffloadOf, SoAreLongAnswers) {
  const auto answer = [&](const std::shared_ptr<Engine>& engine, const Plan& plan) {
    std::vector<std::vector<float>> logits;
    const std::vector<int32_t> tokens = RandomTokens(700, 8);
    auto session = Session::Create(engine, plan);
    EXPECT_TRUE(session->Prefill(std::span(tokens).first(60)));
    auto fork = session->Fork();
    Session* both[] = {&*session, &*fork};
    for (std::size_t i = 60; i < 200; ++i) {
      const int32_t next[] = {tokens[i], tokens[i + 300]};
      const std::size_t n = i % 5 == 0 ? 1 : 2;
      const auto step = Session::DecodeBatch(std::span(both).first(n), std::span(next).first(n));
      EXPECT_TRUE(step) << step.error().message;
      if (i % 10) continue;
      for (const Session* s : both) logits.emplace_back(s->logits().begin(), s->logits().end());
    }
    return logits;
  };
  Plan plan = FullPlan(here_->fingerprint(), 1024);
  CompressAlike(plan, {0.5, 8, 8});
  plan.variant = "2d_uniform";
  plan.scorer = "keydiff";
  plan.guard = {4, 16};
  const auto want = answer(here_, plan);
  for (const Device& device : ListDevices()) {
    SCOPED_TRACE(device.name);
    ExpectClose(Compare(want, answer(EngineOn(path_, device.name.c_str(), kAll), plan)),
                device.gpu ? Tolerance{5e-2, 5e-1} : Tolerance{1e-2, 1e-1});
  }
}

// The scorer looks at the newest queries of a prompt, its cache at those of the newest 512 tokens; queries of
// the blocks before stay on the device.
TEST_P(OffloadOf, QueriesThatAreLookedAtCome) {
  Plan plan = FullPlan(here_->fingerprint(), 1024);
  CompressAlike(plan, {0.3, 2, 8});
  plan.variant = "2d_uniform";
  plan.scorer = "snapkv";
  const std::vector<int32_t> tokens = RandomTokens(768, 11);  // in whole blocks
  const auto read = [&](const std::shared_ptr<Engine>& engine) {
    auto session = Session::Create(engine, plan);
    EXPECT_TRUE(session->Prefill(tokens));
    EXPECT_TRUE(session->Decode(tokens[0]));
    return std::vector<std::vector<float>>{{session->logits().begin(), session->logits().end()}};
  };
  const auto want = read(here_);
  // A GPU rounds otherwise, so that other tokens are chosen: with so few of them as much is lost by that as
  // by wrong queries.
  ExpectClose(Compare(want, read(EngineOn(path_, "CPU", kAll))), Tolerance{1e-3, 1e-3});
}

INSTANTIATE_TEST_SUITE_P(, OffloadOf, testing::ValuesIn(OffloadCases()), [](const auto& info) {
  std::string name = info.param.name;
  std::erase(name, '-');
  return name;
});

TEST(Devices, TheCpuIsOne) {
  const std::vector<Device> devices = ListDevices();
  ASSERT_FALSE(devices.empty());
  for (const Device& d : devices) std::cout << "tested on " << d.name << ", " << d.description << "\n";
  EXPECT_EQ(devices.back().name, "CPU");
  EXPECT_FALSE(devices.back().gpu);
  EXPECT_TRUE(FindDevice("CPU").value());
  EXPECT_FALSE(FindDevice("none").value());
  const auto missing = FindDevice("CUDA77");
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().code, ErrorCode::kNotFound);
  EXPECT_NE(missing.error().message.find("CPU"), std::string::npos) << missing.error().message;
}

TEST(OwnAttention, TakesNoBlockWithoutThoseBeforeIt) {
  const TempDir dir;
  ASSERT_TRUE(WriteTestModel({}, dir / "m.gguf"));
  const auto model = Model::Load(dir / "m.gguf").value();
  const LayerParams& layer = model->hparams().layers[0];
  OwnAttention own;
  own.Init(model->hparams(), FindDevice("CPU").value(), 64);
  EXPECT_FALSE(own.Prepare(layer, {64, 200}, 64));
  EXPECT_TRUE(own.Prepare(layer, {0, 200}, 64));
  EXPECT_TRUE(own.Prepare(layer, {64, 200}, 64));
  EXPECT_FALSE(own.Prepare(layer, {192, 200}, 8));  // one was left out
  EXPECT_FALSE(own.Prepare(layer, {128, 200}, 64));
  EXPECT_TRUE(own.Prepare(layer, {0, 300}, 64));
  EXPECT_FALSE(own.Prepare(layer, {64, 5000}, 64));  // more than there is memory for
}

TEST(Devices, NoLayersIsTheCpu) {
  const TempDir dir;
  ASSERT_TRUE(WriteTestModel({}, dir / "m.gguf"));
  const auto model = Model::Load(dir / "m.gguf", {.device = {"CPU", 0}});
  ASSERT_TRUE(model);
  EXPECT_FALSE((*model)->device());
  const auto nowhere = Model::Load(dir / "m.gguf", {.device = {"CUDA77", 1}});
  ASSERT_FALSE(nowhere);
  EXPECT_EQ(nowhere.error().code, ErrorCode::kNotFound);
}

}  // namespace
}  // namespace moend::test
