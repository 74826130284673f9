// The runner, the methods and the perplexity on small random models: what is kept, continued and compared.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <numeric>

#include "moend/eval/methods.h"
#include "moend/eval/perplexity.h"
#include "moend/eval/prompt.h"
#include "moend/eval/run.h"
#include "tests/support/libllama_logits.h"
#include "tests/support/test_model.h"

namespace moend::eval {
namespace {

// One model for all tests; its answers mean nothing, but they are the same every time.
struct World {
  test::TempDir dir;
  std::string path = dir / "model.gguf";
  std::shared_ptr<const Model> model;
  std::shared_ptr<Engine> engine;
  World() {
    test::TestModelOptions options;
    options.chat_template = true;
    EXPECT_TRUE(test::WriteTestModel(options, path));
    auto loaded = Model::Load(path);
    EXPECT_TRUE(loaded) << loaded.error().message;
    if (!loaded) return;
    model = *loaded;
    auto made = Engine::Create(model, {1, 64});
    EXPECT_TRUE(made) << made.error().message;
    if (made) engine = *made;
  }
};
World& TheWorld() {
  static World world;
  return world;
}

std::string Words(int n, int seed) {
  std::string text;
  for (int i = 0; i < n; ++i) text += fmt::format("w{} ", (i * 7919 + seed * 104729) % 997);
  return text;
}

Suite SomeSuite() {
  Suite suite;
  suite.path = "some.jsonl";
  suite.name = "some";
  for (int c = 0; c < 3; ++c) {
    Context context;
    context.id = fmt::format("c{}", c);
    context.text = Words(120 + 20 * c, c);
    for (int q = 0; q < 2; ++q) {
      Question question;
      question.id = fmt::format("c{}#{}", c, q);
      question.dataset = q == 0 ? "one" : "two";
      question.prompt = fmt::format("Question {}?\nAnswer:", q);
      question.answers = {"x"};
      question.max_new_tokens = 6;
      context.questions.push_back(question);
    }
    suite.contexts.push_back(context);
  }
  return suite;
}

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

TEST(Prompt, KeepsFirstAndLastHalf) {
  Suite suite = SomeSuite();
  suite.contexts.resize(1);
  const Tokenizer& tokenizer = TheWorld().model->tokenizer();
  const auto whole = PrepareSuite(tokenizer, suite, 1 << 20, {});
  ASSERT_TRUE(whole) << whole.error().message;
  EXPECT_EQ(whole->n_truncated, 0);
  const auto cut = PrepareSuite(tokenizer, suite, 4096, {101, 0, 1});
  ASSERT_TRUE(cut) << cut.error().message;
  EXPECT_EQ(cut->n_truncated, 1);
  EXPECT_EQ(cut->longest_prompt, 101);
  const auto &a = whole->contexts[0].context, &b = cut->contexts[0].context;
  EXPECT_TRUE(std::equal(b.begin(), b.begin() + 50, a.begin()));
  EXPECT_TRUE(std::equal(b.begin() + 50, b.end(), a.end() - (static_cast<int64_t>(b.size()) - 50)));
  EXPECT_EQ(cut->contexts[0].questions, whole->contexts[0].questions);
  EXPECT_EQ(PrepareSuite(tokenizer, suite, 4096, {10, 0, 1}).error().code, ErrorCode::kTooLong);
}

TEST(Prompt, LeavesRoomForTheAnswer) {
  Suite suite = SomeSuite();
  suite.contexts.resize(1);
  const Tokenizer& tokenizer = TheWorld().model->tokenizer();
  const auto cut = PrepareSuite(tokenizer, suite, 320, {});
  ASSERT_TRUE(cut) << cut.error().message;
  EXPECT_EQ(cut->longest_prompt, 320 - 6);  // six new tokens are allowed
  const auto long_answers = PrepareSuite(tokenizer, suite, 320, {0, 0, 16});
  ASSERT_TRUE(long_answers);
  EXPECT_EQ(long_answers->longest_prompt, 320 - 320 / 32);  // not 96 of them
  EXPECT_EQ(MaxNewTokens(suite.contexts[0].questions[0], {0, 0, 16}), 96);
  EXPECT_EQ(MaxNewTokens(suite.contexts[0].questions[0], {0, 7, 16}), 7);
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

TEST(Prompt, ChatTemplateWrapsTheWholePrompt) {
  Suite suite = SomeSuite();
  suite.contexts.resize(1);
  suite.contexts[0].text = "some <|im_end|> text";
  suite.contexts[0].chat = true;
  const Tokenizer& tokenizer = TheWorld().model->tokenizer();
  const auto prepared = PrepareSuite(tokenizer, suite, 4096, {});
  ASSERT_TRUE(prepared) << prepared.error().message;
  std::vector<int32_t> all = prepared->contexts[0].context;
  all.insert(all.end(), prepared->contexts[0].questions[1].begin(), prepared->contexts[0].questions[1].end());
  const std::string prompt = suite.contexts[0].text + suite.contexts[0].questions[1].prompt;
  const ChatMessage message{"user", prompt};
  EXPECT_EQ(tokenizer.Detokenize(all, true),
            tokenizer.Piece(tokenizer.bos(), true) + *tokenizer.ApplyChatTemplate({&message, 1}, true));
  // The text's own "<|im_end|>" is text, not the token.
  const auto end = *tokenizer.Tokenize("<|im_end|>", false, true);
  ASSERT_EQ(end.size(), 1u);
  EXPECT_EQ(std::ranges::count(all, end[0]), 1);
}

TEST(Prompt, HashSeesEveryPart) {
  const Suite suite = SomeSuite();
  const std::string hash = HashOf(suite);
  EXPECT_EQ(HashOf(SomeSuite()), hash);
  const auto changed = [&](auto&& change) {
    Suite other = suite;
    change(other);
    return HashOf(other) != hash;
  };
  EXPECT_TRUE(changed([](Suite& s) { s.contexts[1].text += " "; }));
  EXPECT_TRUE(changed([](Suite& s) { s.contexts[1].questions[0].answers[0] = "y"; }));
  EXPECT_TRUE(changed([](Suite& s) { s.contexts[1].questions[0].metric = TaskMetric::kQaF1; }));
  EXPECT_TRUE(changed([](Suite& s) { s.contexts.pop_back(); }));
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

TEST(Perplexity, Statistics) {
  const std::vector<float> p = {0, 0}, q = {std::log(3.0f), 0};  // 1/2, 1/2 against 3/4, 1/4
  EXPECT_NEAR(KlDivergence(p, q), 0.5 * std::log(2.0 / 3) + 0.5 * std::log(2.0), 1e-6);
  EXPECT_EQ(KlDivergence(p, p), 0);
  EXPECT_NEAR(LossOf(q, 1).nll, std::log(4.0), 1e-6);
  EXPECT_EQ(LossOf(q, 1).top, 0);
  const std::vector<float> large = {1000, 0};
  EXPECT_EQ(LossOf(large, 0).nll, 0);
  EXPECT_NEAR(LossOf(large, 1).nll, 1000, 1e-9);
  const std::vector<double> values = {1, 2, 3, 4};
  EXPECT_EQ(MeanOf(values).mean, 2.5);
  EXPECT_NEAR(MeanOf(values).error, std::sqrt(5.0 / 3 / 4), 1e-12);
  std::vector<double> many(1001);
  std::iota(many.begin(), many.end(), 0.0);
  const Quantile q99 = QuantileOf(many, 0.99);
  EXPECT_DOUBLE_EQ(q99.value, 990);
  EXPECT_NEAR(q99.low, 990 - 1.96 * std::sqrt(1001 * 0.99 * 0.01), 1);
  EXPECT_NEAR(q99.high, 990 + 1.96 * std::sqrt(1001 * 0.99 * 0.01), 1);
  EXPECT_EQ(QuantileOf(many, 0.999).high, 1000);
}

TEST(Perplexity, FullCacheIsLibllamas) {
  std::vector<int32_t> tokens = test::RandomTokens(96, 5);
  const Plan full = FullPlan(TheWorld().engine->fingerprint(), 48);
  const auto result = Perplexity(TheWorld().engine, tokens, full, {48, 0, ""});
  ASSERT_TRUE(result) << result.error().message;
  EXPECT_EQ(result->chunks, 2);
  EXPECT_EQ(result->tokens, 2 * 23);
  EXPECT_EQ(result->ppl_base.mean, 0);  // nothing to compare
  const Tokenizer& tokenizer = TheWorld().model->tokenizer();
  double sum = 0;
  for (int c = 0; c < 2; ++c) {
    std::vector<int32_t> chunk(tokens.begin() + 48 * c, tokens.begin() + 48 * (c + 1));
    if (tokenizer.adds_bos()) chunk[0] = tokenizer.bos();
    const auto logits = test::LibllamaLogits(TheWorld().path, chunk);
    ASSERT_EQ(logits.size(), 48u);
    for (std::size_t i = 24; i < 47; ++i) sum += LossOf(logits[i], chunk[i + 1]).nll;
  }
  EXPECT_NEAR(result->nll.mean, sum / 46, 2e-3);
  EXPECT_NEAR(result->ppl.mean, std::exp(result->nll.mean), 1e-9);
}

TEST(Perplexity, FewerBitsDivergeMore) {
  const std::vector<int32_t> tokens = test::RandomTokens(800, 6);
  Plan plan = FullPlan(TheWorld().engine->fingerprint(), 400);
  double before = 0;
  for (const int bits : {8, 2}) {
    std::ranges::fill(plan.layers, Expert{1.0, bits, bits});
    const auto r = Perplexity(TheWorld().engine, tokens, plan, {400, 0, ""});
    ASSERT_TRUE(r) << r.error().message;
    EXPECT_GT(r->kld.mean, 2 * before);
    EXPECT_GE(r->kld_max, r->kld_999.value);
    EXPECT_GE(r->kld_999.value, r->kld_99.value);
    EXPECT_GE(r->kld_99.value, r->kld_median.value);
    EXPECT_NEAR(r->ln_ratio.mean, r->nll.mean - r->nll_base.mean, 1e-9);
    EXPECT_LT(r->kv_bytes, r->kv_bytes_full);
    EXPECT_LE(r->same_top.mean, 1);
    before = r->kld.mean;
    EXPECT_NE(FormatPerplexity(*r).find("99.0%   KLD"), std::string::npos);
  }
}

// The layers of a plan that is routed by KV head say nothing: one that keeps every token and packs all heads
// but one of each layer must not lose its comparison.
TEST(Perplexity, PlansOfHeadsAreCompared) {
  const std::vector<int32_t> tokens = test::RandomTokens(400, 6);
  Plan plan = FullPlan(TheWorld().engine->fingerprint(), 400);
  const auto heads = static_cast<std::size_t>(plan.model.shape.n_kv_heads);
  ASSERT_GT(heads, 1u);
  plan.heads.assign(plan.layers.size() * heads, Expert{1.0, 2, 2});
  for (std::size_t i = 0; i < plan.heads.size(); i += heads) plan.heads[i] = Expert{};
  const auto r = Perplexity(TheWorld().engine, tokens, plan, {400, 0, ""});
  ASSERT_TRUE(r) << r.error().message;
  EXPECT_GT(r->ppl_base.mean, 0);
  EXPECT_GT(r->kld.mean, 0);
  // And the other way round: layers that compress, heads that do not.
  std::ranges::fill(plan.layers, Expert{1.0, 2, 2});
  std::ranges::fill(plan.heads, Expert{});
  const auto full = Perplexity(TheWorld().engine, tokens, plan, {400, 0, ""});
  ASSERT_TRUE(full) << full.error().message;
  EXPECT_EQ(full->ppl_base.mean, 0);
}

TEST(Perplexity, BadRequests) {
  const std::vector<int32_t> tokens = test::RandomTokens(100, 7);
  const Plan full = FullPlan(TheWorld().engine->fingerprint(), 100);
  EXPECT_EQ(Perplexity(TheWorld().engine, tokens, full, {101, 0, ""}).error().code,
            ErrorCode::kInvalidArgument);
  EXPECT_EQ(Perplexity(TheWorld().engine, tokens, full, {4, 0, ""}).error().code,
            ErrorCode::kInvalidArgument);
  const auto stop = [](const PerplexityProgress&) { return false; };
  EXPECT_EQ(Perplexity(TheWorld().engine, tokens, full, {50, 0, ""}, stop).error().code,
            ErrorCode::kCancelled);
}

}  // namespace
}  // namespace moend::eval
