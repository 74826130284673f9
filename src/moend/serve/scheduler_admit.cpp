// How a waiting request gets its slot, its memory and its prompt read.
#include <algorithm>

#include "moend/serve/prefix_split.h"
#include "moend/serve/respell.h"
#include "moend/serve/scheduler.h"

namespace moend::serve {
namespace {

// Time that compressing and dropping idle contexts may take between two decode steps.
constexpr auto kMakeRoomSlice = std::chrono::milliseconds(50);
// A store that has not said by then whether it has a prefix is not waited for; nor one whose bytes take
// longer than reading a prompt mostly does.
constexpr auto kStoreAnswer = std::chrono::milliseconds(200);
constexpr auto kStoreBytes = std::chrono::seconds(5);

}  // namespace

bool Scheduler::Admit() {
  HearStore();
  if (std::ssize(streams_) >= options_.slots) return false;
  if (!pending_ && !TakeNext()) return false;
  const auto n = std::ssize(pending_->prompt);
  const int64_t bound = backend_.ContextBound(n + pending_->max_tokens);
  std::shared_ptr<Prefix> parent;
  if (pending_->use_cache) parent = prefixes_.Find(pending_->scope, pending_->prompt, n - 1);
  if (!MakeRoom(bound + ReadScratch(*pending_, parent ? parent->length() : 0), parent.get())) {
    if (!streams_.empty()) return false;  // their end will bring room
    // Alone, and still not: the prefix it would fork does not fit beside it.
    parent = nullptr;
    if (!MakeRoom(bound + ReadScratch(*pending_, 0), nullptr)) {
      FailJob(*std::exchange(pending_, nullptr),
              {.status = 503, .message = "the K/V budget has no room for this request", .code = "kv_budget"});
      return true;
    }
  }
  Begin(std::exchange(pending_, nullptr), std::move(parent));
  return true;
}

bool Scheduler::TakeNext() {
  for (;;) {
    if (!looked_up_.empty()) {
      pending_ = std::move(looked_up_.front());
      looked_up_.pop_front();
      return true;
    }
    if (std::ssize(lookups_) >= kMostLookups) return false;
    std::shared_ptr<Job> job;
    {
      const std::lock_guard lock(mutex_);
      if (queue_.empty()) return false;
      job = queue_.Pop();
    }
    try {
      ReuseAnswers(*job);
      if (AskStore(job)) continue;
    } catch (const std::exception& e) {
      FailJob(*job, {.status = 503, .message = "out of memory"});
      throw;
    }
    pending_ = std::move(job);
    return true;
  }
}

int64_t Scheduler::Worst(const Job& job) const {
  return backend_.ContextBound(std::ssize(job.prompt) + job.max_tokens) + ReadScratch(job, 0);
}

int64_t Scheduler::ReadScratch(const Job& job, int64_t cached) const {
  const auto n = std::ssize(job.prompt);
  if (job.split <= cached) return backend_.PrefillScratch(cached, n - cached);
  return std::max(backend_.PrefillScratch(cached, job.split - cached),
                  backend_.PrefillScratch(job.split, n - job.split));
}

// An answer's text may be tokenized otherwise than it was generated. A chat's next turn then begins not with
// the kept tokens but with others that spell the same; the kept ones take their place.
void Scheduler::ReuseAnswers(Job& job) {
  if (!job.use_cache) return;
  const auto n = std::ssize(job.prompt);
  const auto plain = prefixes_.Find(job.scope, job.prompt, n - 1);
  std::optional<RespelledPrompt> best;
  for (const auto& prefix : prefixes_.all()) {
    if (!prefix->answered || prefix->scope != job.scope) continue;
    const int64_t least = std::max(plain ? plain->length() : 0, best ? best->replaced : 0);
    auto respelled = Respell(job.prompt, prefix->context->tokens(), prefix->tail, least, backend_);
    if (respelled) best = std::move(*respelled);
  }
  if (!best) return;
  const auto more = std::ssize(best->tokens) - n;
  const int64_t max_tokens = std::min(job.max_tokens, backend_.info().n_ctx - std::ssize(best->tokens));
  if (max_tokens < 1) return;
  // What the kept context covers need not be cut; a cut behind it moves along.
  const int64_t split = job.split > best->replaced ? job.split + more : 0;
  std::swap(job.prompt, best->tokens);
  const int64_t old_split = std::exchange(job.split, split);
  const int64_t old_max = std::exchange(job.max_tokens, max_tokens);
  if (options_.kv_budget_bytes > 0 && Worst(job) > options_.kv_budget_bytes) {
    std::swap(job.prompt, best->tokens);
    job.split = old_split;
    job.max_tokens = old_max;
  }
}

// Whether the answer has to be waited for.
bool Scheduler::AskStore(const std::shared_ptr<Job>& job) {
  const auto n = std::ssize(job->prompt);
  if (!store_ || !job->use_cache || n <= options_.min_prefix_tokens) return false;
  const auto have = prefixes_.Find(job->scope, job->prompt, n - 1);
  const int64_t known = have ? have->length() : 0;
  if (job->split > 0 && known >= job->split) return false;
  std::vector<int64_t> lengths = GridLengths(std::max(known, options_.min_prefix_tokens - 1) + 1, n - 1);
  if (job->split > known && std::ranges::find(lengths, job->split) == lengths.end()) {
    lengths.push_back(job->split);
    std::ranges::sort(lengths);
  }
  if (lengths.empty()) return false;
  lookups_.push_back({.job = job});
  const auto answer = lookups_.back().answer;
  const auto wake = [this] {
    {
      const std::lock_guard lock(mutex_);
      answered_ = true;
    }
    changed_.notify_all();
  };
  store_->Load(
      backend_.info().cache_id, job->scope, job->prompt, std::move(lengths),
      [answer, wake](std::optional<SavedPrefix> found) {
        answer->saved = std::move(found);
        answer->complete = true;
        wake();
      },
      [answer](bool found) {
        if (found) answer->found = true;
        return !answer->abandoned;
      });
  return true;
}

void Scheduler::HearStore() {
  {
    const std::lock_guard lock(mutex_);
    answered_ = false;
  }
  const auto now = Clock::now();
  for (auto l = lookups_.begin(); l != lookups_.end();) {
    const bool complete = l->answer->complete;
    if (!complete && now - l->asked < (l->answer->found ? Clock::duration(kStoreBytes) : kStoreAnswer)) {
      ++l;
      continue;
    }
    l->answer->abandoned = true;
    looked_up_.push_back(l->job);
    const auto answer = l->answer;
    l = lookups_.erase(l);
    if (complete && answer->saved) KeepLoaded(*answer->saved);
  }
}

void Scheduler::KeepLoaded(const SavedPrefix& saved) {
  // The bound comes from the token count; Restore() refuses a payload that holds more than the plan allows.
  if (!MakeRoom(backend_.ContextBound(std::ssize(saved.tokens)), nullptr)) return;
  auto context = backend_.Restore(saved.payload);
  if (!context || (*context)->tokens() != saved.tokens) {
    log_.Warning("a saved prefix of {} tokens is ignored: {}", saved.tokens.size(),
                 context ? "its context holds other tokens" : context.error().message);
    return;
  }
  ++metrics_.prefixes_loaded;
  prefixes_.Insert(saved.scope, std::move(*context), 0);
}

void Scheduler::Begin(std::shared_ptr<Job> job, std::shared_ptr<Prefix> parent) {
  auto stream = std::make_unique<Stream>(job, ends_);
  job->phase = Phase::kPrefill;
  Expected<void> read;
  try {
    auto context = parent ? backend_.Fork(*parent->context) : backend_.NewContext();
    if (context) {
      Stream& s = *stream;
      s.context = std::move(*context);
      s.parent = std::move(parent);
      if (s.parent) s.cached = s.parent->length();
      s.shared = s.parent ? s.context->bytes() : 0;
      s.bound = backend_.ContextBound(std::ssize(job->prompt) + job->max_tokens);
      while (std::ranges::any_of(streams_, [&](const auto& other) { return other->slot == s.slot; }))
        ++s.slot;
      metrics_.queue_seconds.Observe(std::chrono::duration<double>(s.started - job->submitted).count());
      metrics_.prompt_tokens += std::ssize(job->prompt);
      metrics_.cached_tokens += s.cached;
      reading_ = &s;
      read = Prefill(s);
    } else {
      read = std::unexpected(context.error());
    }
  } catch (const std::exception& e) {
    read = Fail(ErrorCode::kOutOfMemory, "the server ran out of memory: {}", e.what());
  }
  reading_ = nullptr;
  if (!read) {
    if (read.error().code != ErrorCode::kCancelled)
      log_.Error("reading a prompt of {} tokens failed: {}", job->prompt.size(), read.error().message);
    FailJob(*job, FromError(read.error()));
    return;
  }
  job->phase = Phase::kDecode;
  streams_.push_back(std::move(stream));
}

Expected<void> Scheduler::Prefill(Stream& s) {
  const Job& job = *s.job;
  const std::span<const int32_t> prompt = job.prompt;
  const auto part = [&](int64_t from, int64_t to, double done) -> Expected<void> {
    const double share = static_cast<double>(to - from) / static_cast<double>(std::ssize(prompt) - s.cached);
    return backend_.Prefill(
        *s.context, prompt.subspan(static_cast<std::size_t>(from), static_cast<std::size_t>(to - from)),
        [&](double p) { return Between(s, done + share * p); });
  };
  int64_t at = s.cached;
  if (job.split > at) {
    MOEND_TRY(part(at, job.split, 0));
    at = job.split;
    KeepPrefix(s);
  }
  return part(at, std::ssize(prompt),
              static_cast<double>(at - s.cached) / static_cast<double>(std::ssize(prompt) - s.cached));
}

bool Scheduler::Between(Stream& s, double progress) {
  s.progress = progress;
  if (stop_ || s.job->cancelled()) return false;
  try {
    Reap();
    if (!streams_.empty()) DecodeStep();
    Publish();
  } catch (const std::exception& e) {  // memory; a step that is half done is no one's to go on from
    FailAll(e.what());
  }
  return true;
}

void Scheduler::KeepPrefix(Stream& s) {
  if (std::ssize(s.context->tokens()) < options_.min_prefix_tokens) return;
  const auto at = std::ssize(s.context->tokens());
  // From now on the pages so far belong to the kept prefix; what the stream re-packs it takes anew.
  const int64_t bytes = s.context->bytes();
  const int64_t scratch = backend_.PrefillScratch(at, std::ssize(s.job->prompt) - at);
  const int64_t shared = std::exchange(s.shared, bytes);
  if (!MakeRoom(scratch, s.parent.get())) {
    s.shared = shared;
    return;
  }
  auto fork = backend_.Fork(*s.context);
  if (!fork) {
    s.shared = shared;
    log_.Warning("a prefix of {} tokens is not kept: {}", at, fork.error().message);
    return;
  }
  const int level = s.parent ? s.parent->level : 0;
  const auto kept = prefixes_.Insert(s.job->scope, std::move(*fork), level);
  s.parent = kept;
  if (!store_ || level > 0) return;
  auto payload = backend_.Serialize(*kept->context);
  if (!payload) {
    log_.Warning("a prefix of {} tokens is not saved: {}", at, payload.error().message);
    return;
  }
  ++metrics_.prefixes_saved;
  store_->Save({backend_.info().cache_id, s.job->scope, kept->context->tokens(), std::move(*payload)});
}

int64_t Scheduler::Committed() const {
  int64_t bytes = backend_.live_bytes();
  const auto add = [&](const Stream& s) {
    const int64_t own = std::max<int64_t>(0, s.context->bytes() - s.shared);
    bytes += std::max<int64_t>(0, s.bound - own);
  };
  for (const auto& s : streams_) add(*s);
  if (reading_) add(*reading_);
  return bytes;
}

bool Scheduler::MakeRoom(int64_t bytes, const Prefix* keep) {
  const int64_t budget = options_.kv_budget_bytes;
  if (budget <= 0) return true;
  const auto fits = [&] { return Committed() + bytes <= budget; };
  if (fits()) return true;
  // Idle contexts are not sacrificed in vain: would it fit with none of them?
  int64_t least = bytes + (keep ? keep->context->bytes() : 0);
  for (const auto& s : streams_) least += s->bound;
  if (reading_) least += reading_->bound;
  if (least > budget) return false;

  const auto start = Clock::now();
  while (!fits()) {
    if (!streams_.empty() && Clock::now() - start > kMakeRoomSlice) return false;  // goes on in the next turn
    std::shared_ptr<Prefix> victim;
    for (int level = 0; level < backend_.info().levels && !victim; ++level)
      victim = prefixes_.Oldest([&](const Prefix& p) {
        return &p != keep && p.level == level && !p.stuck &&
               backend_.live_bytes() + backend_.CompressScratch(p.length()) <= budget;
      });
    if (victim) {
      const int64_t before = backend_.live_bytes();
      const auto ok = backend_.Compress(*victim->context, victim->level + 1);
      ++metrics_.compressions;
      ++victim->level;
      // Pages that others share do not come free.
      victim->stuck = ok && backend_.live_bytes() >= before;
      if (ok) continue;
      log_.Warning("an idle context of {} tokens is dropped: {}", victim->length(), ok.error().message);
    } else {
      victim = prefixes_.Oldest([&](const Prefix& p) { return &p != keep; });
      if (!victim) return false;
    }
    ++metrics_.evictions;
    prefixes_.Erase(victim);
  }
  return true;
}

}  // namespace moend::serve
