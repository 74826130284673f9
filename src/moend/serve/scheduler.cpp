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
// How long it sleeps at most while the store is asked something.
constexpr auto kLookupTurn = std::chrono::milliseconds(20);
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
  for (int64_t t = 0; t < backend_.info().n_vocab; ++t)
    if (backend_.IsEndOfGeneration(static_cast<int32_t>(t))) ends_.push_back(static_cast<int32_t>(t));
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
  const int64_t worst = Worst(*job);
  if (options_.kv_budget_bytes > 0 && worst > options_.kv_budget_bytes)
    return std::unexpected(BadField(
        "max_tokens",
        fmt::format(
            "{} prompt tokens and {} generated ones may take {} bytes of K/V cache; the server has {}", n,
            job->max_tokens, worst, options_.kv_budget_bytes),
        "kv_budget_exceeded"));
  {
    const std::lock_guard lock(mutex_);
    if (draining_ || ended_) return std::unexpected(ShuttingDown());
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
      FailAll(e.what());
    }
    std::unique_lock lock(mutex_);
    idle_ = queue_.empty() && streams_.empty() && !pending_ && lookups_.empty() && looked_up_.empty();
    if (idle_ && draining_) changed_.notify_all();
    if (!worked)
      changed_.wait_for(lock, lookups_.empty() ? kIdleTurn : kLookupTurn, [&] {
        return stop_ || answered_ || (!pending_ && !queue_.empty() && std::ssize(lookups_) < kMostLookups);
      });
  }
  const ApiError gone = ShuttingDown();
  for (auto& s : streams_) FailStream(*s, gone);
  streams_.clear();
  if (pending_) FailJob(*std::exchange(pending_, nullptr), gone);
  for (const auto& job : looked_up_) FailJob(*job, gone);
  looked_up_.clear();
  for (const Lookup& l : lookups_) {
    l.answer->abandoned = true;
    FailJob(*l.job, gone);
  }
  lookups_.clear();
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

void Scheduler::FailAll(const char* why) noexcept {
  try {
    log_.Error("all running requests failed: {}", why);
  } catch (const std::exception&) {  // still no memory
  }
  // Short: it may not need memory of its own.
  const ApiError error{.status = 503, .message = "out of memory"};
  for (auto& s : streams_) FailStream(*s, error);
  streams_.clear();
}

bool Scheduler::FailIfGone(Job& job) noexcept {
  const bool left = job.cancelled();
  const std::chrono::duration<double> waited = Clock::now() - job.submitted;
  if (!left && waited.count() < limits_.queue_seconds) return false;
  try {
    if (left) {
      FailJob(job, {.status = 503, .message = "the client went away", .code = "cancelled"});
    } else {
      FailJob(job, {.status = 503,
                    .message = fmt::format("no slot became free within {} s", limits_.queue_seconds),
                    .code = "queue_timeout",
                    .retry_after = 5});
    }
  } catch (const std::exception&) {
    FailJob(job, {.status = 503});
  }
  return true;
}

// Ending a stream may fail for want of memory; taking it out of the list may not. So these are two steps.
void Scheduler::DropEnded() {
  std::erase_if(streams_, [](const std::unique_ptr<Stream>& s) { return s->over; });
}

void Scheduler::Reap() {
  for (const auto& s : streams_)
    if (s->job->cancelled())
      FailStream(*s, {.status = 503, .message = "the client went away", .code = "cancelled"});
  DropEnded();
  if (pending_ && FailIfGone(*pending_)) pending_ = nullptr;
  std::erase_if(looked_up_, [&](const auto& job) { return FailIfGone(*job); });
  std::erase_if(lookups_, [&](const Lookup& l) {
    if (!FailIfGone(*l.job)) return false;
    l.answer->abandoned = true;
    return true;
  });
  const std::lock_guard lock(mutex_);
  queue_.RemoveIf([&](const std::shared_ptr<Job>& job) { return FailIfGone(*job); });
}

void Scheduler::DecodeStep() {
  const auto start = Clock::now();
  for (const auto& s : streams_) Advance(*s);
  DropEnded();
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

void Scheduler::Advance(Stream& s) {
  const auto logits = s.context->logits();
  const auto pick = s.job->grammar ? s.picker.Pick(logits, *s.job->grammar) : s.picker.Pick(logits);
  if (!pick) return FailStream(s, FromError(pick.error()));
  const Picked& picked = *pick;
  if (s.generated == 0) {
    s.first_token = Clock::now();
    metrics_.first_token_seconds.Observe(Seconds(s.first_token - s.job->submitted));
  }
  s.next = -1;
  if (s.picker.Ends(picked.token)) return FinishStream(s, "stop");
  ++s.generated;
  ++metrics_.generated_tokens;
  const bool shown = std::ranges::find(s.job->shown_tokens, picked.token) != s.job->shown_tokens.end();
  const std::string piece = shown ? backend_.SpecialPiece(picked.token) : backend_.Piece(picked.token);
  const int64_t offset = s.text.taken();
  Delta delta{.text = s.text.Push(piece), .tokens = {}};
  if (s.job->pick.top_logprobs >= 0) {
    TokenReport report{piece, offset, picked, {}};
    for (const auto& [token, logprob] : picked.top) report.top_pieces.push_back(backend_.Piece(token));
    s.reports.push_back(std::move(report));
    ReleaseReports(s, delta);
  }
  s.job->Push(std::move(delta));
  s.next = picked.token;
  if (s.text.stopped()) {
    FinishStream(s, "stop");
  } else if (s.generated >= s.job->max_tokens || std::ssize(s.context->tokens()) >= backend_.info().n_ctx) {
    FinishStream(s, "length");
  }
}

// Log probabilities go out with the text that they belong to: what turns out to be a stop string has none.
void Scheduler::ReleaseReports(Stream& s, Delta& delta) {
  const auto belongs = [&](const TokenReport& r) {
    return r.offset < s.text.given() || (r.piece.empty() && r.offset == s.text.given());
  };
  for (; !s.reports.empty() && belongs(s.reports.front()); s.reports.pop_front())
    delta.tokens.push_back(std::move(s.reports.front()));
}

void Scheduler::FinishStream(Stream& s, const std::string& reason) {
  const auto end = Clock::now();
  Delta last{.text = s.text.Finish(), .tokens = {}};
  ReleaseReports(s, last);
  s.job->Push(std::move(last));
  Outcome o;
  o.finish_reason = reason;
  o.prompt_tokens = std::ssize(s.job->prompt);
  o.cached_tokens = s.cached;
  o.generated_tokens = s.generated;
  o.queue_ms = Milliseconds(s.started - s.job->submitted);
  o.prompt_ms = Milliseconds(s.first_token - s.started);
  o.predicted_ms = Milliseconds(end - s.first_token);
  o.kv = s.context->stats();
  if (s.job->keep_after && std::ssize(s.context->tokens()) >= options_.min_prefix_tokens) {
    std::vector<int32_t> tail;  // picked last, and never read
    if (s.next >= 0) tail.push_back(s.next);
    prefixes_.Insert(s.job->scope, std::move(s.context), s.parent ? s.parent->level : 0, std::move(tail));
  }
  s.over = true;
  s.job->Finish(std::move(o));
}

void Scheduler::FailStream(Stream& s, const ApiError& error) noexcept {
  if (std::exchange(s.over, true)) return;
  FailJob(*s.job, error);
}

void Scheduler::FailJob(Job& job, const ApiError& error) noexcept {
  if (job.cancelled()) ++metrics_.cancelled;
  job.Fail(error);
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
  g.queued = (pending_ ? 1 : 0) + std::ssize(lookups_) + std::ssize(looked_up_);
  const std::lock_guard lock(mutex_);
  slots_ = std::move(slots);
  gauges_ = g;
}

}  // namespace moend::serve
