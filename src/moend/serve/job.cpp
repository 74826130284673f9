#include "moend/serve/job.h"

#include <exception>
#include <iterator>

namespace moend::serve {

Job::Event Job::Wait(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, timeout, [&] { return outcome_ || !delta_.empty(); });
  return {std::exchange(delta_, {}), std::exchange(outcome_, std::nullopt)};
}

void Job::Push(Delta delta) {
  if (delta.empty()) return;
  {
    const std::lock_guard lock(mutex_);
    delta_.text += delta.text;
    std::move(delta.tokens.begin(), delta.tokens.end(), std::back_inserter(delta_.tokens));
  }
  changed_.notify_one();
}

void Job::Finish(Outcome outcome) noexcept {
  phase.store(Phase::kDone);
  {
    const std::lock_guard lock(mutex_);
    outcome_ = std::move(outcome);
  }
  changed_.notify_one();
}

void Job::Fail(const ApiError& error) noexcept {
  Outcome outcome;
  outcome.prompt_tokens = std::ssize(prompt);
  try {
    outcome.error = error;
  } catch (const std::exception&) {
    outcome.error.emplace();
    outcome.error->status = error.status;
    outcome.error->message = "out of memory";  // short enough to need none
  }
  Finish(std::move(outcome));
}

}  // namespace moend::serve
