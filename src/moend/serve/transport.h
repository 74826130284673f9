// Sockets and threads under cpp-httplib. httplib routes requests and writes answers; the reading is ours,
// because its own has no bound on the head, the time, the connections or the sum of all bodies. httplib only
// ever sees whole requests, rebuilt from a parsed head.
#pragma once

#include <httplib.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "moend/base/error.h"
#include "moend/serve/http_head.h"
#include "moend/serve/limits.h"

namespace moend::serve {

class Connection;

class Transport {
 public:
  // Called with a parsed head before the body is read; an error is sent and the connection closed.
  using HeadCheck = std::function<std::optional<ApiError>(const RequestHead&)>;

  // Told the status of every request that is refused before a route sees it. Called by many threads.
  using Refused = std::function<void(int)>;

  Transport(const Limits& limits, HeadCheck check, Refused refused = {});
  ~Transport();
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;

  httplib::Server& routes();  // set up before Start()

  // Binds; returns the port (useful when `port` was 0). kIo names the address.
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
  friend class Connection;
  class Core;
  void AcceptLoop();
  void Serve(int fd);
  bool ServeOne(Connection& connection, bool last);
  bool MakeRoom();  // closes the connection that has been reading for longest

  Limits limits_;
  HeadCheck check_;
  Refused refused_;
  std::unique_ptr<Core> core_;
  int listen_fd_ = -1, wake_fd_ = -1;
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
