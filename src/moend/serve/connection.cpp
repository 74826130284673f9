#include "moend/serve/connection.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

namespace moend::serve {
namespace {

int PollMilliseconds(Connection::Clock::time_point deadline) {
  const auto left =
      std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Connection::Clock::now());
  return static_cast<int>(std::clamp<int64_t>(left.count(), 0, 3'600'000));
}

}  // namespace

Connection::Connection(int fd, const Limits& limits, const std::atomic<bool>& stopping,
                       std::atomic<int64_t>& body_bytes)
    : fd_(fd), limits_(limits), stopping_(stopping), body_bytes_(body_bytes) {}

Connection::~Connection() {
  body_bytes_ -= counted_;
  close(fd_);
}

void Connection::BeginReading() {
  body_bytes_ -= std::exchange(counted_, 0);
  answered_ = false;
  reading_since_.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
}

void Connection::EndReading() {
  reading_since_.store(0, std::memory_order_relaxed);
  ++served_;
}

Connection::Fill Connection::FillBuffer(Clock::time_point deadline) {
  for (;;) {
    char bytes[16384];
    const ssize_t n = recv(fd_, bytes, sizeof bytes, 0);
    if (n > 0) {
      buffer_.append(bytes, static_cast<std::size_t>(n));
      return Fill::kData;
    }
    if (n == 0 || (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)) return Fill::kGone;
    pollfd p{fd_, POLLIN, 0};
    if (poll(&p, 1, PollMilliseconds(deadline)) == 0) return Fill::kTimeout;
  }
}

bool Connection::WaitForData(Clock::time_point deadline) {
  if (!buffer_.empty()) return true;
  // idle_ first, stopping_ second; the stopping thread does it the other way round, so one sees the other.
  idle_ = true;
  const bool got = !stopping_ && FillBuffer(deadline) == Fill::kData;
  idle_ = false;
  return got;
}

std::expected<std::string, int> Connection::ReadHead(Clock::time_point deadline) {
  std::size_t seen = 0;
  // Empty lines before a request are ignored (RFC 9112, 2.2).
  for (;;) {
    while (seen == 0 && buffer_.starts_with("\r\n")) buffer_.erase(0, 2);
    const auto end = buffer_.find("\r\n\r\n", seen < 3 ? 0 : seen - 3);
    const auto size = end == std::string::npos ? buffer_.size() : end + 4;
    if (static_cast<int64_t>(size) > limits_.header_bytes) return std::unexpected(431);
    if (end != std::string::npos) {
      std::string head = buffer_.substr(0, size);
      buffer_.erase(0, size);
      return head;
    }
    seen = buffer_.size();
    if (Clock::now() >= deadline) return std::unexpected(408);
    switch (FillBuffer(deadline)) {
      case Fill::kData:
        break;
      case Fill::kTimeout:
        return std::unexpected(408);
      case Fill::kGone:
        return std::unexpected(0);
    }
  }
}

bool Connection::CountBody(int64_t bytes) {
  counted_ += bytes;
  return (body_bytes_ += bytes) <= limits_.total_body_bytes;
}

std::expected<std::string, int> Connection::ReadBody(const RequestHead& head, Clock::time_point deadline) {
  std::string body;
  ChunkDecoder chunks(limits_.body_bytes);
  for (;;) {
    // What has arrived, not what was announced, takes memory and is counted.
    const auto before = static_cast<int64_t>(body.size());
    if (head.chunked) {
      auto used = chunks.Feed(buffer_, body);
      if (!used) return std::unexpected(used.error());
      buffer_.erase(0, *used);
    } else {
      const auto want = static_cast<std::size_t>(head.content_length - before);
      body.append(buffer_, 0, want);
      buffer_.erase(0, want);
    }
    if (!CountBody(static_cast<int64_t>(body.size()) - before)) return std::unexpected(503);
    if (head.chunked ? chunks.done() : static_cast<int64_t>(body.size()) == head.content_length) return body;
    if (Clock::now() >= deadline) return std::unexpected(408);
    switch (FillBuffer(deadline)) {
      case Fill::kData:
        break;
      case Fill::kTimeout:
        return std::unexpected(408);
      case Fill::kGone:
        return std::unexpected(0);
    }
  }
}

bool Connection::Send(std::string_view bytes) {
  while (!bytes.empty() && !broken_) {
    const ssize_t n = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (n > 0) {
      answered_ = true;
      bytes.remove_prefix(static_cast<std::size_t>(n));
    } else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      pollfd p{fd_, POLLOUT | POLLRDHUP, 0};
      const int ready = poll(&p, 1, static_cast<int>(limits_.write_seconds * 1000));
      broken_ = ready == 0 || (ready > 0 && (p.revents & (POLLERR | POLLHUP | POLLRDHUP)));
    } else if (n < 0 && errno != EINTR) {
      broken_ = true;
    }
  }
  return !broken_;
}

bool Connection::PeerGone() const {
  if (broken_) return true;
  pollfd p{fd_, POLLRDHUP, 0};
  return poll(&p, 1, 0) > 0 && (p.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)) != 0;
}

void Connection::Cut() {
  cut_ = true;
  shutdown(fd_, SHUT_RDWR);
}

void Connection::Linger() {
  reading_since_.store(0, std::memory_order_relaxed);
  if (shutdown(fd_, SHUT_WR) != 0) return;
  // A close with unread bytes would reset the connection and could destroy our answer on its way.
  const auto deadline = Clock::now() + std::chrono::milliseconds(500);
  for (int64_t taken = 0; taken < (int64_t{1} << 20) && Clock::now() < deadline;
       taken += static_cast<int64_t>(buffer_.size())) {
    buffer_.clear();
    if (FillBuffer(deadline) != Fill::kData) break;
  }
}

}  // namespace moend::serve
