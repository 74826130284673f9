// Lets few pass at a time, so that many long texts at once take their turns at the processors instead of
// holding each other up: who waits can still give up.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>

#include "moend/base/machine.h"

namespace moend::serve {

class Turnstile {
 public:
  // Does `work`, that on a long text when its turn comes; false, and nothing done, when `stop` came true
  // first.
  bool Pass(int64_t bytes, const std::function<bool()>& stop, const std::function<void()>& work) {
    constexpr int64_t kLong = 64 << 10;
    if (bytes < kLong) {
      work();
      return true;
    }
    {
      std::unique_lock lock(mutex_);
      while (!left_.wait_for(lock, std::chrono::milliseconds(50), [&] { return inside_ < kMost; }))
        if (stop()) return false;
      ++inside_;
    }
    const Leave leave{*this};
    if (stop()) return false;
    work();
    return true;
  }

 private:
  struct Leave {
    Turnstile& turnstile;
    ~Leave() {
      const std::lock_guard lock(turnstile.mutex_);
      --turnstile.inside_;
      turnstile.left_.notify_one();
    }
  };

  const int kMost = ReadMachineLimits().threads();
  std::mutex mutex_;
  std::condition_variable left_;
  int inside_ = 0;
};

}  // namespace moend::serve
