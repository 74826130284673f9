// What calibration learns to expect of a repetition: the regression, its file, and what a session makes of
// it.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "moend/base/base64.h"
#include "moend/calibrate/calibrate.h"
#include "moend/calibrate/learning.h"
#include "moend/calibrate/trials.h"
#include "moend/engine/capture.h"
#include "moend/engine/engine_impl.h"
#include "moend/engine/repetition.h"
#include "tests/support/tiny_engine.h"

namespace moend {
namespace {

using Tiny = test::TinyEngine;

std::shared_ptr<LearnedScores> RandomScores(const HyperParams& hp) {
  auto learned = std::make_shared<LearnedScores>();
  learned->n_layers = hp.n_layers;
  learned->n_kv_heads = hp.n_kv_heads;
  learned->n_embd = hp.n_embd;
  std::mt19937_64 random(3);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < hp.n_layers * hp.n_kv_heads * hp.n_embd; ++i)
    learned->weights.push_back(normal(random));
  RoundLearnedScores(*learned);
  return learned;
}

TEST(Base64, IsThatOfTheRfc) {
  const std::pair<std::string, std::string> kVectors[] = {{"", ""},
                                                          {"f", "Zg=="},
                                                          {"fo", "Zm8="},
                                                          {"foo", "Zm9v"},
                                                          {"foob", "Zm9vYg=="},
                                                          {"fooba", "Zm9vYmE="},
                                                          {"foobar", "Zm9vYmFy"},
                                                          {std::string("\0\xff\x80", 3), "AP+A"}};
  for (const auto& [bytes, text] : kVectors) {
    EXPECT_EQ(EncodeBase64(bytes), text);
    EXPECT_EQ(DecodeBase64(text), bytes);
  }
  for (const char* wrong : {"Zg==\n", "Z g", "Zm9v-", "=Zm9"}) EXPECT_FALSE(DecodeBase64(wrong)) << wrong;
}

// Scores that are a function of the hidden states are found again, whatever else differs from text to text.
TEST(ScoreLearner, FindsALinearFunction) {
  const Tiny tiny;
  const HyperParams& hp = tiny.hparams();
  const int64_t n = 700, width = hp.n_embd;
  auto learner = ScoreLearner::Create(*tiny.engine->impl().compute);
  ASSERT_TRUE(learner);
  const auto truth = RandomScores(hp);
  ScorerNeeds needs;
  needs.repetition = true;
  auto scratch = LayerScratch::Create(nullptr, {hp.n_kv_heads, hp.head_size}, hp.n_heads, n, n, needs, 0);
  ASSERT_TRUE(scratch);
  std::mt19937_64 random(5);
  std::normal_distribution<float> normal;
  for (int text = 0; text < 2; ++text) {
    for (int64_t l = 0; l + 1 < hp.n_layers; ++l) {  // nothing is known of the last one
      std::vector<float> hidden;
      for (int64_t t = 0; t < n; ++t) {
        const float size = std::exp(2 * normal(random));  // does not matter
        // Channels of very different sizes, and a mean.
        for (int64_t c = 0; c < width; ++c)
          hidden.push_back(size * (c % 7 == 0 ? 30.0f : 1.0f) * (0.5f + normal(random)));
      }
      for (int64_t t = 0; t < n; ++t) {
        double square = 0;
        for (int64_t c = 0; c < width; ++c) square += double{hidden[t * width + c]} * hidden[t * width + c];
        for (int64_t h = 0; h < hp.n_kv_heads; ++h) {
          double dot = 0;
          for (int64_t c = 0; c < width; ++c)
            dot += double{truth->head(l, h)[c]} * hidden[t * width + c] /
                   std::sqrt(square / static_cast<double>(width));
          scratch->needed(h)[t] = static_cast<float>(std::exp((text == 0 ? 0 : 9) + 0.1 * dot));
        }
      }
      for (int64_t at = 0; at < n; at += 300)
        learner->Watch(at, std::min<int64_t>(300, n - at), hidden.data() + at * width);
      ASSERT_TRUE(learner->EndLayer(l, *scratch));
    }
  }
  const auto learned = learner->Learn();
  ASSERT_TRUE(learned);
  ASSERT_TRUE(CheckLearnedScores(*learned, hp.n_layers, hp.n_kv_heads, width));
  for (int64_t l = 0; l + 1 < hp.n_layers; ++l)
    for (int64_t h = 0; h < hp.n_kv_heads; ++h) {
      double aa = 0, ab = 0, bb = 0;
      for (int64_t c = 0; c < width; ++c) {
        const double a = truth->head(l, h)[c], b = learned->head(l, h)[c];
        aa += a * a, ab += a * b, bb += b * b;
      }
      EXPECT_GT(ab / std::sqrt(aa * bb), 0.98) << l << " " << h;
    }
  for (int64_t c = 0; c < hp.n_kv_heads * width; ++c) EXPECT_EQ(learned->head(hp.n_layers - 1, 0)[c], 0);
}

TEST(LearnedScores, AreInFilesWhatTheyAreInMemory) {
  const Tiny tiny;
  const HyperParams& hp = tiny.hparams();
  Plan plan = FullPlan(tiny.engine->fingerprint(), 100);
  EXPECT_EQ(ToJson(plan).find("learned"), std::string::npos);
  plan.learned = RandomScores(hp);
  const std::string json = ToJson(plan);
  const auto read = ParsePlan(json, "plan.json");
  ASSERT_TRUE(read) << read.error().message;
  ASSERT_TRUE(read->learned);
  EXPECT_EQ(read->learned->weights, plan.learned->weights);
  EXPECT_EQ(read->learned->n_embd, hp.n_embd);

  const auto refused = [&](const std::string& from, const std::string& to) {
    std::string wrong = json;
    const auto at = wrong.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    wrong.replace(at, from.size(), to);
    const auto parsed = ParsePlan(wrong, "plan.json");
    EXPECT_FALSE(parsed) << from << " -> " << to;
    if (parsed) return;
    EXPECT_EQ(parsed.error().code, ErrorCode::kCorrupt);
    EXPECT_TRUE(parsed.error().message.starts_with("plan.json: learned")) << parsed.error().message;
  };
  const std::string width = fmt::format("\"n_embd\":{}", hp.n_embd);
  refused(width, "\"n_embd\":0");
  refused(width, fmt::format("\"n_embd\":{}", hp.n_embd + 1));
  refused(width, "\"n_embd\":4611686018427387904");
  const auto first = json.find("\"weights\"");
  const auto text = json.find('"', json.find('[', first));
  const std::string eight = json.substr(text, 9);  // a quote and eight characters
  refused(eight, "\"????????");
  refused(eight, "\"/3//f/9/");  // 0x7fff: NaN
  refused(eight, "\"");
}

TEST(LearnedScores, OfAnotherModelOrNoneAreRefused) {
  const Tiny tiny;
  Plan plan = FullPlan(tiny.engine->fingerprint(), 400);
  plan.scorer = kLearnedScorer;
  EXPECT_TRUE(Session::Create(tiny.engine, plan));  // nothing is chosen
  for (Expert& e : plan.layers) e = {0.3, 4, 4};
  const auto none = Session::Create(tiny.engine, plan);
  ASSERT_FALSE(none);
  EXPECT_NE(none.error().message.find("moend calibrate"), std::string::npos) << none.error().message;
  auto other = std::make_shared<LearnedScores>(*RandomScores(tiny.hparams()));
  other->n_embd /= 2;
  plan.learned = other;
  const auto wrong = Session::Create(tiny.engine, plan);
  ASSERT_FALSE(wrong);
  EXPECT_EQ(wrong.error().code, ErrorCode::kMismatch);
  const std::vector<std::string> names = {"learned"};
  EXPECT_FALSE(KvCapture::Create(tiny.engine, test::RandomTokens(50, 1), names));
}

// A session that reads once keeps what the scores say, as one that is made from a capture does.
TEST(LearnedScores, ChooseWhatASessionKeeps) {
  const Tiny tiny;
  const HyperParams& hp = tiny.hparams();
  const int64_t n = 700;
  std::vector<int32_t> tokens = test::RandomTokens(n, 13);
  tokens[500] = tokens[100];
  Plan plan = FullPlan(tiny.engine->fingerprint(), n);
  plan.scorer = kLearnedScorer;
  plan.learned = RandomScores(hp);
  plan.refit = true;
  for (Expert& e : plan.layers) e = {0.3, 4, 4};
  const std::vector<std::string> names = {"learned"};
  const auto capture = KvCapture::Create(tiny.engine, tokens, names, {}, {}, plan.learned);
  ASSERT_TRUE(capture) << capture.error().message;
  // What enters the first layer is the embedding, whatever the position.
  EXPECT_EQ(capture->layer(0).expected(0)[100], capture->layer(0).expected(0)[500]);
  EXPECT_NE(capture->layer(0).expected(0)[100], capture->layer(0).expected(0)[101]);
  EXPECT_EQ(capture->layer(1).needed(0), nullptr);
  auto from_capture = SessionFromCapture(tiny.engine, plan, *capture);
  auto own = Session::Create(tiny.engine, plan);
  ASSERT_TRUE(from_capture && own);
  ASSERT_TRUE(own->Prefill(tokens));
  EXPECT_EQ(own->stats().bytes, from_capture->stats().bytes);
  EXPECT_EQ(own->stats().layers[0].tokens, KeptTokens(0.3, plan.guard, n));
  ASSERT_TRUE(own->Decode(5));
  ASSERT_TRUE(from_capture->Decode(5));
  EXPECT_TRUE(std::ranges::equal(own->logits(), from_capture->logits()));
  // Values are refitted, and other scores keep other tokens.
  const auto differs = [&](const Plan& changed) {
    auto session = SessionFromCapture(tiny.engine, changed, *capture);
    EXPECT_TRUE(session);
    EXPECT_TRUE(session->Decode(5));
    return !std::ranges::equal(session->logits(), own->logits());
  };
  Plan plain = plan, otherwise = plan;
  plain.refit = false;
  otherwise.scorer = "knorm";
  EXPECT_TRUE(differs(plain));
  EXPECT_TRUE(differs(otherwise));
}

// The prompt's queries, turned to where they would be asked: in the first layer, where a token's query
// depends on the token and its position only, they are those of a longer text of the same token.
TEST(LearnedScores, ReferToThePromptsOwnQueriesAtLaterPositions) {
  const Tiny tiny;
  const HyperParams& hp = tiny.hparams();
  const int64_t n = 40, later = 16, group = hp.n_heads / hp.n_kv_heads;
  const std::vector<int32_t> text(static_cast<std::size_t>(n), 7);
  const std::vector<int32_t> longer(static_cast<std::size_t>(2 * n + later), 7);
  const std::vector<std::string> learned = {"learned"}, observing = {"expected"};
  const auto capture = KvCapture::Create(tiny.engine, text, learned, {}, {}, RandomScores(hp));
  const auto whole = KvCapture::Create(tiny.engine, longer, observing);
  ASSERT_TRUE(capture && whole);
  for (int64_t h = 0; h < hp.n_kv_heads; ++h) {
    const QueryRows got = capture->layer(0).own_reference(h), want = whole->layer(0).observed(h);
    ASSERT_EQ(got.rows, n * group);
    ASSERT_GE(want.rows, n * group);
    const float* newest = want.q + (want.rows - n * group) * hp.head_size;
    for (int64_t i = 0; i < got.rows * hp.head_size; ++i)
      ASSERT_NEAR(got.q[i], newest[i], 1e-4) << h << " " << i;
  }
}

// An interrupted calibration that goes on learns what it would have learned.
TEST(LearnedScores, AreLearnedByCalibration) {
  test::TestModelOptions small;
  small.n_layers = 2;
  small.n_embd = 64;
  small.n_heads = 2;
  small.n_kv_heads = 1;
  small.n_ff = 64;
  const Tiny tiny(small);
  CalibrateOptions options;
  options.method = ProfileMethod::kReconstruction;
  options.scorer = kAutoScorer;
  options.most_copy_loss = 100;  // random weights repeat nothing
  options.length = 500;
  options.chunks = 0;
  options.experts = {{0.3, 4, 4}, {1.0, 4, 4}, {1.0, 16, 16}};
  const std::vector<std::vector<int32_t>> chunks = {test::RandomTokens(500, 1), test::RandomTokens(500, 2)};
  const auto nothing = [](const CalibrateProgress&) { return true; };
  Profile half;
  const auto whole =
      Calibrate(tiny.engine, chunks, options, {}, nothing, [&](const Profile& p) -> Expected<void> {
        if (half.cells.empty()) half = p;
        return {};
      });
  ASSERT_TRUE(whole) << whole.error().message;
  ASSERT_TRUE(whole->learned);
  EXPECT_TRUE(std::ranges::any_of(whole->learned->weights, [](float w) { return w != 0; }));
  ASSERT_EQ(half.chunks, 1);
  EXPECT_FALSE(half.learned);
  const auto read = ParseProfile(ToJson(half), "half.json");
  ASSERT_TRUE(read) << read.error().message;
  const auto keep = [](const Profile&) -> Expected<void> { return {}; };
  const auto resumed = Calibrate(tiny.engine, chunks, options, *read, nothing, keep);
  ASSERT_TRUE(resumed) << resumed.error().message;
  EXPECT_EQ(ToJson(*resumed), ToJson(*whole));
  // A finished profile of a version that did not learn is added to.
  Profile older = *whole;
  older.learned = nullptr;
  const auto added = Calibrate(tiny.engine, chunks, options, older, nothing, keep);
  ASSERT_TRUE(added);
  EXPECT_EQ(ToJson(*added), ToJson(*whole));

  // What plans lose is measured with the scorer that it was learned from.
  Profile once = *whole;
  once.scorer = kLearnedScorer;
  const auto trials = Trials::Create(tiny.engine, chunks, once, 100, {});
  ASSERT_FALSE(trials);
  EXPECT_EQ(trials.error().code, ErrorCode::kUnsupported);

  options.learn = false;
  const auto without = Calibrate(tiny.engine, chunks, options, {}, nothing, keep);
  ASSERT_TRUE(without);
  EXPECT_FALSE(without->learned);
  options.scorer = kLearnedScorer;
  EXPECT_FALSE(Calibrate(tiny.engine, chunks, options, {}, nothing, keep));
}

}  // namespace
}  // namespace moend
