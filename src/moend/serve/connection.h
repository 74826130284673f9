// One client's socket: reads with deadlines and bounds, writes with a time limit, notices when the peer goes.
// Used by its own thread; reading(), idle() and Cut() may be called by others.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <expected>
#include <string>
#include <string_view>

#include "moend/serve/http_head.h"
#include "moend/serve/limits.h"

namespace moend::serve {

class Connection {
 public:
  using Clock = std::chrono::steady_clock;
  // Owns fd (non-blocking). body_bytes: sum over all connections of the bodies that they hold.
  Connection(int fd, const Limits& limits, const std::atomic<bool>& stopping,
             std::atomic<int64_t>& body_bytes);
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  // Waits for the first byte of a request; false when the time is over, the peer left, or the server stops.
  bool WaitForData(Clock::time_point deadline);
  // The bytes up to and with the empty line. Errors: 408, 431, or 0 when the peer left.
  std::expected<std::string, int> ReadHead(Clock::time_point deadline);
  // Errors: 400, 408, 413, 503, or 0 when the peer left. The body counts until the next BeginReading().
  std::expected<std::string, int> ReadBody(const RequestHead& head, Clock::time_point deadline);

  // False when the peer is gone or takes nothing for write_seconds.
  bool Send(std::string_view bytes);

  // Whether the peer closed its side: nobody waits for the answer.
  bool PeerGone() const;

  void BeginReading();
  void EndReading();
  int64_t served() const { return served_; }

  // Whether a byte of an answer went out since the last BeginReading().
  bool answered() const { return answered_; }

  bool reading() const { return reading_since_.load(std::memory_order_relaxed) != 0; }
  bool idle() const { return idle_.load(); }
  bool cut() const { return cut_.load(); }
  Clock::time_point reading_since() const {
    return Clock::time_point(Clock::duration(reading_since_.load(std::memory_order_relaxed)));
  }
  void Cut();  // ends all reads and writes

  // Says goodbye so that the peer can read our last answer: closes our side and takes what it still sends,
  // for a moment.
  void Linger();

 private:
  enum class Fill { kData, kTimeout, kGone };
  Fill FillBuffer(Clock::time_point deadline);  // reads more into buffer_
  bool CountBody(int64_t bytes);

  const int fd_;
  const Limits& limits_;
  const std::atomic<bool>& stopping_;
  std::atomic<int64_t>& body_bytes_;
  int64_t counted_ = 0;
  int64_t served_ = 0;
  std::string buffer_;  // read, not yet consumed
  bool broken_ = false, answered_ = false;
  std::atomic<Clock::rep> reading_since_{0};
  std::atomic<bool> idle_{false}, cut_{false};
};

}  // namespace moend::serve
