#include "moend/eval/run.h"

#include <algorithm>
#include <chrono>
#include <optional>

#include "moend/base/spill.h"
#include "moend/engine/capture.h"
#include "moend/engine/generate.h"
#include "moend/eval/judge.h"

namespace moend::eval {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::seconds kSaveInterval{30};
// What a generated token costs, in tokens read; for the estimate of the time left only.
constexpr double kDecodeCost = 6;

class Captured : public ContextSource {
 public:
  Captured(std::shared_ptr<Engine> engine, std::vector<std::string> scorers, std::shared_ptr<Ledger> ledger,
           std::shared_ptr<const LearnedScores> learned)
      : engine_(std::move(engine)),
        scorers_(std::move(scorers)),
        ledger_(std::move(ledger)),
        learned_(std::move(learned)) {}

  Expected<void> Read(std::span<const int32_t> tokens, const Progress& progress) override {
    capture_.reset();  // before the next one asks for as much memory
    MOEND_ASSIGN(capture_, KvCapture::Create(engine_, tokens, scorers_, progress, ledger_, learned_));
    return {};
  }
  Expected<Session> Open(const Method& method, int64_t n_ctx) override {
    return SessionFromCapture(engine_, method.plan, *capture_, {n_ctx, method.scorer});
  }

 private:
  std::shared_ptr<Engine> engine_;
  std::vector<std::string> scorers_;
  std::shared_ptr<Ledger> ledger_;
  std::shared_ptr<const LearnedScores> learned_;
  std::optional<KvCapture> capture_;
};

class Plain : public ContextSource {
 public:
  explicit Plain(std::shared_ptr<Engine> engine) : engine_(std::move(engine)) {}

  Expected<void> Read(std::span<const int32_t> tokens, const Progress& progress) override {
    tokens_.assign(tokens.begin(), tokens.end());
    progress_ = progress;
    return {};
  }
  Expected<Session> Open(const Method& method, int64_t n_ctx) override {
    MOEND_ASSIGN(Session session, Session::Create(engine_, method.plan, {n_ctx, method.scorer}));
    MOEND_TRY(session.Prefill(tokens_, progress_));
    return session;
  }

 private:
  std::shared_ptr<Engine> engine_;
  std::vector<int32_t> tokens_;
  Progress progress_;
};

std::vector<std::string> ScorersOf(std::span<const Method> methods) {
  std::vector<std::string> scorers;
  for (const Method& method : methods)
    if (!method.scorer.empty() && std::ranges::find(scorers, method.scorer) == scorers.end())
      scorers.push_back(method.scorer);
  return scorers;
}

bool IsRunOf(const Run& run, const Method& method) {
  return run.variant == method.variant && run.scorer == method.scorer &&
         run.compression == method.compression && run.plan.layers == method.plan.layers &&
         run.plan.heads == method.plan.heads && run.plan.guard == method.plan.guard;
}

class Runner {
 public:
  Runner(std::shared_ptr<Engine> engine, const Suite& suite, const PreparedSuite& prepared,
         std::span<const Method> methods, const EvalOptions& options, std::shared_ptr<Ledger> ledger,
         Results& results, const std::function<bool(const EvalProgress&)>& progress,
         const std::function<Expected<void>(const Results&)>& save, Judge judge)
      : judge_(std::move(judge)),
        full_(MethodOf(FullPlan(engine->fingerprint(), results.settings.context_length), "")),
        suite_(suite),
        prepared_(prepared),
        methods_(methods),
        options_(options),
        results_(results),
        progress_(progress),
        save_(save),
        saved_(Clock::now()) {
    source_ = options.capture
                  ? CapturedContext(engine, ScorersOf(methods), std::move(ledger), LearnedOf(methods))
                  : PlainContext(engine);
    for (const Method& method : methods) runs_.push_back(RunOf(method));
    for (std::size_t c = 0; c < suite.contexts.size(); ++c) total_ += CostOf(c, Pending(c));
  }

  Expected<void> Run() {
    auto status = AllContexts();
    results_.complete = status.has_value();
    // A failure must not cost what is answered; if saving fails as well, the first error is the one to show.
    auto saved = save_(results_);
    if (!status) return status;
    return saved;
  }

 private:
  // Index of the method's run in the results, a new one if there is none.
  std::size_t RunOf(const Method& method) {
    const auto it =
        std::ranges::find_if(results_.runs, [&](const auto& run) { return IsRunOf(run, method); });
    if (it != results_.runs.end()) return static_cast<std::size_t>(it - results_.runs.begin());
    eval::Run run;
    run.variant = method.variant;
    run.scorer = method.scorer;
    run.mode = results_.settings.mode;
    run.compression = method.compression;
    run.plan = method.plan;
    run.plan.queries = nullptr;  // long, and nothing that tells runs apart
    run.plan.learned = nullptr;
    results_.runs.push_back(std::move(run));
    return results_.runs.size() - 1;
  }

  bool Finished(std::size_t method, std::size_t context) const {
    const auto& done = results_.runs[runs_[method]].contexts;
    return std::ranges::any_of(done, [&](const auto& c) { return c.id == suite_.contexts[context].id; });
  }

  Expected<void> AllContexts() {
    for (std::size_t c = 0; c < suite_.contexts.size(); ++c) {
      const std::vector<std::size_t> pending = Pending(c);
      if (pending.empty()) continue;
      if (options_.aware) {
        MOEND_TRY(Aware(c, pending));
      } else {
        MOEND_TRY(Agnostic(c, pending));
      }
      MOEND_TRY(Save());
    }
    return {};
  }

  std::vector<std::size_t> Pending(std::size_t context) const {
    std::vector<std::size_t> pending;
    for (std::size_t m = 0; m < methods_.size(); ++m)
      if (!Finished(m, context)) pending.push_back(m);
    return pending;
  }

  // Compressed before the questions are known: one reading, one compression a method, a fork a question.
  Expected<void> Agnostic(std::size_t c, const std::vector<std::size_t>& pending) {
    const PreparedContext& prepared = prepared_.contexts[c];
    const auto n_questions = prepared.questions.size();
    MOEND_TRY(source_->Read(prepared.context, Reading(c, Length(prepared.context))));
    done_ += ReadCost(prepared.context);
    int64_t room = 0;
    for (std::size_t q = 0; q < n_questions; ++q) room = std::max(room, Room(c, q));
    const int64_t n_ctx = Length(prepared.context) + room;
    std::vector<GoldRows> reference;
    if (AnyCompresses(pending)) {
      MOEND_ASSIGN(const Session base, source_->Open(full_, n_ctx));
      for (std::size_t q = 0; q < n_questions; ++q) {
        if (!Tick(c, "full", 0)) return Stopped();
        MOEND_ASSIGN(Session session, base.Fork());
        MOEND_TRY(session.Prefill(prepared.questions[q]));
        MOEND_ASSIGN(GoldRows rows, judge_.Read(session, prepared.golds[q]));
        reference.push_back(std::move(rows));
      }
    }
    for (const std::size_t m : pending) {
      MOEND_ASSIGN(Session base, source_->Open(methods_[m], n_ctx));
      const KvStats stats = base.stats();
      std::vector<Answer> answers;
      for (std::size_t q = 0; q < n_questions; ++q) {
        if (!Tick(c, methods_[m].variant, 0)) return Stopped();
        MOEND_ASSIGN(Session session, base.Fork());
        MOEND_TRY(session.Prefill(prepared.questions[q]));
        MOEND_ASSIGN(Answer answer, Ask(session, c, q, m, reference.empty() ? nullptr : &reference[q]));
        answers.push_back(std::move(answer));
        done_ += CostOf(c, q);
      }
      MOEND_TRY(Finish(m, {suite_.contexts[c].id, Length(prepared.context), stats.bytes, stats.bytes_full},
                       std::move(answers)));
    }
    return {};
  }

  // Each question is part of what is read and compressed.
  Expected<void> Aware(std::size_t c, const std::vector<std::size_t>& pending) {
    const PreparedContext& prepared = prepared_.contexts[c];
    const auto n = prepared.questions.size();
    std::vector<std::vector<Answer>> answers(pending.size());
    std::vector<KvStats> sums(pending.size());
    int64_t tokens = 0;
    for (std::size_t q = 0; q < n; ++q) {
      std::vector<int32_t> prompt = prepared.context;
      prompt.insert(prompt.end(), prepared.questions[q].begin(), prepared.questions[q].end());
      tokens += Length(prompt);
      const int64_t n_ctx = Length(prepared.context) + Room(c, q);
      MOEND_TRY(source_->Read(prompt, Reading(c, Length(prompt))));
      done_ += ReadCost(prompt);
      std::optional<GoldRows> reference;
      if (AnyCompresses(pending)) {
        MOEND_ASSIGN(const Session base, source_->Open(full_, n_ctx));
        MOEND_ASSIGN(reference, judge_.Read(base, prepared.golds[q]));
      }
      for (std::size_t i = 0; i < pending.size(); ++i) {
        if (!Tick(c, methods_[pending[i]].variant, 0)) return Stopped();
        MOEND_ASSIGN(Session session, source_->Open(methods_[pending[i]], n_ctx));
        const KvStats stats = session.stats();
        sums[i].bytes += stats.bytes;
        sums[i].bytes_full += stats.bytes_full;
        MOEND_ASSIGN(Answer answer, Ask(session, c, q, pending[i], reference ? &*reference : nullptr));
        answers[i].push_back(std::move(answer));
        done_ += CostOf(c, q);
      }
    }
    const auto count = static_cast<int64_t>(n);
    for (std::size_t i = 0; i < pending.size(); ++i)
      MOEND_TRY(
          Finish(pending[i],
                 {suite_.contexts[c].id, tokens / count, sums[i].bytes / count, sums[i].bytes_full / count},
                 std::move(answers[i])));
    return {};
  }

  // A session that has read the question answers it. `full`: what the full cache predicts for the right
  // answer, or null.
  Expected<Answer> Ask(Session& session, std::size_t c, std::size_t q, std::size_t method,
                       const GoldRows* full) {
    const Question& question = suite_.contexts[c].questions[q];
    const std::vector<int32_t>& gold = prepared_.contexts[c].golds[q];
    Answer answer;
    answer.id = question.id;
    answer.dataset = question.dataset;
    MOEND_ASSIGN(const GoldRows rows, judge_.Read(session, gold));
    MOEND_TRY(judge_.Compare(rows, Compresses(methods_[method].plan) ? full : nullptr, gold, answer));
    if (question.metric == TaskMetric::kChoice) answer.letters = judge_.Letters(session.logits());
    GenerateOptions generate;
    generate.max_tokens = MaxNew(question);
    generate.sampler.temperature = 0;
    generate.stop = question.stop;
    bool stopped = false;
    std::string said;
    int64_t pieces = 0;
    // A long answer must be stoppable too.
    const auto emit = [&](std::string_view text) {
      stopped = !Tick(c, methods_[method].variant, kDecodeCost * static_cast<double>(++pieces));
      if (stopped || !question.first_line) return !stopped;
      return !FirstLineEnded(said += text);
    };
    MOEND_ASSIGN(Generated generated, Generate(session, generate, emit));
    if (stopped) return Stopped();
    answer.score = ScoreAnswer(question, generated.text);
    if (!answer.letters.empty()) {
      answer.letter_score = answer.score;
      answer.score = LikeliestLetter(answer.letters) == question.answers[0][0] ? 1 : 0;
    }
    answer.tokens = static_cast<int64_t>(generated.tokens.size());
    answer.ids = std::move(generated.tokens);
    answer.text = std::move(generated.text);
    return answer;
  }

  static char LikeliestLetter(const std::vector<double>& letters) {
    return static_cast<char>('A' + (std::ranges::max_element(letters) - letters.begin()));
  }

  Expected<void> Finish(std::size_t method, FinishedContext context, std::vector<Answer> answers) {
    auto& run = results_.runs[runs_[method]];
    run.contexts.push_back(std::move(context));
    std::ranges::move(answers, std::back_inserter(run.answers));
    if (Clock::now() - saved_ < kSaveInterval) return {};
    return Save();
  }

  Expected<void> Save() {
    saved_ = Clock::now();
    return save_(results_);
  }

  // `more`: cost of the part of the current step that is done.
  bool Tick(std::size_t c, const std::string& method, double more) {
    if (!progress_) return true;
    shown_ = std::max(shown_, std::min(1.0, (done_ + more) / std::max(total_, 1.0)));
    return progress_({shown_, suite_.contexts[c].id, method});
  }

  // While a context is read; one that is read anew for each method shows no progress in between.
  Progress Reading(std::size_t c, int64_t tokens) {
    return [this, c, tokens](double share) {
      return Tick(c, "", options_.capture ? share * static_cast<double>(tokens) : 0);
    };
  }

  static double ReadCost(const std::vector<int32_t>& tokens) { return static_cast<double>(tokens.size()); }
  double CostOf(std::size_t c, std::size_t q) const {
    const PreparedContext& prepared = prepared_.contexts[c];
    return ReadCost(prepared.questions[q]) + ReadCost(prepared.golds[q]) +
           kDecodeCost * static_cast<double>(MaxNew(suite_.contexts[c].questions[q]));
  }
  double CostOf(std::size_t c, const std::vector<std::size_t>& pending) const {
    if (pending.empty()) return 0;
    const PreparedContext& prepared = prepared_.contexts[c];
    double cost = options_.aware ? 0 : ReadCost(prepared.context);
    for (std::size_t q = 0; q < prepared.questions.size(); ++q) {
      if (options_.aware) cost += ReadCost(prepared.context) + ReadCost(prepared.questions[q]);
      cost += static_cast<double>(pending.size()) * CostOf(c, q);
    }
    return cost;
  }

  bool AnyCompresses(const std::vector<std::size_t>& pending) const {
    return std::ranges::any_of(pending, [&](std::size_t m) { return Compresses(methods_[m].plan); });
  }

  // Tokens that a question and its answers, the generated and the right one, may take.
  int64_t Room(std::size_t c, std::size_t q) const {
    const PreparedContext& prepared = prepared_.contexts[c];
    return Length(prepared.questions[q]) +
           std::max(MaxNew(suite_.contexts[c].questions[q]), Length(prepared.golds[q]));
  }

  static std::unexpected<Error> Stopped() {
    return Fail(ErrorCode::kCancelled, "the evaluation was stopped; the same command continues it");
  }

  int64_t MaxNew(const Question& question) const { return MaxNewTokens(question, options_.lengths); }

  static int64_t Length(const std::vector<int32_t>& tokens) { return static_cast<int64_t>(tokens.size()); }

  Judge judge_;
  Method full_;
  const Suite& suite_;
  const PreparedSuite& prepared_;
  std::span<const Method> methods_;
  const EvalOptions& options_;
  Results& results_;
  const std::function<bool(const EvalProgress&)>& progress_;
  const std::function<Expected<void>(const Results&)>& save_;
  std::unique_ptr<ContextSource> source_;
  std::vector<std::size_t> runs_;  // of each method
  double total_ = 0, done_ = 0;    // costs, in tokens read
  double shown_ = 0;
  Clock::time_point saved_;
};

}  // namespace

std::unique_ptr<ContextSource> CapturedContext(std::shared_ptr<Engine> engine,
                                               std::vector<std::string> scorers,
                                               std::shared_ptr<Ledger> ledger,
                                               std::shared_ptr<const LearnedScores> learned) {
  return std::make_unique<Captured>(std::move(engine), std::move(scorers), std::move(ledger),
                                    std::move(learned));
}

std::unique_ptr<ContextSource> PlainContext(std::shared_ptr<Engine> engine) {
  return std::make_unique<Plain>(std::move(engine));
}

Settings SettingsOf(const Suite& suite, const EvalOptions& options, int64_t context_length) {
  Settings s;
  s.suite = suite.path;
  s.suite_hash = HashOf(suite);
  s.mode = options.aware ? "aware" : "agnostic";
  s.prompt_tokens = options.lengths.prompt_tokens;
  s.max_new_tokens = options.lengths.max_new_tokens;
  s.max_new_scale = options.lengths.max_new_scale;
  s.context_length = context_length;
  return s;
}

Expected<void> CheckContinues(const Results& previous, const Fingerprint& model, const Settings& settings,
                              const std::string& source) {
  MOEND_TRY(CheckSameModel(previous.model, model, source));
  const auto differs = [&](std::string_view what) {
    return Fail(ErrorCode::kMismatch,
                "{} holds an evaluation with another {}; write to another file, or remove that one", source,
                what);
  };
  const Settings& have = previous.settings;
  if (have.suite_hash != settings.suite_hash) return differs("suite (or another --limit)");
  if (have.mode != settings.mode) return differs("mode");
  if (have.prompt_tokens != settings.prompt_tokens) return differs("limit of prompt tokens");
  if (have.max_new_tokens != settings.max_new_tokens || have.max_new_scale != settings.max_new_scale)
    return differs("number of new tokens");
  if (have.context_length != settings.context_length) return differs("context length of the plans");
  return {};
}

Expected<Results> Evaluate(std::shared_ptr<Engine> engine, const Suite& suite, const PreparedSuite& prepared,
                           std::span<const Method> methods, const EvalOptions& options, Results results,
                           const std::function<bool(const EvalProgress&)>& progress,
                           const std::function<Expected<void>(const Results&)>& save) {
  if (prepared.contexts.size() != suite.contexts.size())
    return Fail(ErrorCode::kInvalidArgument, "the prepared suite has {} contexts, the suite {}",
                prepared.contexts.size(), suite.contexts.size());
  results.model = engine->fingerprint();
  results.n_contexts = static_cast<int64_t>(suite.contexts.size());
  results.n_questions = suite.n_questions();
  results.n_malformed = static_cast<int64_t>(suite.malformed.size());
  results.n_truncated = prepared.n_truncated;
  std::shared_ptr<Ledger> ledger;
  if (!options.spill.empty()) {
    MOEND_ASSIGN(ledger, SpillLedger::Create(options.spill));
  }
  MOEND_ASSIGN(Judge judge, Judge::Create(engine));
  Runner runner(std::move(engine), suite, prepared, methods, options, std::move(ledger), results, progress,
                save, std::move(judge));
  MOEND_TRY(runner.Run());
  return results;
}

}  // namespace moend::eval
