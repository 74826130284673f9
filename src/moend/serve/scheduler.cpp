#include "moend/serve/scheduler.h"

#include <algorithm>

namespace moend::serve {
namespace {

double Milliseconds(Job::Clock::duration d) {
  return std::chrono::duration<double, std::milli>(d).count();
}
double Seconds(Job::Clock::duration d) {
  return std::chrono::duration<double>(d).count();
}

// The thread looks at cancelled and expired requests at least this often.
constexpr auto kIdleTurn = std::chrono::milliseconds(100);
constexpr auto kPublishInterval = std::chrono::milliseconds(50);

}  // namespace

Scheduler::Scheduler(Backend& backend, PrefixStore* store, const Limits& limits,
                     const SchedulerOptions& options, Metrics& metrics, Log log)
    : backend_(backend),
      store_(store),
      limits_(limits),
      options_(options),
      metrics_(metrics),
      log_(std::move(log)),
      queue_(limits.queue, limits.queue_per_key),
      slots_(static_cast<std::size_t>(options.slots)) {
  gauges_.slots = options.slots;
  gauges_.kv_budget_bytes = options.kv_budget_bytes;
  thread_ = std::thread([this] { Run(); });
}

Scheduler::~Scheduler() {
  Drain(Clock::now());
  if (store_) store_->Flush();  // its answers come back to this object
}

ApiResult<void> Scheduler::Submit(std::shared_ptr<Job> job) {
  const auto n = std::ssize(job->prompt);
  const int64_t worst = backend_.ContextBound(n + job->max_tokens) + ReadScratch(*job, 0);
  if (options_.kv_budget_bytes > 0 && worst > options_.kv_budget_bytes)
    return std::unexpected(BadField(
        "max_tokens",
        fmt::format(
            "{} prompt tokens and {} generated ones may take {} bytes of K/V cache; the server has {}", n,
            job->max_tokens, worst, options_.kv_budget_bytes),
        "kv_budget_exceeded"));
  {
    const std::lock_guard lock(mutex_);
    if (draining_ || ended_)
      return std::unexpected(ApiError{.status = 503,
                                      .message = "the server is shutting down",
                                      .code = "shutting_down",
                                      .retry_after = 5});
    if (!queue_.Push(job->scope, job))
      return std::unexpected(ApiError{.status = 429,
                                      .message = "too many requests are waiting; try again later",
                                      .code = "queue_full",
                                      .retry_after = 1});
    idle_ = false;
  }
  changed_.notify_all();
  return {};
}

void Scheduler::Drain(Clock::time_point deadline) {
  {
    std::unique_lock lock(mutex_);
    draining_ = true;
    changed_.wait_until(lock, deadline, [&] { return idle_ || ended_; });
    stop_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

std::vector<SlotReport> Scheduler::slots() const {
  const std::lock_guard lock(mutex_);
  return slots_;
}

Gauges Scheduler::gauges() const {
  const std::lock_guard lock(mutex_);
  Gauges g = gauges_;
  g.queued += queue_.size();
  return g;
}

void Scheduler::Run() {
  while (!stop_) {
    bool worked = false;
    try {
      worked = Turn();
    } catch (const std::exception& e) {  // memory; everything that runs may be half done
      log_.Error("all running requests failed: {}", e.what());
      for (auto& s : streams_)
        FailJob(*s->job, {.status = 503, .message = "the server ran out of memory", .code = "out_of_memory"});
      streams_.clear();
    }
    std::unique_lock lock(mutex_);
    idle_ = queue_.empty() && streams_.empty() && !pending_;
    if (idle_ && draining_) changed_.notify_all();
    if (!worked)
      changed_.wait_for(lock, kIdleTurn, [&] { return stop_ || (pending_ ? answered_ : !queue_.empty()); });
  }
  const ApiError gone{
      .status = 503, .message = "the server is shutting down", .code = "shutting_down", .retry_after = 5};
  for (auto& s : streams_) FailJob(*s->job, gone);
  streams_.clear();
  if (pending_) FailJob(*std::exchange(pending_, nullptr), gone);
  const std::lock_guard lock(mutex_);
  while (!queue_.empty()) FailJob(*queue_.Pop(), gone);
  ended_ = idle_ = true;
  changed_.notify_all();
}

bool Scheduler::Turn() {
  Reap();
  const bool admitted = Admit();
  const bool decoded = !streams_.empty();
  if (decoded) DecodeStep();
  Publish();
  return admitted || decoded;
}

void Scheduler::Reap() {
  std::erase_if(streams_, [&](const std::unique_ptr<Stream>& s) {
    if (!s->job->cancelled()) return false;
    FailStream(*s, {.status = 503, .message = "the client went away", .code = "cancelled"});
    return true;
  });
  const auto oldest = Clock::now() - std::chrono::duration_cast<Clock::duration>(
                                         std::chrono::duration<double>(limits_.queue_seconds));
  const auto gone = [&](const std::shared_ptr<Job>& job) {
    if (job->cancelled()) {
      FailJob(*job, {.status = 503, .message = "the client went away", .code = "cancelled"});
      return true;
    }
    if (job->submitted >= oldest) return false;
    FailJob(*job, {.status = 503,
                   .message = fmt::format("no slot became free within {} s", limits_.queue_seconds),
                   .code = "queue_timeout",
                   .retry_after = 5});
    return true;
  };
  if (pending_ && gone(pending_)) pending_ = nullptr;
  const std::lock_guard lock(mutex_);
  queue_.RemoveIf(gone);
}

void Scheduler::DecodeStep() {
  const auto start = Clock::now();
  std::erase_if(streams_, [&](const std::unique_ptr<Stream>& s) { return !Advance(*s); });
  if (streams_.empty()) return;
  std::vector<Context*> contexts;
  std::vector<int32_t> tokens;
  for (const auto& s : streams_) {
    contexts.push_back(s->context.get());
    tokens.push_back(s->next);
  }
  if (auto ok = backend_.DecodeBatch(contexts, tokens); !ok) {
    log_.Error("a decode step failed: {}", ok.error().message);
    for (const auto& s : streams_) FailStream(*s, FromError(ok.error()));
    streams_.clear();
    return;
  }
  ++metrics_.decode_steps;
  metrics_.token_seconds.Observe(Seconds(Clock::now() - start));
}

bool Scheduler::Advance(Stream& s) {
  const Picked picked = s.picker.Pick(s.context->logits());
  if (s.generated == 0) {
    s.first_token = Clock::now();
    metrics_.first_token_seconds.Observe(Seconds(s.first_token - s.job->submitted));
  }
  if (backend_.IsEndOfGeneration(picked.token)) {
    FinishStream(s, "stop");
    return false;
  }
  ++s.generated;
  ++metrics_.generated_tokens;
  const std::string piece = backend_.Piece(picked.token);
  Delta delta{.text = s.text.Push(piece), .tokens = {}};
  if (s.job->pick.top_logprobs >= 0) {
    TokenReport report{piece, picked, {}};
    for (const auto& [token, logprob] : picked.top) report.top_pieces.push_back(backend_.Piece(token));
    delta.tokens.push_back(std::move(report));
  }
  s.job->Push(std::move(delta));
  s.next = picked.token;
  if (s.text.stopped()) {
    FinishStream(s, "stop");
    return false;
  }
  if (s.generated >= s.job->max_tokens || std::ssize(s.context->tokens()) >= backend_.info().n_ctx) {
    FinishStream(s, "length");
    return false;
  }
  return true;
}

void Scheduler::FinishStream(Stream& s, const std::string& reason) {
  const auto end = Clock::now();
  s.job->Push({.text = s.text.Finish(), .tokens = {}});
  Outcome o;
  o.finish_reason = reason;
  o.prompt_tokens = std::ssize(s.job->prompt);
  o.cached_tokens = s.cached;
  o.generated_tokens = s.generated;
  o.queue_ms = Milliseconds(s.started - s.job->submitted);
  o.prompt_ms = Milliseconds(s.first_token - s.started);
  o.predicted_ms = Milliseconds(end - s.first_token);
  o.kv = s.context->stats();
  if (s.job->keep_after && std::ssize(s.context->tokens()) >= options_.min_prefix_tokens)
    prefixes_.Insert(s.job->scope, std::move(s.context), s.parent ? s.parent->level : 0);
  s.job->Finish(std::move(o));
}

void Scheduler::FailStream(Stream& s, const ApiError& error) {
  FailJob(*s.job, error);
}

void Scheduler::FailJob(Job& job, const ApiError& error) {
  if (job.cancelled()) ++metrics_.cancelled;
  Outcome o;
  o.error = error;
  o.prompt_tokens = std::ssize(job.prompt);
  job.Finish(std::move(o));
}

void Scheduler::Publish() {
  const auto now = Clock::now();
  if (now - published_ < kPublishInterval && !streams_.empty()) return;
  published_ = now;
  std::vector<SlotReport> slots(static_cast<std::size_t>(options_.slots));
  const auto report = [&](const Stream& s) {
    SlotReport& r = slots[static_cast<std::size_t>(s.slot)];
    r.busy = true;
    r.scope = s.job->scope;
    r.phase = s.job->phase;
    r.prompt_tokens = std::ssize(s.job->prompt);
    r.cached_tokens = s.cached;
    r.generated_tokens = s.generated;
    r.prefill_progress = s.progress;
    const KvStats kv = s.context->stats();
    r.kv_bytes = kv.bytes;
    r.kv_full_bytes = kv.bytes_full;
  };
  for (const auto& s : streams_) report(*s);
  if (reading_) report(*reading_);
  Gauges g;
  g.kv_bytes = backend_.live_bytes();
  g.kv_peak_bytes = backend_.peak_bytes();
  g.kv_budget_bytes = options_.kv_budget_bytes;
  g.prefixes = prefixes_.size();
  g.prefix_tokens = prefixes_.tokens();
  g.slots = options_.slots;
  g.slots_busy = std::ssize(streams_) + (reading_ ? 1 : 0);
  g.queued = pending_ ? 1 : 0;
  const std::lock_guard lock(mutex_);
  slots_ = std::move(slots);
  gauges_ = g;
}

}  // namespace moend::serve
