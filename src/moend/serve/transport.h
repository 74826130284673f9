// Sockets and threads: accepts clients, reads their requests within bounds (the head, the body, the time, the
// connections, the sum of all bodies), hands them to a handler and sends its answers. Short of memory or
// threads a client gets a 503, never nothing.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "moend/base/error.h"
#include "moend/serve/http_message.h"
#include "moend/serve/limits.h"

namespace moend::serve {

struct TransportHooks {
  // Answers a whole request. Called by many threads.
  std::function<void(const HttpRequest&, HttpResponse&)> handle;
  // Called with a parsed head before the body is read; an error is sent and the connection closed.
  std::function<std::optional<ApiError>(const RequestHead&)> check = {};
  // Header lines ("Name: value\r\n") that every answer to this request gets, refusals included.
  std::function<std::string(const RequestHead&)> headers = {};
  // Told the status of every request that is refused before the handler sees it.
  std::function<void(int)> refused = {};
};

class Transport {
 public:
  Transport(const Limits& limits, TransportHooks hooks);
  ~Transport();
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;

  // Binds to an address, or to a Unix socket where `host` is "unix:PATH"; returns the port (useful when
  // `port` was 0; 0 for a Unix socket). A socket file that nobody listens on any more is replaced, and it
  // goes with this object. kIo names the address.
  Expected<int> Listen(const std::string& host, int port);
  void Start();

  // No new connections; those that wait for a request close; those with one finish it.
  void StopAccepting();
  // Whether all connections ended before the deadline.
  bool WaitIdle(std::chrono::steady_clock::time_point deadline);
  // Cuts the connections that are left.
  void Abort();

  int64_t open_connections() const;

 private:
  // A client that was refused without a thread. It gets a moment to read why: closing a socket with unread
  // bytes can destroy the answer on its way.
  struct Goodbye {
    int fd = -1;
    std::chrono::steady_clock::time_point until;
  };

  Expected<void> Bind(const std::string& host, int port);
  Expected<void> BindUnix(const std::string& path);
  void AcceptLoop();
  void Accept();
  bool StartThread(int fd);
  void Refuse(int fd, const std::string& answer);
  void SayGoodbye(bool all);
  void Serve(int fd);
  void ServeAll(Connection& connection);
  bool ServeOne(Connection& connection, bool last);
  bool MakeRoom();  // cuts the connection that has been reading for longest
  void Count(int status) const noexcept;

  Limits limits_;
  TransportHooks hooks_;
  // Made beforehand: where they are needed there may be no memory.
  const std::string out_of_memory_, too_many_;
  std::array<Goodbye, 64> goodbyes_;
  int listen_fd_ = -1, wake_fd_ = -1;
  std::string socket_path_;
  std::thread accept_thread_;
  std::atomic<bool> stopping_{false};
  std::atomic<int64_t> body_bytes_{0};

  mutable std::mutex mutex_;
  std::condition_variable idle_;
  std::list<Connection*> connections_;
  int64_t threads_ = 0;  // connection threads that have not ended yet
};

// Inside a handler: whether the client of this thread's request has gone.
bool ClientGone();

}  // namespace moend::serve
