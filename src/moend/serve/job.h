// A request on its way through the scheduler, and the channel on which its text comes back.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "moend/engine/engine.h"
#include "moend/serve/answer_reader.h"
#include "moend/serve/api_error.h"
#include "moend/serve/picker.h"

namespace moend::serve {

struct TokenReport {
  std::string piece;   // bytes, perhaps no whole characters
  int64_t offset = 0;  // where in the answer's text it begins
  Picked picked;
  std::vector<std::string> top_pieces;  // of picked.top
};

struct Delta {
  std::string text;                 // valid UTF-8
  std::vector<TokenReport> tokens;  // when log probabilities were asked for
  bool empty() const { return text.empty() && tokens.empty(); }
};

struct Outcome {
  std::optional<ApiError> error;
  std::string finish_reason;  // "stop" or "length"
  int64_t prompt_tokens = 0;
  int64_t cached_tokens = 0;  // of the prompt, not read again
  int64_t generated_tokens = 0;
  double queue_ms = 0, prompt_ms = 0, predicted_ms = 0;
  KvStats kv;
};

enum class Phase { kQueued, kPrefill, kDecode, kDone };

class Job {
 public:
  using Clock = std::chrono::steady_clock;

  // Set before Submit(), then the scheduler's.
  std::string scope;            // whose caches may be used
  std::vector<int32_t> prompt;  // not empty
  // The prompt's cache is kept at this length for others to fork; 0: not at all. Below prompt.size().
  int64_t split = 0;
  bool use_cache = true;    // may start from a kept prefix
  bool keep_after = false;  // the finished context is kept: a chat goes on
  int64_t max_tokens = 0;
  PickOptions pick;
  std::vector<std::string> stop;
  std::unique_ptr<Grammar> grammar;   // what the answer is held to; may be null
  std::vector<int32_t> shown_tokens;  // control tokens whose text is part of the answer's
  Clock::time_point submitted = Clock::now();

  // The client's side. `reader` is how the text is to be read; null: as it is.
  std::unique_ptr<AnswerReader> reader;
  // Blocks until something new is there or the time is over. The outcome comes last,
  // once; deltas that pile up are joined.
  struct Event {
    Delta delta;
    std::optional<Outcome> outcome;
  };
  Event Wait(std::chrono::milliseconds timeout);
  void Cancel() { cancelled_.store(true); }

  // The scheduler's side.
  bool cancelled() const { return cancelled_.load(std::memory_order_relaxed); }
  void Push(Delta delta);
  void Finish(Outcome outcome) noexcept;
  // Ends with an error. Short of memory the message is short, too; the job ends all the same.
  void Fail(const ApiError& error) noexcept;
  std::atomic<Phase> phase{Phase::kQueued};

 private:
  std::atomic<bool> cancelled_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  Delta delta_;
  std::optional<Outcome> outcome_;
};

}  // namespace moend::serve
