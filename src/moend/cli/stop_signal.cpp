#include "moend/cli/stop_signal.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstring>

namespace moend::cli {
namespace {

std::atomic<bool> ready{false}, asked{false}, removes{false};
static_assert(std::atomic<bool>::is_always_lock_free, "a signal handler may use them");
int wake = -1;
std::array<char, 4096> removed{};

// Only what is safe in a signal handler.
void OnStop(int signal) {
  const int before = errno;
  if (ready && !asked.exchange(true)) {
    const uint64_t one = 1;
    [[maybe_unused]] const auto written = write(wake, &one, sizeof one);
    errno = before;
    return;
  }
  if (removes) unlink(removed.data());
  _exit(128 + signal);  // as shells count a process that a signal ended
}

}  // namespace

StopSignal::StopSignal() {
  wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  struct sigaction action {};
  action.sa_handler = OnStop;
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
}

void StopSignal::RemoveAtEnd(const std::string& path) {
  if (path.size() >= removed.size()) return;
  std::memcpy(removed.data(), path.c_str(), path.size() + 1);
  removes = true;
}

void StopSignal::Ready() {
  ready = true;
}

bool StopSignal::Wait(int seconds) const {
  pollfd p{wake, POLLIN, 0};
  return poll(&p, 1, seconds * 1000) > 0 || asked;
}

}  // namespace moend::cli
