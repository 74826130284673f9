#include "moend/eval/run.h"

#include <algorithm>
#include <chrono>
#include <optional>

#include "moend/base/spill.h"
#include "moend/engine/capture.h"
#include "moend/engine/generate.h"

namespace moend::eval {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::seconds kSaveInterval{30};

class Captured : public ContextSource {
 public:
  Captured(std::shared_ptr<Engine> engine, std::vector<std::string> scorers, std::shared_ptr<Ledger> ledger)
      : engine_(std::move(engine)), scorers_(std::move(scorers)), ledger_(std::move(ledger)) {}

  Expected<void> Read(std::span<const int32_t> tokens, const Progress& progress) override {
    capture_.reset();  // before the next one asks for as much memory
    MOEND_ASSIGN(capture_, KvCapture::Create(engine_, tokens, scorers_, progress, ledger_));
    return {};
  }
  Expected<Session> Open(const Method& method, int64_t n_ctx) override {
    return SessionFromCapture(engine_, method.plan, *capture_, {n_ctx, method.scorer});
  }

 private:
  std::shared_ptr<Engine> engine_;
  std::vector<std::string> scorers_;
  std::shared_ptr<Ledger> ledger_;
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
         const std::function<Expected<void>(const Results&)>& save)
      : suite_(suite),
        prepared_(prepared),
        methods_(methods),
        options_(options),
        results_(results),
        progress_(progress),
        save_(save),
        saved_(Clock::now()) {
    source_ = options.capture ? CapturedContext(engine, ScorersOf(methods), std::move(ledger))
                              : PlainContext(engine);
    for (const Method& method : methods) runs_.push_back(RunOf(method));
    for (std::size_t c = 0; c < suite.contexts.size(); ++c)
      for (std::size_t m = 0; m < methods.size(); ++m)
        if (!Finished(m, c)) ++left_;
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
    results_.runs.push_back(std::move(run));
    return results_.runs.size() - 1;
  }

  bool Finished(std::size_t method, std::size_t context) const {
    const auto& done = results_.runs[runs_[method]].contexts;
    return std::ranges::any_of(done, [&](const auto& c) { return c.id == suite_.contexts[context].id; });
  }

  Expected<void> AllContexts() {
    for (std::size_t c = 0; c < suite_.contexts.size(); ++c) {
      std::vector<std::size_t> pending;
      for (std::size_t m = 0; m < methods_.size(); ++m)
        if (!Finished(m, c)) pending.push_back(m);
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

  // Compressed before the questions are known: one reading, one compression a method, a fork a question.
  Expected<void> Agnostic(std::size_t c, const std::vector<std::size_t>& pending) {
    const PreparedContext& prepared = prepared_.contexts[c];
    const auto n_questions = prepared.questions.size();
    MOEND_TRY(source_->Read(prepared.context, [&](double) { return Tick(c, "", 0); }));
    int64_t room = 0;
    for (std::size_t q = 0; q < n_questions; ++q)
      room = std::max(room, Length(prepared.questions[q]) + MaxNew(suite_.contexts[c].questions[q]));
    for (const std::size_t m : pending) {
      MOEND_ASSIGN(Session base, source_->Open(methods_[m], Length(prepared.context) + room));
      const KvStats stats = base.stats();
      std::vector<Answer> answers;
      for (std::size_t q = 0; q < n_questions; ++q) {
        if (!Tick(c, methods_[m].variant, static_cast<double>(q) / static_cast<double>(n_questions)))
          return Stopped();
        MOEND_ASSIGN(Session session, base.Fork());
        MOEND_TRY(session.Prefill(prepared.questions[q]));
        MOEND_ASSIGN(Answer answer, Ask(session, c, suite_.contexts[c].questions[q], m));
        answers.push_back(std::move(answer));
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
      const Question& question = suite_.contexts[c].questions[q];
      MOEND_TRY(source_->Read(prompt, [&](double) { return Tick(c, "", 0); }));
      for (std::size_t i = 0; i < pending.size(); ++i) {
        const double share = (static_cast<double>(q * pending.size() + i)) / static_cast<double>(n);
        if (!Tick(c, methods_[pending[i]].variant, share)) return Stopped();
        MOEND_ASSIGN(Session session, source_->Open(methods_[pending[i]], Length(prompt) + MaxNew(question)));
        const KvStats stats = session.stats();
        sums[i].bytes += stats.bytes;
        sums[i].bytes_full += stats.bytes_full;
        MOEND_ASSIGN(Answer answer, Ask(session, c, question, pending[i]));
        answers[i].push_back(std::move(answer));
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

  Expected<Answer> Ask(Session& session, std::size_t c, const Question& question, std::size_t method) {
    GenerateOptions generate;
    generate.max_tokens = MaxNew(question);
    generate.sampler.temperature = 0;
    generate.stop = question.stop;
    bool stopped = false;
    // A long answer must be stoppable too.
    const auto emit = [&](std::string_view) {
      stopped = !Tick(c, methods_[method].variant, last_share_);
      return !stopped;
    };
    MOEND_ASSIGN(Generated generated, Generate(session, generate, emit));
    if (stopped) return Stopped();
    return Answer{question.id, question.dataset, ScoreAnswer(question, generated.text),
                  static_cast<int64_t>(generated.tokens.size()), std::move(generated.text)};
  }

  Expected<void> Finish(std::size_t method, FinishedContext context, std::vector<Answer> answers) {
    auto& run = results_.runs[runs_[method]];
    run.contexts.push_back(std::move(context));
    std::ranges::move(answers, std::back_inserter(run.answers));
    ++done_;
    if (Clock::now() - saved_ < kSaveInterval) return {};
    return Save();
  }

  Expected<void> Save() {
    saved_ = Clock::now();
    return save_(results_);
  }

  // `share`: of a context under the methods being worked on, beyond those finished.
  bool Tick(std::size_t c, const std::string& method, double share) {
    last_share_ = share;
    if (!progress_) return true;
    const double total = static_cast<double>(std::max<int64_t>(left_, 1));
    return progress_(
        {std::min(1.0, (static_cast<double>(done_) + share) / total), suite_.contexts[c].id, method});
  }

  static std::unexpected<Error> Stopped() {
    return Fail(ErrorCode::kCancelled, "the evaluation was stopped; the same command continues it");
  }

  int64_t MaxNew(const Question& question) const { return MaxNewTokens(question, options_.lengths); }

  static int64_t Length(const std::vector<int32_t>& tokens) { return static_cast<int64_t>(tokens.size()); }

  const Suite& suite_;
  const PreparedSuite& prepared_;
  std::span<const Method> methods_;
  const EvalOptions& options_;
  Results& results_;
  const std::function<bool(const EvalProgress&)>& progress_;
  const std::function<Expected<void>(const Results&)>& save_;
  std::unique_ptr<ContextSource> source_;
  std::vector<std::size_t> runs_;  // of each method
  int64_t left_ = 0, done_ = 0;    // pairs of method and context
  double last_share_ = 0;
  Clock::time_point saved_;
};

}  // namespace

std::unique_ptr<ContextSource> CapturedContext(std::shared_ptr<Engine> engine,
                                               std::vector<std::string> scorers,
                                               std::shared_ptr<Ledger> ledger) {
  return std::make_unique<Captured>(std::move(engine), std::move(scorers), std::move(ledger));
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
  Runner runner(std::move(engine), suite, prepared, methods, options, std::move(ledger), results, progress,
                save);
  MOEND_TRY(runner.Run());
  return results;
}

}  // namespace moend::eval
