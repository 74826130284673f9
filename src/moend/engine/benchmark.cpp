#include "moend/engine/benchmark.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <random>

namespace moend {
namespace {

using Clock = std::chrono::steady_clock;

double Seconds(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::vector<int32_t> RandomTokens(int64_t n, int64_t n_vocab, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(static_cast<std::size_t>(n));
  for (int32_t& t : tokens) t = static_cast<int32_t>(random() % static_cast<uint64_t>(n_vocab));
  return tokens;
}

class Runner {
 public:
  Runner(std::shared_ptr<Engine> engine, const Plan& plan, const SpeedOptions& options)
      : engine_(std::move(engine)), plan_(plan), options_(options) {}

  Expected<SpeedResult> Measure(const SpeedRun& run) {
    const int64_t room = run.depth + run.n + 1;
    if (!base_ || base_->depth != run.depth || base_->room < room) MOEND_TRY(ReadDepth(run, room));
    SpeedResult result{run, {}, 0};
    for (int i = options_.warm_up ? -1 : 0; i < options_.repetitions; ++i) {
      MOEND_ASSIGN(const double seconds, Once(run, result.kv_bytes));
      if (i >= 0) result.tps.push_back(seconds > 0 ? static_cast<double>(run.n) / seconds : 0);
    }
    return result;
  }

 private:
  struct Base {
    int64_t depth = 0, room = 0;
    std::optional<Session> session;  // none: an empty context
  };

  // Makes room for the test that needs most, as llama-bench does: a context's capacity costs nothing here.
  Expected<Session> Empty(int64_t room) {
    SessionOptions options;
    options.n_ctx = std::min(room, engine_->model().hparams().n_ctx_train);
    options.n_ctx = std::max(options.n_ctx, room);
    return Session::Create(engine_, plan_, options);
  }

  Expected<void> Read(Session& session, int64_t n, unsigned seed) {
    const auto tokens = RandomTokens(n, engine_->model().hparams().n_vocab, seed);
    Progress progress;
    if (options_.go_on) progress = [this](double) { return options_.go_on(); };
    return session.Prefill(tokens, progress);
  }

  Expected<void> ReadDepth(const SpeedRun& run, int64_t room) {
    base_.reset();
    Base base{run.depth, room, {}};
    if (run.depth > 0) {
      MOEND_ASSIGN(auto session, Empty(room));
      MOEND_TRY(Read(session, run.depth, 1));
      base.session = std::move(session);
    }
    base_ = std::move(base);
    return {};
  }

  Expected<double> Once(const SpeedRun& run, int64_t& kv_bytes) {
    MOEND_ASSIGN(Session session, base_->session ? base_->session->Fork() : Empty(base_->room));
    const std::vector<int32_t> tokens = RandomTokens(run.n, engine_->model().hparams().n_vocab, 2);
    if (run.test == SpeedTest::kGenerate && session.tokens().empty()) MOEND_TRY(Read(session, 1, 1));
    const auto start = Clock::now();
    if (run.test == SpeedTest::kPrompt) {
      MOEND_TRY(Read(session, run.n, 2));
    } else {
      for (const int32_t token : tokens) {
        MOEND_TRY(session.Decode(token));
        if (options_.go_on && !options_.go_on()) return Fail(ErrorCode::kCancelled, "measuring was stopped");
      }
    }
    const double seconds = Seconds(start);
    kv_bytes = session.stats().bytes;
    return seconds;
  }

  std::shared_ptr<Engine> engine_;
  const Plan& plan_;
  const SpeedOptions& options_;
  std::optional<Base> base_;
};

}  // namespace

const char* ShortName(SpeedTest test) {
  return test == SpeedTest::kPrompt ? "pp" : "tg";
}

double SpeedResult::mean() const {
  double sum = 0;
  for (const double x : tps) sum += x;
  return tps.empty() ? 0 : sum / static_cast<double>(tps.size());
}

double SpeedResult::stddev() const {
  if (tps.size() < 2) return 0;
  const double m = mean();
  double sum = 0;
  for (const double x : tps) sum += (x - m) * (x - m);
  return std::sqrt(sum / static_cast<double>(tps.size() - 1));
}

double SpeedResult::median() const {
  if (tps.empty()) return 0;
  std::vector<double> sorted = tps;
  std::sort(sorted.begin(), sorted.end());
  const std::size_t half = sorted.size() / 2;
  return sorted.size() % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

Expected<void> MeasureSpeed(const std::shared_ptr<Engine>& engine, const Plan& plan,
                            const std::vector<SpeedRun>& runs, const SpeedOptions& options,
                            const std::function<void(const SpeedResult&)>& report) {
  if (options.repetitions < 1)
    return Fail(ErrorCode::kInvalidArgument, "{} repetitions; at least one is needed", options.repetitions);
  constexpr int64_t kMost = INT32_MAX / 2;  // positions are 32 bit
  for (const SpeedRun& run : runs)
    if (run.n < 1 || run.n > kMost || run.depth < 0 || run.depth > kMost)
      return Fail(ErrorCode::kInvalidArgument, "a test of {} tokens at depth {} is not possible", run.n,
                  run.depth);
  Runner runner(engine, plan, options);
  for (const SpeedRun& run : runs) {
    MOEND_ASSIGN(const SpeedResult result, runner.Measure(run));
    report(result);
  }
  return {};
}

}  // namespace moend
