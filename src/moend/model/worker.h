// A function that runs in a process of its own, for code that cannot be trusted to end: what it may cost is
// bounded from outside, and if it crashes, it alone does.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <string_view>

#include "moend/base/error.h"

namespace moend {

struct WorkerLimits {
  int cpu_seconds = 3;               // of one call
  int64_t memory_bytes = 256 << 20;  // more address space than the process had when it was split off
};

// The process is split off (fork) at the first call, keeps what the function remembers between calls, and is
// made anew after one that had to be ended. It has no open files but its own. Thread safe; one call at a
// time.
class Worker {
 public:
  // `work` is called in the other process; what it throws ends that process.
  using Work = std::function<std::string(std::string_view request)>;
  explicit Worker(Work work, WorkerLimits limits = {}) : work_(std::move(work)), limits_(limits) {}
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // What `work` returned. kUnsupported says why it did not: out of time, out of memory, crashed; kOutOfMemory
  // when there is no room for a process.
  Expected<std::string> Call(std::string_view request);

 private:
  Expected<void> Start(int64_t request_bytes);
  [[noreturn]] void Serve(int fd, int64_t request_bytes) const;
  // Ends the process and says how it had ended by itself, if it had.
  std::string Stop();

  Work work_;
  WorkerLimits limits_;
  std::mutex mutex_;
  pid_t pid_ = -1;
  int fd_ = -1;
  int64_t room_bytes_ = 0;  // requests up to this size find memory in the process that runs
};

}  // namespace moend
