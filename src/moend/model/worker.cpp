#include "moend/model/worker.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>

namespace moend {
namespace {

using Clock = std::chrono::steady_clock;

// A waiting process costs no CPU time; on a machine that is taken it may wait long.
constexpr int kWallFactor = 15;
// A reply is built from the request by copies.
constexpr int64_t kMemoryPerByte = 24;
constexpr uint64_t kMostReply = uint64_t{1} << 30;
constexpr int kNoMemory = 77;  // exit status

// Moves `n` bytes; false at the end of the stream, on errors and after the deadline.
bool Receive(int fd, char* to, std::size_t n, const Clock::time_point* deadline) {
  while (n > 0) {
    if (deadline) {
      const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(*deadline - Clock::now());
      pollfd wait{fd, POLLIN, 0};
      const int ready = poll(&wait, 1, static_cast<int>(std::max<int64_t>(0, left.count())));
      if (ready < 0 && errno == EINTR) continue;
      if (ready <= 0) return false;
    }
    const ssize_t got = recv(fd, to, n, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    to += got;
    n -= static_cast<std::size_t>(got);
  }
  return true;
}

bool Send(int fd, const char* from, std::size_t n) {
  while (n > 0) {
    const ssize_t sent = send(fd, from, n, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return false;
    from += sent;
    n -= static_cast<std::size_t>(sent);
  }
  return true;
}

bool SendMessage(int fd, std::string_view text) {
  const uint64_t size = text.size();
  return Send(fd, reinterpret_cast<const char*>(&size), sizeof size) && Send(fd, text.data(), text.size());
}

// Bytes of address space of this process; 0 where the system does not say.
int64_t AddressSpace() {
  char text[64] = {};
  const int fd = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return 0;
  const ssize_t n = read(fd, text, sizeof text - 1);
  close(fd);
  return n > 0 ? std::strtoll(text, nullptr, 10) * sysconf(_SC_PAGESIZE) : 0;
}

void LimitCpu(int seconds) {
  const itimerval timer{{0, 0}, {seconds, 0}};
  setitimer(ITIMER_PROF, &timer, nullptr);
}

}  // namespace

Worker::~Worker() {
  Stop();
}

Expected<void> Worker::Start(int64_t request_bytes) {
  int pair[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0)
    return Fail(ErrorCode::kOutOfMemory, "the system refused a socket for a process: {}",
                std::strerror(errno));
  const pid_t pid = fork();
  if (pid == 0) Serve(pair[1], request_bytes);
  const int error = errno;
  close(pair[1]);
  if (pid < 0) {
    close(pair[0]);
    return Fail(ErrorCode::kOutOfMemory, "the system refused a process: {}", std::strerror(error));
  }
  pid_ = pid;
  fd_ = pair[0];
  room_bytes_ = std::max<int64_t>(request_bytes, 1 << 20);
  return {};
}

void Worker::Serve(int fd, int64_t request_bytes) const {
  // Terminals send their signals to all processes of a group; this one ends when its parent does.
  for (int s : {SIGINT, SIGTERM, SIGHUP, SIGPIPE}) std::signal(s, SIG_IGN);
  for (int s : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGPROF}) std::signal(s, SIG_DFL);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  const int nothing = open("/dev/null", O_RDWR);
  for (int standard : {0, 1, 2}) dup2(nothing, standard);
  if (fd != 3) dup2(fd, 3);
  if (syscall(SYS_close_range, 4u, ~0u, 0u) != 0)
    for (int other = 4; other < 65536; ++other) close(other);  // Linux before 5.9
  const rlimit no_core{0, 0};
  setrlimit(RLIMIT_CORE, &no_core);
  if (const int64_t now = AddressSpace(); now > 0) {
    const auto most = static_cast<rlim_t>(now + limits_.memory_bytes +
                                          kMemoryPerByte * std::max<int64_t>(request_bytes, 1 << 20));
    const rlimit memory{most, most};
    setrlimit(RLIMIT_AS, &memory);
  }
  for (;;) {
    uint64_t size = 0;
    if (!Receive(3, reinterpret_cast<char*>(&size), sizeof size, nullptr)) _exit(0);
    try {
      std::string request(size, '\0');
      if (!Receive(3, request.data(), size, nullptr)) _exit(0);
      LimitCpu(limits_.cpu_seconds);
      const std::string reply = work_(request);
      LimitCpu(0);
      if (!SendMessage(3, reply)) _exit(0);
    } catch (const std::bad_alloc&) {
      _exit(kNoMemory);
    } catch (...) {
      _exit(1);
    }
  }
}

std::string Worker::Stop() {
  if (pid_ < 0) return {};
  close(fd_);
  fd_ = -1;
  // Given a moment, a process that is on its way out says why; one that hangs says nothing.
  int status = 0;
  pid_t ended = 0;
  for (unsigned wait = 50, waited = 0; waited < 100'000 && (ended = waitpid(pid_, &status, WNOHANG)) == 0;
       waited += wait, wait = std::min(2 * wait, 2000u))
    usleep(wait);
  if (ended == 0) {
    kill(pid_, SIGKILL);
    while (waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
    }
  }
  pid_ = -1;
  if (WIFEXITED(status) && WEXITSTATUS(status) == kNoMemory)
    return fmt::format("it needs more than {} MiB", limits_.memory_bytes >> 20);
  if (WIFSIGNALED(status) && (WTERMSIG(status) == SIGPROF || WTERMSIG(status) == SIGKILL))
    return fmt::format("it takes longer than {} s", limits_.cpu_seconds);
  if (WIFSIGNALED(status) && (WTERMSIG(status) == SIGSEGV || WTERMSIG(status) == SIGBUS))
    return "it recurses too deeply";
  if (WIFSIGNALED(status)) return fmt::format("it crashed with signal {}", WTERMSIG(status));
  return "it ended early";
}

Expected<std::string> Worker::Call(std::string_view request) {
  const std::lock_guard lock(mutex_);
  const auto bytes = static_cast<int64_t>(request.size());
  if (pid_ >= 0 && bytes > room_bytes_) Stop();
  if (pid_ < 0) MOEND_TRY(Start(bytes));
  const auto deadline = Clock::now() + std::chrono::seconds(limits_.cpu_seconds * kWallFactor);
  uint64_t size = 0;
  if (!SendMessage(fd_, request) || !Receive(fd_, reinterpret_cast<char*>(&size), sizeof size, &deadline) ||
      size > kMostReply)
    return Fail(ErrorCode::kUnsupported, "{}", Stop());
  try {
    std::string reply(size, '\0');
    if (Receive(fd_, reply.data(), size, &deadline)) return reply;
  } catch (const std::bad_alloc&) {
    Stop();
    return Fail(ErrorCode::kOutOfMemory, "no memory for a reply of {} bytes", size);
  }
  return Fail(ErrorCode::kUnsupported, "{}", Stop());
}

}  // namespace moend
