// Continuous batching: one thread owns all contexts. It admits waiting requests in fair order, reads their
// prompts one at a time, and between two blocks of a prompt, and otherwise all the time, decodes one token of
// every running stream in one step. All K/V memory is under one budget: a request starts only when its worst
// case fits beside the worst cases of the running ones; idle contexts make room by being compressed further,
// then by being dropped.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "moend/engine/text_stream.h"
#include "moend/serve/backend.h"
#include "moend/serve/fair_queue.h"
#include "moend/serve/job.h"
#include "moend/serve/limits.h"
#include "moend/serve/log.h"
#include "moend/serve/metrics.h"
#include "moend/serve/prefix_cache.h"
#include "moend/serve/prefix_store.h"

namespace moend::serve {

struct SchedulerOptions {
  int64_t slots = 8;                // requests running at once
  int64_t kv_budget_bytes = 0;      // 0: no bound
  int64_t min_prefix_tokens = 256;  // shorter contexts are not kept
};

// What /slots shows.
struct SlotReport {
  bool busy = false;
  std::string scope;
  Phase phase = Phase::kDone;
  int64_t prompt_tokens = 0, cached_tokens = 0, generated_tokens = 0;
  double prefill_progress = 0;
  int64_t kv_bytes = 0, kv_full_bytes = 0;
};

// What the store's thread says about a request's prompt.
struct StoreAnswer {
  std::atomic<bool> found{false};  // the bytes are on their way
  std::atomic<bool> complete{false}, abandoned{false};
  std::optional<SavedPrefix> saved;  // once complete
};

class Scheduler {
 public:
  // `store` may be null. backend, store and metrics must outlive the scheduler.
  Scheduler(Backend& backend, PrefixStore* store, const Limits& limits, const SchedulerOptions& options,
            Metrics& metrics, Log log);
  ~Scheduler();

  // 429 when the queue is full, 503 when draining, 400 when the request can never fit the budget.
  ApiResult<void> Submit(std::shared_ptr<Job> job);

  // Refuses new requests, lets the accepted ones finish until the deadline, cancels the rest, ends the
  // thread.
  void Drain(std::chrono::steady_clock::time_point deadline);

  std::vector<SlotReport> slots() const;
  Gauges gauges() const;

 private:
  using Clock = Job::Clock;
  static constexpr std::ptrdiff_t kMostLookups = 16;  // requests that wait for the store at once

  struct Stream {  // a request with a slot
    std::shared_ptr<Job> job;
    std::unique_ptr<Context> context;
    std::shared_ptr<Prefix> parent;  // forked from; keeps the eviction order honest
    Picker picker;
    TextStream text;
    int64_t slot = 0;
    int64_t bound = 0;   // most bytes that the context will take
    int64_t shared = 0;  // bytes that it shared with its parent when it was forked
    int64_t cached = 0, generated = 0;
    int32_t next = 0;  // picked, not yet decoded
    double progress = 0;
    bool over = false;                // its job has its outcome
    std::deque<TokenReport> reports;  // of tokens whose text is still held back
    Clock::time_point started, first_token;
    Stream(std::shared_ptr<Job> j, std::span<const int32_t> ends)
        : job(std::move(j)), picker(job->pick, ends, job->prompt), text(job->stop), started(Clock::now()) {}
  };

  // A request whose prompt may begin with a saved prefix, and what the store has said.
  struct Lookup {
    std::shared_ptr<Job> job;
    Clock::time_point asked = Clock::now();
    std::shared_ptr<StoreAnswer> answer = std::make_shared<StoreAnswer>();
  };

  void Run();
  bool Turn();  // false: nothing to do
  // scheduler_admit.cpp
  bool Admit();
  int64_t Worst(const Job& job) const;  // most bytes that it takes alone
  // Most scratch while the rest of a prompt is read of which `cached` tokens are there.
  int64_t ReadScratch(const Job& job, int64_t cached) const;
  bool TakeNext();  // sets pending_
  bool AskStore(const std::shared_ptr<Job>& job);
  void HearStore();
  void ReuseAnswers(Job& job);
  void Begin(std::shared_ptr<Job> job, std::shared_ptr<Prefix> parent);
  Expected<void> Prefill(Stream& stream);
  bool Between(Stream& stream, double progress);
  void KeepPrefix(Stream& stream);
  void KeepLoaded(const SavedPrefix& saved);
  // Makes idle contexts other than `keep` smaller or fewer until `bytes` more fit.
  bool MakeRoom(int64_t bytes, const Prefix* keep);
  int64_t Committed() const;
  // scheduler.cpp
  void DecodeStep();
  void Advance(Stream& stream);  // picks a token; sets over when the stream has ended
  void ReleaseReports(Stream& stream, Delta& delta);
  void FinishStream(Stream& stream, const std::string& reason);
  void FailStream(Stream& stream, const ApiError& error) noexcept;
  void FailJob(Job& job, const ApiError& error) noexcept;
  void FailAll(const char* why) noexcept;
  bool FailIfGone(Job& job) noexcept;
  void DropEnded();
  void Reap();
  void Publish();

  Backend& backend_;
  PrefixStore* store_;
  Limits limits_;
  SchedulerOptions options_;
  Metrics& metrics_;
  Log log_;

  // The thread's own.
  std::vector<std::unique_ptr<Stream>> streams_;
  Stream* reading_ = nullptr;   // the one whose prompt is being read; not among streams_
  std::vector<int32_t> ends_;   // tokens that end an answer
  std::deque<Lookup> lookups_;  // wait for the store, while others are admitted
  std::deque<std::shared_ptr<Job>> looked_up_;
  std::shared_ptr<Job> pending_;  // the next to begin
  PrefixCache prefixes_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  FairQueue<std::shared_ptr<Job>> queue_;
  bool answered_ = false;  // the store has said something
  std::atomic<bool> draining_{false}, stop_{false};
  bool ended_ = false, idle_ = true;
  std::vector<SlotReport> slots_;
  Gauges gauges_;
  Clock::time_point published_{};
  std::thread thread_;
};

}  // namespace moend::serve
