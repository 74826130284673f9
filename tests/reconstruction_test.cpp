// A repetition beside the first reading: what it says of tokens, what calibration makes of it, and what it
// refits. Small random models.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "moend/base/half.h"
#include "moend/cache/value_refit.h"
#include "moend/calibrate/calibrate.h"
#include "moend/calibrate/sensitivity.h"
#include "moend/engine/capture.h"
#include "moend/engine/repetition.h"
#include "moend/solve/solve.h"
#include "tests/support/tiny_engine.h"

namespace moend {
namespace {

using Tiny = test::TinyEngine;

KvCapture Read(const Tiny& tiny, const std::vector<int32_t>& tokens, const std::string& scorer) {
  const std::vector<std::string> names = {scorer};
  auto capture = KvCapture::Create(tiny.engine, tokens, names);
  EXPECT_TRUE(capture) << capture.error().message;
  return std::move(*capture);
}

float KeyAt(const DenseView& kv, int64_t t, int64_t c) {
  return HalfToFloat(kv.k[t / kPageTokens * kv.head_size * kPageTokens + c * kPageTokens + t % kPageTokens]);
}

// Sliding layers attend as the model says, soft caps and sinks count, and of sliding layers nothing is told.
void ExpectReadingAgain(const test::TestModelOptions& options) {
  const Tiny tiny(options);
  const HyperParams& hp = tiny.engine->model().hparams();
  const int64_t n = 60, d = hp.head_size, group = hp.n_heads / hp.n_kv_heads;
  const std::vector<int32_t> context = test::RandomTokens(n, 5);
  const auto asked = AskForPart(tiny.engine->model(), context, 0, n);
  ASSERT_TRUE(asked);
  const auto m = std::ssize(*asked);
  ASSERT_LE(m, 128);  // as many queries as "expected" is handed
  std::vector<int32_t> both = context;
  both.insert(both.end(), asked->begin(), asked->end());

  const KvCapture repeated = Read(tiny, context, "reconstruct"), plain = Read(tiny, both, "expected");
  EXPECT_EQ(repeated.logits(), Read(tiny, context, "keydiff").logits());
  for (int64_t l = 0; l < hp.n_layers; ++l) {
    const std::vector<float> grams = tiny.engine->model().OutputGrams(l);
    const AttentionStyle style = tiny.engine->model().Style(l);
    for (int64_t h = 0; h < hp.n_kv_heads; ++h) {
      const LayerScratch &got = repeated.layer(l), &want = plain.layer(l);
      const QueryRows q = got.reference(h);
      if (style.window > 0) {
        EXPECT_EQ(q.rows, 0);
        continue;
      }
      EXPECT_EQ(q.soft_cap, style.soft_cap);
      EXPECT_EQ(q.sinks, style.sinks ? style.sinks + h * group : nullptr);
      const QueryRows all = want.observed(h);
      ASSERT_EQ(q.rows, m * group);
      const float* same = all.q + (all.rows - m * group) * d;
      for (int64_t i = 0; i < q.rows * d; ++i) ASSERT_NEAR(q.q[i], same[i], 2e-3) << l << " " << i;
      // Every token's share of the attention of each query, and what its value does.
      const DenseView kv = want.view(h, n + m);
      std::vector<double> needed(static_cast<std::size_t>(n), 0.0);
      for (int64_t r = 0; r < q.rows; ++r) {
        std::vector<double> p;
        double sum = style.sinks ? std::exp(double{style.sinks[h * group + r % group]}) : 0;
        for (int64_t t = 0; t <= n + r / group; ++t) {
          double score = 0;
          for (int64_t c = 0; c < d; ++c) score += double{q.q[r * d + c]} * KeyAt(kv, t, c);
          if (style.soft_cap > 0) score = style.soft_cap * std::tanh(score / style.soft_cap);
          p.push_back(std::exp(score));
          sum += p.back();
        }
        const double weight = got.reference_weight()[static_cast<std::size_t>(r / group)];
        EXPECT_GT(weight, 0);
        for (std::size_t t = 0; t < needed.size(); ++t) needed[t] += weight * (p[t] / sum) * (p[t] / sum);
      }
      for (int64_t t = 0; t < n; ++t) {
        double square = 0;
        for (int64_t g = h * group; g < (h + 1) * group; ++g)
          for (int64_t i = 0; i < d; ++i)
            for (int64_t j = 0; j < d; ++j)
              square += double{grams[static_cast<std::size_t>((g * d + i) * d + j)]} *
                        HalfToFloat(kv.v[t * d + i]) * HalfToFloat(kv.v[t * d + j]) /
                        static_cast<double>(group);
        const double expected = needed[static_cast<std::size_t>(t)] * square;
        ASSERT_NEAR(got.needed(h)[t], expected, 0.02 * expected + 1e-9) << l << " " << h << " " << t;
      }
    }
  }
}

TEST(Repetition, IsWhatReadingTheContextAgainBehindItGives) {
  ExpectReadingAgain({});
}

TEST(Repetition, OfModelsWithSlidingLayers) {
  for (const char* architecture : {"gemma2", "gemma3", "gpt-oss"}) {
    SCOPED_TRACE(architecture);
    test::TestModelOptions o = test::SlidingModelOptions(architecture, 23);
    o.weight_type = GGML_TYPE_F32;
    ExpectReadingAgain(o);
  }
}

TEST(Repetition, LongContextsComeInPartsThatAskForWhatFollows) {
  const Tiny tiny;
  const std::vector<int32_t> context = test::RandomTokens(kRepeatedTokens + 100, 7);
  const auto part = AskForPart(tiny.engine->model(), context, kRepeatedTokens, 100);
  ASSERT_TRUE(part);
  ASSERT_GT(part->size(), 108u);
  EXPECT_TRUE(std::equal(part->end() - 100, part->end(), context.end() - 100));
  const KvCapture capture = Read(tiny, context, "reconstruct");
  for (int64_t t = 0; t < std::ssize(context); ++t) ASSERT_GT(capture.layer(1).needed(0)[t], 0) << t;
}

TEST(Repetition, ASessionKeepsWhatWasNeededWhileItGenerates) {
  const Tiny tiny;
  const int64_t n = 600;
  Plan plan = FullPlan(tiny.engine->fingerprint(), n);
  plan.scorer = "reconstruct";
  for (Expert& e : plan.layers) e = {0.3, 4, 4};
  auto session = Session::Create(tiny.engine, plan);
  ASSERT_TRUE(session);
  ASSERT_TRUE(session->Prefill(test::RandomTokens(n, 9)));
  const int64_t before = session->stats().layers[0].tokens;
  EXPECT_EQ(before, KeptTokens(0.3, plan.guard, n));
  for (const int32_t t : test::RandomTokens(300, 11)) ASSERT_TRUE(session->Decode(t));
  // The share holds for what was seen, and what came later did not push out what was chosen.
  EXPECT_LE(session->stats().layers[0].tokens, KeptTokens(0.3, plan.guard, n + 300) + kPageTokens);
  EXPECT_GT(session->stats().layers[0].tokens, before);
}

struct Head {
  int64_t n, d;
  std::vector<uint16_t> k, v;
  std::vector<float> q;
  Head(int64_t tokens, int64_t head_size, int64_t rows, uint64_t seed) : n(tokens), d(head_size) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    k.assign(static_cast<std::size_t>((n + kPageTokens - 1) / kPageTokens * kPageTokens * d), 0);
    for (int64_t t = 0; t < n; ++t)
      for (int64_t c = 0; c < d; ++c)
        k[static_cast<std::size_t>(t / kPageTokens * d * kPageTokens + c * kPageTokens + t % kPageTokens)] =
            FloatToHalf(normal(random));
    for (int64_t i = 0; i < n * d; ++i) v.push_back(FloatToHalf(normal(random)));
    for (int64_t i = 0; i < rows * d; ++i) q.push_back(0.3f * normal(random));
  }
  DenseView view() const { return {d, k.data(), v.data(), n}; }
  std::vector<float> Keys(const std::vector<uint32_t>& kept) const {
    std::vector<float> keys;
    for (const uint32_t t : kept)
      for (int64_t c = 0; c < d; ++c) keys.push_back(KeyAt(view(), t, c));
    return keys;
  }
};

std::vector<uint32_t> Every(uint32_t step, uint32_t n) {
  std::vector<uint32_t> kept;
  for (uint32_t t = 0; t < n; t += step) kept.push_back(t);
  return kept;
}

// Two threads' numbers, one after the other.
const Parallel kSerial{2, [](int64_t n, const std::function<void(int64_t, int)>& fn) -> Expected<void> {
                         for (int64_t i = 0; i < n; ++i) fn(i, static_cast<int>(i % 2));
                         return {};
                       }};

TEST(RefitValues, BringsAttentionBackToWhatItWas) {
  const Head head(300, 32, 1200, 3);
  const auto kept = Every(3, 300);
  const auto refit = RefitValues(head.view(), kept, head.Keys(kept), {head.q.data(), 1200, 2}, kSerial);
  ASSERT_TRUE(refit);
  ASSERT_EQ(refit->v.size(), kept.size() * 32);
  EXPECT_LT(refit->after, 0.5 * refit->before);
  EXPECT_GT(refit->steps, 0);
  for (const float x : refit->v) ASSERT_TRUE(std::isfinite(x));
}

TEST(RefitValues, LeavesValuesAloneWhereItCannotKnowOrNeedNot) {
  const Head head(300, 32, 1200, 3);
  const auto kept = Every(3, 300), all = Every(1, 300);
  const auto keys = head.Keys(kept);
  // Too few queries, none, and nothing that is missing.
  for (const int64_t rows : {0, 2, 198}) {
    const auto refit = RefitValues(head.view(), kept, keys, {head.q.data(), rows, 2}, kSerial);
    ASSERT_TRUE(refit);
    EXPECT_TRUE(refit->v.empty()) << rows;
  }
  const auto none = RefitValues(head.view(), {}, {}, {head.q.data(), 1200, 2}, kSerial);
  ASSERT_TRUE(none);
  EXPECT_TRUE(none->v.empty());
  const auto full = RefitValues(head.view(), all, head.Keys(all), {head.q.data(), 1200, 2}, kSerial);
  ASSERT_TRUE(full);
  EXPECT_LT(full->before, 1e-5);
}

TEST(RefitValues, APlanThatAsksForItChangesValuesAndNoBytes) {
  const Tiny tiny;
  const auto tokens = test::RandomTokens(700, 13);
  const KvCapture capture = Read(tiny, tokens, "reconstruct");
  Plan plan = FullPlan(tiny.engine->fingerprint(), 700);
  plan.scorer = "reconstruct";
  for (Expert& e : plan.layers) e = {0.3, 4, 4};
  auto plain = SessionFromCapture(tiny.engine, plan, capture);
  plan.refit = true;
  auto refit = SessionFromCapture(tiny.engine, plan, capture);
  ASSERT_TRUE(plain && refit);
  EXPECT_EQ(plain->stats().bytes, refit->stats().bytes);
  ASSERT_TRUE(plain->Decode(5));
  ASSERT_TRUE(refit->Decode(5));
  EXPECT_FALSE(std::ranges::equal(plain->logits(), refit->logits()));
  // The same as a session that reads by itself.
  auto own = Session::Create(tiny.engine, plan);
  ASSERT_TRUE(own);
  ASSERT_TRUE(own->Prefill(tokens));
  ASSERT_TRUE(own->Decode(5));
  EXPECT_TRUE(std::ranges::equal(own->logits(), refit->logits()));
  const auto read = ParsePlan(ToJson(plan), "plan");
  ASSERT_TRUE(read);
  EXPECT_TRUE(read->refit);
}

CalibrateOptions ByReconstruction() {
  CalibrateOptions options;
  options.method = ProfileMethod::kReconstruction;
  options.scorer = kAutoScorer;
  options.most_copy_loss = 100;  // random weights repeat nothing
  options.length = 1200;
  options.chunks = 0;
  return options;
}

TEST(CalibrateByRepetition, MeasuresEveryHeadWithTwoReadings) {
  const Tiny tiny;
  const HyperParams& hp = tiny.engine->model().hparams();
  const std::vector<std::vector<int32_t>> chunks = {test::RandomTokens(1200, 1), test::RandomTokens(1200, 2)};
  int64_t saves = 0;
  const auto profile =
      Calibrate(tiny.engine, chunks, ByReconstruction(), {}, {}, [&](const Profile&) -> Expected<void> {
        ++saves;
        return {};
      });
  ASSERT_TRUE(profile) << profile.error().message;
  EXPECT_EQ(saves, 2 + 2 + 1);  // chunks, probes, check
  EXPECT_EQ(profile->scorer, "reconstruct");
  EXPECT_EQ(profile->method, ProfileMethod::kReconstruction);
  ASSERT_EQ(std::ssize(profile->head_cells), hp.n_layers * hp.n_kv_heads);
  for (const auto& cells : profile->head_cells)
    for (std::size_t e = 0; e < cells.size(); ++e) {
      const Expert& expert = profile->experts[e];
      ASSERT_TRUE(std::isfinite(cells[e].kl) && cells[e].kl >= 0);
      // Fewer tokens at the same bits lose more.
      for (std::size_t o = 0; o < cells.size(); ++o) {
        const Expert& other = profile->experts[o];
        if (other.k_bits == expert.k_bits && other.v_bits == expert.v_bits && other.keep < expert.keep &&
            other.keep > 0.1) {
          EXPECT_GE(cells[o].kl, 0.8 * cells[e].kl) << other.keep << " " << expert.keep;
        }
      }
    }
  EXPECT_EQ(profile->probed, 2);
  ASSERT_EQ(profile->sensitivity.size(), profile->head_cells.size());
  for (const Sensitivity& s : profile->sensitivity) EXPECT_TRUE(s.error >= 0 && s.kl >= 0);
  ASSERT_FALSE(profile->checks.empty());
  EXPECT_TRUE(IsProbed(*profile, profile->chunks));
  for (const bool probes : {false, true}) {
    Profile interrupted = *profile;
    if (probes) {
      interrupted.probed = 1;
    } else {
      interrupted.checks.clear();
    }
    EXPECT_FALSE(IsProbed(interrupted, profile->chunks));
  }
  for (std::size_t i = 1; i < profile->checks.size(); ++i)
    EXPECT_GE(profile->checks[i].predicted, profile->checks[i - 1].predicted);
  const auto again = ParseProfile(ToJson(*profile), "profile");
  ASSERT_TRUE(again) << again.error().message;
  EXPECT_EQ(ToJson(*again), ToJson(*profile));
  SolveRequest request;
  request.variant = FinestVariant(*profile);
  EXPECT_EQ(request.variant, Variant::k2dHeads);
  request.context_length = 8192;
  request.compression = 8;
  const auto solved = Solve(*profile, request);
  ASSERT_TRUE(solved) << solved.error().message;
  EXPECT_TRUE(std::isfinite(solved->expected_kl));
}

TEST(Sensitivities, WeightLossesOfHeadsAndWhatAddsThemUp) {
  Profile profile;
  profile.model.n_layers = 2;
  profile.model.shape = {2, 64};
  profile.experts = {{0.1, 4, 4}, {1.0, 16, 16}};
  profile.cells.assign(2, std::vector<ProfileCell>(2));
  for (int row = 0; row < 4; ++row) profile.head_cells.push_back({{0.5, 1.0 + row}, {0.0, 0.0}});
  Profile weighted = profile;
  WeightLosses(weighted);  // nothing is known
  EXPECT_EQ(weighted.head_cells[3][0].kl, 4.0);
  // The last head's errors move the logits a hundred times as much; of the first one nothing was measured.
  weighted.sensitivity = {{0, 0}, {1, 0.1}, {1, 0.1}, {1, 10}};
  WeightLosses(weighted);
  EXPECT_NEAR(weighted.head_cells[0][0].kl, 1.0 * 10.2 / 3, 1e-9);  // as the mean of all
  EXPECT_NEAR(weighted.head_cells[1][0].kl, 2.0 * 0.1, 2.0 * 0.25);
  EXPECT_NEAR(weighted.head_cells[3][0].kl, 4.0 * 10, 4.0 * 0.5);
  EXPECT_EQ(weighted.cells[1][0].kl, weighted.head_cells[2][0].kl + weighted.head_cells[3][0].kl);
  EXPECT_EQ(weighted.head_cells[3][0].l2, 0.5);
  UnweightLosses(weighted);
  for (std::size_t row = 0; row < 4; ++row)
    EXPECT_NEAR(weighted.head_cells[row][0].kl, profile.head_cells[row][0].kl, 1e-12);
}

TEST(CalibrateByRepetition, AModelThatDoesNotRepeatIsNotMeasuredByIt) {
  const Tiny tiny;
  const std::vector<std::vector<int32_t>> chunks = {test::RandomTokens(600, 1)};
  CalibrateOptions options = ByReconstruction();
  options.most_copy_loss = CalibrateOptions().most_copy_loss;
  const auto refused = Calibrate(tiny.engine, chunks, options, {}, {}, {});
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kUnsupported);
  EXPECT_NE(refused.error().message.find("logits"), std::string::npos);
}

TEST(CalibrateByRepetition, GoesOnWhereItWasInterrupted) {
  const Tiny tiny;
  const std::vector<std::vector<int32_t>> chunks = {test::RandomTokens(900, 1), test::RandomTokens(900, 2)};
  const auto whole = Calibrate(tiny.engine, chunks, ByReconstruction(), {}, {}, {});
  const auto half = Calibrate(tiny.engine, std::span(chunks).first(1), ByReconstruction(), {}, {}, {});
  ASSERT_TRUE(whole && half);
  const auto resumed = Calibrate(tiny.engine, chunks, ByReconstruction(), *half, {}, {});
  ASSERT_TRUE(resumed) << resumed.error().message;
  EXPECT_EQ(ToJson(*resumed), ToJson(*whole));
  CalibrateOptions other = ByReconstruction();
  other.method = ProfileMethod::kLogits;
  const auto refused = Calibrate(tiny.engine, chunks, other, *half, {}, {});
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kMismatch);
}

TEST(ExpectedKl, FollowsTheChecks) {
  Profile profile;
  EXPECT_TRUE(std::isnan(ExpectedKl(profile, 1)));
  profile.checks = {{4, 0.01, 0.002}, {14, 0.1, 0.05}};
  EXPECT_DOUBLE_EQ(ExpectedKl(profile, 0), 0);
  EXPECT_NEAR(ExpectedKl(profile, 0.01), 0.002, 1e-12);
  EXPECT_NEAR(ExpectedKl(profile, 0.1), 0.05, 1e-12);
  EXPECT_NEAR(ExpectedKl(profile, std::sqrt(0.001)), 0.01, 1e-9);  // half way, in logarithms
  EXPECT_NEAR(ExpectedKl(profile, 0.005), 0.001, 1e-12);
  EXPECT_NEAR(ExpectedKl(profile, 0.2), 0.1, 1e-12);
  profile.checks[0].measured = 0;
  EXPECT_TRUE(std::isnan(ExpectedKl(profile, 0.1)));
}

}  // namespace
}  // namespace moend
