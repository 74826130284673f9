// The runner and the methods on small random models: what is kept, continued and compared.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>

#include "moend/eval/methods.h"
#include "moend/eval/paired.h"
#include "moend/eval/prompt.h"
#include "moend/eval/run.h"
#include "tests/support/eval_world.h"

namespace moend::eval {
namespace {

using test::SomeSuite;
using test::TheWorld;

Profile SomeProfile(const Fingerprint& model) {
  Profile p;
  p.model = model;
  p.scorer = "keydiff";
  p.guard = {4, 12};
  p.length = 1024;
  p.chunks = p.chunks_wanted = 1;
  for (const double keep : {0.05, 0.25, 0.5, 1.0})
    for (const auto& [k, v] : {std::pair{2, 2}, {4, 2}, {4, 4}, {8, 4}, {16, 16}})
      p.experts.push_back({keep, k, v});
  std::ranges::sort(p.experts);
  for (int64_t l = 0; l < model.n_layers; ++l) {
    auto& row = p.cells.emplace_back();
    for (const Expert& e : p.experts) {
      const double loss =
          static_cast<double>(l + 1) * ((1 / e.keep - 1) * 0.01 + std::exp2(-e.k_bits - e.v_bits));
      row.push_back({std::sqrt(loss), loss});
    }
  }
  return p;
}

std::vector<Method> SomeMethods(int64_t context_length) {
  const Fingerprint model = TheWorld().engine->fingerprint();
  const Profile profile = SomeProfile(model);
  MethodRequest request;
  request.variants = {"full", "1d", "2d_hetero", "q4"};
  request.compressions = {4};
  request.scorers = {"streaming", "keydiff"};
  request.context_length = context_length;
  std::vector<std::string> skipped;
  auto methods = MakeMethods(model, &profile, request, skipped);
  EXPECT_TRUE(methods) << methods.error().message;
  EXPECT_TRUE(skipped.empty());
  return *methods;
}

// An evaluation with all that it saves; stops when `budget` questions' worth of progress calls are spent.
struct Outcome {
  Expected<Results> results;
  std::string saved;
  int saves = 0;
};
Outcome Go(const EvalOptions& options, const std::vector<Method>& methods, const std::string& previous = "",
           int calls = -1) {
  const Suite suite = SomeSuite();
  auto prepared = PrepareSuite(TheWorld().model->tokenizer(), suite, 4096, {});
  EXPECT_TRUE(prepared) << prepared.error().message;
  Results start;
  start.settings = SettingsOf(suite, options, 2000);
  if (!previous.empty()) {
    auto loaded = ParseResults(previous, "previous");
    EXPECT_TRUE(loaded) << loaded.error().message;
    EXPECT_TRUE(CheckContinues(*loaded, TheWorld().engine->fingerprint(), start.settings, "previous"));
    start = *loaded;
  }
  Outcome out;
  const auto save = [&](const Results& r) -> Expected<void> {
    out.saved = ToJson(r);
    ++out.saves;
    return {};
  };
  double last = 0;
  const auto progress = [&](const EvalProgress& p) {
    EXPECT_GE(p.share, last - 1e-9);
    EXPECT_LE(p.share, 1);
    last = p.share;
    return calls < 0 || calls-- > 0;
  };
  out.results = Evaluate(TheWorld().engine, suite, *prepared, methods, options, start, progress, save);
  return out;
}

TEST(Methods, AllVariantsMeetTheBudget) {
  const Fingerprint model = TheWorld().engine->fingerprint();
  const Profile profile = SomeProfile(model);
  MethodRequest request;
  request.variants = MethodNames();
  std::erase(request.variants, "2d_heads");  // needs a profile of single heads
  request.compressions = {3, 14};
  request.scorers = {"streaming", "h2o"};
  request.context_length = 4000;
  std::vector<std::string> skipped;
  const auto methods = MakeMethods(model, &profile, request, skipped);
  ASSERT_TRUE(methods) << methods.error().message;
  const double full = static_cast<double>(FullBytes(model, 4000));
  int of_full = 0, of_q = 0, of_kvtuner = 0, of_pyramid = 0;
  for (const Method& m : *methods) {
    ASSERT_EQ(static_cast<int64_t>(m.plan.layers.size()), model.n_layers);
    EXPECT_EQ(m.plan.variant, m.variant);
    of_full += m.variant == "full";
    of_q += m.variant[0] == 'q';
    of_kvtuner += m.variant == "kvtuner";
    of_pyramid += m.variant == "pyramid";
    const bool evicts = std::ranges::any_of(m.plan.layers, [](const Expert& e) { return e.keep < 1; });
    const bool never = m.variant == "full" || m.variant == "kvtuner" || m.variant[0] == 'q';
    EXPECT_EQ(never, m.scorer.empty()) << m.variant;
    if (m.compression == 0) continue;
    EXPECT_LE(static_cast<double>(m.plan.bytes), full / m.compression) << m.variant << " " << m.compression;
    EXPECT_EQ(m.plan.bytes, *PlanBytes(m.plan, 4000, m.scorer == "h2o" ? 4 : 0))
        << m.variant << " " << m.scorer;
    EXPECT_FALSE(m.variant == "kvtuner" && evicts);
    if (m.variant == "pyramid") {
      EXPECT_GE(m.plan.layers.front().keep, m.plan.layers.back().keep);
      EXPECT_GT(static_cast<double>(m.plan.bytes), 0.9 * full / m.compression);
    }
  }
  EXPECT_EQ(of_full, 1);
  EXPECT_EQ(of_q, 4);
  EXPECT_EQ(of_kvtuner, 1);  // without eviction 14x is out of reach
  EXPECT_EQ(of_pyramid, 4);
  ASSERT_EQ(skipped.size(), 1u);
  EXPECT_TRUE(skipped[0].starts_with("kvtuner at 14x is left out")) << skipped[0];
}

TEST(Methods, WrongRequestsAreErrors) {
  const Fingerprint model = TheWorld().engine->fingerprint();
  std::vector<std::string> skipped;
  MethodRequest request;
  request.context_length = 100;
  request.variants = {"3d"};
  EXPECT_EQ(MakeMethods(model, nullptr, request, skipped).error().code, ErrorCode::kNotFound);
  request.variants = {"1d"};
  request.compressions = {4};
  EXPECT_EQ(MakeMethods(model, nullptr, request, skipped).error().code, ErrorCode::kInvalidArgument);
  Profile profile = SomeProfile(model);
  request.compressions = {};
  EXPECT_EQ(MakeMethods(model, &profile, request, skipped).error().code, ErrorCode::kInvalidArgument);
  request.compressions = {4};
  request.scorers = {"nobody"};
  EXPECT_EQ(MakeMethods(model, &profile, request, skipped).error().code, ErrorCode::kNotFound);
  profile.model.hash = "other";
  request.scorers = {};
  EXPECT_EQ(MakeMethods(model, &profile, request, skipped).error().code, ErrorCode::kMismatch);
}

TEST(Run, KvInFilesChangesNoAnswer) {
  Suite suite = SomeSuite();
  const auto prepared = PrepareSuite(TheWorld().model->tokenizer(), suite, 4096, {});
  ASSERT_TRUE(prepared);
  const std::vector<Method> full = {MethodOf(FullPlan(TheWorld().engine->fingerprint(), 4096), "")};
  const auto save = [](const Results&) -> Expected<void> { return {}; };
  EvalOptions options;
  const auto memory = Evaluate(TheWorld().engine, suite, *prepared, full, options, {}, {}, save);
  options.spill = TheWorld().dir / "";
  const auto files = Evaluate(TheWorld().engine, suite, *prepared, full, options, {}, {}, save);
  ASSERT_TRUE(memory && files);
  ASSERT_EQ(memory->runs[0].answers.size(), files->runs[0].answers.size());
  for (std::size_t i = 0; i < memory->runs[0].answers.size(); ++i)
    EXPECT_EQ(memory->runs[0].answers[i].text, files->runs[0].answers[i].text);
  options.spill = "/nowhere/at/all";
  EXPECT_EQ(Evaluate(TheWorld().engine, suite, *prepared, full, options, {}, {}, save).error().code,
            ErrorCode::kIo);
}

TEST(Run, AnAnswerMayPassTheTrainedContext) {
  Suite suite = SomeSuite();
  suite.contexts.resize(1);
  suite.contexts[0].questions.resize(1);
  Question& question = suite.contexts[0].questions[0];
  question.max_new_tokens = 40;
  question.stop.clear();
  const int64_t n_ctx = TheWorld().model->hparams().n_ctx_train;
  const Tokenizer& tokenizer = TheWorld().model->tokenizer();
  const auto base = PrepareSuite(tokenizer, suite, n_ctx, {});
  ASSERT_TRUE(base) << base.error().message;
  // As many words more as fit.
  const std::string word = " word";
  const auto tokens = tokenizer.Tokenize(word, false, false);
  ASSERT_TRUE(tokens);
  int64_t more = (n_ctx - base->longest_prompt) / static_cast<int64_t>(tokens->size());
  for (; more > 0; --more) suite.contexts[0].text += word;
  const auto prepared = PrepareSuite(tokenizer, suite, n_ctx, {});
  ASSERT_TRUE(prepared) << prepared.error().message;
  EXPECT_EQ(prepared->n_truncated, 0);
  ASSERT_GT(prepared->longest_prompt, n_ctx - 16);
  const std::vector<Method> full = {MethodOf(FullPlan(TheWorld().engine->fingerprint(), n_ctx), "")};
  const auto save = [](const Results&) -> Expected<void> { return {}; };
  const auto results = Evaluate(TheWorld().engine, suite, *prepared, full, {}, {}, {}, save);
  ASSERT_TRUE(results) << results.error().message;
  EXPECT_GT(results->runs[0].answers[0].tokens, 16);
}

TEST(Run, ComparesPredictionsWithTheFullCaches) {
  const auto methods = SomeMethods(2000);
  for (const bool aware : {false, true}) {
    EvalOptions options;
    options.aware = aware;
    const Outcome out = Go(options, methods);
    ASSERT_TRUE(out.results) << out.results.error().message;
    const eval::Run* full = FullRun(*out.results);
    ASSERT_EQ(full, &out.results->runs[0]);
    for (const auto& run : out.results->runs) {
      double kld = 0, tokens = 0;
      for (const Answer& a : run.answers) {
        EXPECT_GT(a.gold_tokens, 0);
        EXPECT_GT(a.nll, 0);
        EXPECT_EQ(std::ssize(a.ids), a.tokens);
        EXPECT_EQ(std::ssize(a.kld), &run == full ? 0 : a.gold_tokens);
        for (const float d : a.kld) kld += d;
        tokens += static_cast<double>(a.kld.size());
      }
      const Paired p = ComparePaired(run, full);
      EXPECT_EQ(p.difference.clusters, 3);
      if (&run == full) {
        EXPECT_EQ(p.difference.mean, 0);
        EXPECT_EQ(p.agreed, p.answer_tokens);
        continue;
      }
      EXPECT_NEAR(p.kld.mean, kld / tokens, 1e-9);
      if (run.variant != "q4") {
        EXPECT_GT(p.kld.mean, 0) << run.label();
      }
    }
  }
}

// A method that loses nothing is at no distance, whatever the order of the methods.
TEST(Run, ALosslessPlanHasNoDivergence) {
  Plan plan = FullPlan(TheWorld().engine->fingerprint(), 4000);
  plan.variant = "most";
  plan.layers[0].keep = 0.999999;  // counts as compressing, evicts nothing of so short a context
  const auto methods = SomeMethods(2000);
  const Outcome out = Go({}, {MethodOf(plan, "keydiff"), methods[0]});
  ASSERT_TRUE(out.results) << out.results.error().message;
  const Paired p = ComparePaired(out.results->runs[0], FullRun(*out.results));
  EXPECT_GT(p.kld.n, 0);
  EXPECT_LT(p.kld.mean, 1e-4);
  EXPECT_GT(p.same_top, 0.9);
}

TEST(Run, ChoicesAreScoredByTheLetters) {
  Suite suite = SomeSuite();
  suite.contexts.resize(1);
  for (Question& q : suite.contexts[0].questions) q.metric = TaskMetric::kChoice, q.answers = {"B"};
  const auto prepared = PrepareSuite(TheWorld().model->tokenizer(), suite, 4096, {});
  ASSERT_TRUE(prepared);
  const std::vector<Method> full = {MethodOf(FullPlan(TheWorld().engine->fingerprint(), 4096), "")};
  std::string saved;
  const auto save = [&](const Results& r) -> Expected<void> {
    saved = ToJson(r);
    return {};
  };
  const auto results = Evaluate(TheWorld().engine, suite, *prepared, full, {}, {}, {}, save);
  ASSERT_TRUE(results) << results.error().message;
  for (const Answer& a : results->runs[0].answers) {
    ASSERT_EQ(a.letters.size(), 4u);
    const bool right = std::ranges::max_element(a.letters) - a.letters.begin() == 1;
    EXPECT_EQ(a.score, right ? 1 : 0);
    EXPECT_EQ(a.letter_score, ChosenLetter(a.text) == 'B' ? 1 : 0);
    double sum = 0;
    for (const double l : a.letters) sum += std::exp(l);
    EXPECT_LT(sum, 1.0001);
    EXPECT_GT(sum, 0);
  }
  const auto back = ParseResults(saved, "saved");
  ASSERT_TRUE(back) << back.error().message;
  EXPECT_EQ(ToJson(*back), saved);
  EXPECT_NE(FormatTable(*results).find("letter"), std::string::npos);
}

TEST(Run, AnswersEveryQuestionOfEveryMethod) {
  const auto methods = SomeMethods(2000);
  const Outcome out = Go({}, methods);
  ASSERT_TRUE(out.results) << out.results.error().message;
  EXPECT_TRUE(out.results->complete);
  EXPECT_GE(out.saves, 3);
  ASSERT_EQ(out.results->runs.size(), methods.size());
  for (std::size_t m = 0; m < methods.size(); ++m) {
    const auto& run = out.results->runs[m];
    EXPECT_EQ(run.contexts.size(), 3u);
    EXPECT_EQ(run.answers.size(), 6u);
    EXPECT_EQ(run.answers[3].id, "c1#1");
    EXPECT_GT(run.kv_bytes(), 0);
    for (const Answer& a : run.answers) EXPECT_LE(a.tokens, 6);
  }
  EXPECT_LT(out.results->runs[0].ratio(), 1.05);  // full
  EXPECT_GT(out.results->runs.back().ratio(), 1.5);
  EXPECT_EQ(ToJson(*out.results), out.saved);
}

TEST(Run, ReadingOnceChangesNothing) {
  const auto methods = SomeMethods(2000);
  EvalOptions plain;
  plain.capture = false;
  const Outcome once = Go({}, methods), anew = Go(plain, methods);
  ASSERT_TRUE(once.results);
  ASSERT_TRUE(anew.results) << anew.results.error().message;
  EXPECT_EQ(once.saved, anew.saved);
}

TEST(Run, InterruptedAnywhereItContinues) {
  const auto methods = SomeMethods(2000);
  const Outcome whole = Go({}, methods);
  ASSERT_TRUE(whole.results);
  for (const int calls : {0, 1, 15, 60, 130}) {
    const Outcome part = Go({}, methods, "", calls);
    ASSERT_FALSE(part.results) << calls;
    EXPECT_EQ(part.results.error().code, ErrorCode::kCancelled);
    ASSERT_FALSE(part.saved.empty());
    const auto saved = ParseResults(part.saved, "part");
    ASSERT_TRUE(saved) << saved.error().message;
    EXPECT_FALSE(saved->complete);
    const Outcome rest = Go({}, methods, part.saved);
    ASSERT_TRUE(rest.results) << rest.results.error().message;
    EXPECT_EQ(rest.saved, whole.saved) << "stopped after " << calls;
  }
}

TEST(Run, FurtherMethodsJoinTheFile) {
  const auto methods = SomeMethods(2000);
  const Outcome first = Go({}, {methods[0]});
  const Outcome both = Go({}, {methods[1]}, first.saved);
  ASSERT_TRUE(both.results) << both.results.error().message;
  ASSERT_EQ(both.results->runs.size(), 2u);
  EXPECT_EQ(both.results->runs[0].answers.size(), 6u);
  EXPECT_EQ(both.results->runs[1].answers.size(), 6u);
  EXPECT_EQ(both.results->runs[1].variant, "1d");
}

TEST(Run, AwareEqualsAgnosticWhenNothingIsLost) {
  const std::vector<Method> full = {SomeMethods(2000)[0]};
  EvalOptions aware;
  aware.aware = true;
  const Outcome a = Go({}, full), b = Go(aware, full);
  ASSERT_TRUE(a.results);
  ASSERT_TRUE(b.results) << b.results.error().message;
  for (std::size_t i = 0; i < 6; ++i)
    EXPECT_EQ(a.results->runs[0].answers[i].text, b.results->runs[0].answers[i].text);
  EXPECT_EQ(b.results->runs[0].mode, "aware");
  EXPECT_GT(b.results->runs[0].contexts[0].tokens, a.results->runs[0].contexts[0].tokens);
}

TEST(Run, AnotherEvaluationIsNotContinued) {
  const Suite suite = SomeSuite();
  Results results;
  results.model = TheWorld().engine->fingerprint();
  results.settings = SettingsOf(suite, {}, 2000);
  const auto refused = [&](auto&& change) {
    Settings settings = results.settings;
    change(settings);
    const auto status = CheckContinues(results, results.model, settings, "out.json");
    return !status && status.error().code == ErrorCode::kMismatch &&
           status.error().message.starts_with("out.json");
  };
  EXPECT_FALSE(refused([](Settings&) {}));
  EXPECT_FALSE(refused([](Settings& s) { s.suite = "moved.jsonl"; }));
  EXPECT_TRUE(refused([](Settings& s) { s.suite_hash = "0"; }));
  EXPECT_TRUE(refused([](Settings& s) { s.mode = "aware"; }));
  EXPECT_TRUE(refused([](Settings& s) { s.prompt_tokens = 1; }));
  EXPECT_TRUE(refused([](Settings& s) { s.max_new_tokens = 1; }));
  EXPECT_TRUE(refused([](Settings& s) { s.max_new_scale = 16; }));
  EXPECT_TRUE(refused([](Settings& s) { s.context_length = 1; }));
  Fingerprint other = results.model;
  other.hash = "other";
  EXPECT_FALSE(CheckContinues(results, other, results.settings, "out.json"));
}

}  // namespace
}  // namespace moend::eval
