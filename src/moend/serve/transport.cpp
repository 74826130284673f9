#include "moend/serve/transport.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "moend/serve/connection.h"

namespace moend::serve {
namespace {

thread_local const Connection* current = nullptr;

using Clock = std::chrono::steady_clock;

Clock::time_point After(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

// What httplib reads and writes: a request from memory, an answer to the socket.
class MemoryStream : public httplib::Stream {
 public:
  MemoryStream(Connection& connection, std::string request)
      : connection_(connection), request_(std::move(request)) {}
  bool is_readable() const override { return at_ < request_.size(); }
  bool is_writable() const override { return !connection_.PeerGone(); }
  ssize_t read(char* p, size_t size) override {
    const std::size_t n = std::min(size, request_.size() - at_);
    std::memcpy(p, request_.data() + at_, n);
    at_ += n;
    return static_cast<ssize_t>(n);
  }
  ssize_t write(const char* p, size_t size) override {
    return connection_.Send({p, size}) ? static_cast<ssize_t>(size) : -1;
  }
  void get_remote_ip_and_port(std::string&, int&) const override {}
  void get_local_ip_and_port(std::string&, int&) const override {}
  socket_t socket() const override { return 0; }  // httplib compares it with FD_SETSIZE, no more

 private:
  Connection& connection_;
  std::string request_;
  std::size_t at_ = 0;
};

// The request as httplib gets it: framing by length, and no field that makes httplib do something of its own
// (ranges, compression, multipart, 100-continue).
std::string Rebuild(const RequestHead& head, std::string body) {
  std::string out = fmt::format("{} {} HTTP/1.{}\r\n", head.method, head.target, head.http10 ? 0 : 1);
  for (const char* name : {"host", "authorization", "content-type", "origin", "user-agent"})
    if (const auto value = head.Get(name); !value.empty()) out += fmt::format("{}: {}\r\n", name, value);
  out += fmt::format("content-length: {}\r\n\r\n", body.size());
  out += body;
  return out;
}

const char* Reason(int status) {
  switch (status) {
    case 400:
      return "Bad Request";
    case 401:
      return "Unauthorized";
    case 405:
      return "Method Not Allowed";
    case 408:
      return "Request Timeout";
    case 411:
      return "Length Required";
    case 413:
      return "Payload Too Large";
    case 414:
      return "URI Too Long";
    case 415:
      return "Unsupported Media Type";
    case 417:
      return "Expectation Failed";
    case 431:
      return "Request Header Fields Too Large";
    case 501:
      return "Not Implemented";
    case 503:
      return "Service Unavailable";
    case 505:
      return "HTTP Version Not Supported";
    default:
      return "Error";
  }
}

std::string ErrorResponse(const ApiError& error) {
  const std::string body = ToJson(error);
  std::string out = fmt::format(
      "HTTP/1.1 {} {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n",
      error.status, Reason(error.status), body.size());
  if (error.status == 401) out += "WWW-Authenticate: Basic realm=\"moend\", Bearer\r\n";
  if (error.retry_after > 0) out += fmt::format("Retry-After: {}\r\n", error.retry_after);
  return out + "\r\n" + body;
}

}  // namespace

bool ClientGone() {
  return current && current->PeerGone();
}

class Transport::Core : public httplib::Server {
 public:
  // httplib ends chunked answers early when it has no listening socket.
  explicit Core(const Limits& limits) {
    svr_sock_ = 0;
    set_payload_max_length(static_cast<size_t>(limits.body_bytes));
    set_keep_alive_max_count(static_cast<size_t>(limits.requests_per_connection));
    set_keep_alive_timeout(static_cast<time_t>(limits.idle_seconds));
  }
  ~Core() override { svr_sock_ = INVALID_SOCKET; }
  bool Process(httplib::Stream& stream, bool close) {
    bool closed = false;
    return process_request(stream, close, closed, nullptr) && !closed;
  }
};

Transport::Transport(const Limits& limits, HeadCheck check, Refused refused)
    : limits_(limits),
      check_(std::move(check)),
      refused_(std::move(refused)),
      core_(std::make_unique<Core>(limits)) {}

Transport::~Transport() {
  StopAccepting();
  Abort();
  WaitIdle(Clock::time_point::max());
  if (accept_thread_.joinable()) accept_thread_.join();
  if (listen_fd_ >= 0) close(listen_fd_);
  if (wake_fd_ >= 0) close(wake_fd_);
}

httplib::Server& Transport::routes() {
  return *core_;
}

Expected<int> Transport::Listen(const std::string& host, int port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  if (const int e = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found); e != 0)
    return Fail(ErrorCode::kIo, "the address {} is not known: {}", host, gai_strerror(e));
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, freeaddrinfo);
  int error = 0;
  for (const addrinfo* a = found; a && listen_fd_ < 0; a = a->ai_next) {
    const int fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, a->ai_protocol);
    const int on = 1;
    if (fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == 0 &&
        bind(fd, a->ai_addr, a->ai_addrlen) == 0 && listen(fd, 1024) == 0) {
      listen_fd_ = fd;
    } else {
      error = errno;
      if (fd >= 0) close(fd);
    }
  }
  if (listen_fd_ < 0)
    return Fail(ErrorCode::kIo, "cannot listen on {} port {}: {}", host, port, std::strerror(error));
  wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (wake_fd_ < 0) return Fail(ErrorCode::kIo, "no event descriptor: {}", std::strerror(errno));
  sockaddr_storage bound{};
  socklen_t length = sizeof bound;
  if (getsockname(listen_fd_, reinterpret_cast<sockaddr*>(&bound), &length) != 0)
    return Fail(ErrorCode::kIo, "the bound port of {} is not known: {}", host, std::strerror(errno));
  return ntohs(bound.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&bound)->sin6_port
                                           : reinterpret_cast<sockaddr_in*>(&bound)->sin_port);
}

void Transport::Start() {
  accept_thread_ = std::thread([this] { AcceptLoop(); });
}

void Transport::AcceptLoop() {
  while (!stopping_) {
    pollfd fds[2] = {{listen_fd_, POLLIN, 0}, {wake_fd_, POLLIN, 0}};
    if (poll(fds, 2, -1) < 0 && errno != EINTR) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    if (stopping_ || !(fds[0].revents & POLLIN)) continue;
    const int fd = accept4(listen_fd_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
      // Out of descriptors or memory: others may end soon. A client that gave up is nothing.
      if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
        MakeRoom();
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
      continue;
    }
    const int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    bool full;
    {
      const std::lock_guard lock(mutex_);
      full = threads_ >= limits_.connections;
    }
    if (full && !MakeRoom()) {
      if (refused_) refused_(503);
      const std::string answer = ErrorResponse({.status = 503,
                                                .message = "too many connections",
                                                .code = "too_many_connections",
                                                .retry_after = 1});
      [[maybe_unused]] const auto sent = send(fd, answer.data(), answer.size(), MSG_NOSIGNAL);
      close(fd);
      continue;
    }
    {
      const std::lock_guard lock(mutex_);
      ++threads_;
    }
    try {
      std::thread([this, fd] { Serve(fd); }).detach();
    } catch (const std::system_error&) {  // the system refuses a thread
      close(fd);
      const std::lock_guard lock(mutex_);
      --threads_;
    }
  }
}

bool Transport::MakeRoom() {
  // A connection in the middle of a request it has sent is never sacrificed, nor one that just came.
  constexpr auto kGrace = std::chrono::seconds(1);
  const std::lock_guard lock(mutex_);
  Connection* oldest = nullptr;
  for (Connection* c : connections_)
    if (c->reading() && (!oldest || c->reading_since() < oldest->reading_since())) oldest = c;
  if (!oldest || Clock::now() - oldest->reading_since() < kGrace) return false;
  oldest->Cut();
  return true;
}

void Transport::Serve(int fd) {
  {
    Connection connection(fd, limits_, stopping_, body_bytes_);
    std::list<Connection*>::iterator place;
    {
      const std::lock_guard lock(mutex_);
      place = connections_.insert(connections_.end(), &connection);
    }
    current = &connection;
    try {
      for (int64_t n = 1; ServeOne(connection, n >= limits_.requests_per_connection); ++n) {
      }
    } catch (const std::exception&) {  // memory ran out; only this connection ends
    }
    current = nullptr;
    connection.Linger();
    const std::lock_guard lock(mutex_);
    connections_.erase(place);
  }
  // Notifying under the lock: the destructor may free the condition variable right after it.
  const std::lock_guard lock(mutex_);
  --threads_;
  idle_.notify_all();
}

bool Transport::ServeOne(Connection& connection, bool last) {
  const auto refuse = [&](const ApiError& error) {
    if (refused_) refused_(error.status);
    connection.Send(ErrorResponse(error));
    return false;
  };
  const bool waiting = connection.served() > 0;
  connection.BeginReading();
  if (!connection.WaitForData(After(waiting ? limits_.idle_seconds : limits_.header_seconds))) return false;
  auto text = connection.ReadHead(After(limits_.header_seconds));
  if (!text) {
    if (text.error() == 0) return false;  // the client left
    return refuse(
        {.status = text.error(),
         .message = text.error() == 408
                        ? fmt::format("the request head took longer than {} s", limits_.header_seconds)
                        : fmt::format("the request head is larger than {} bytes", limits_.header_bytes)});
  }
  auto head = ParseRequestHead(*text, limits_);
  if (!head) return refuse(head.error());
  if (const auto error = check_(*head)) return refuse(*error);
  if (head->expects_continue && (head->content_length > 0 || head->chunked))
    if (!connection.Send("HTTP/1.1 100 Continue\r\n\r\n")) return false;
  auto body = connection.ReadBody(*head, After(limits_.body_seconds));
  if (!body) {
    const int status = body.error();
    if (status == 0) return false;
    if (status == 408)
      return refuse(
          {.status = 408, .message = fmt::format("the body took longer than {} s", limits_.body_seconds)});
    if (status == 413)
      return refuse({.status = 413,
                     .message = fmt::format("the body is larger than {} bytes", limits_.body_bytes),
                     .code = "body_too_large"});
    if (status == 503)
      return refuse(
          {.status = 503, .message = "too many bodies at once", .code = "overloaded", .retry_after = 1});
    return refuse({.status = status, .message = "malformed chunked body"});
  }
  connection.EndReading();
  const bool keep = head->keep_alive && !last && !stopping_;
  MemoryStream stream(connection, Rebuild(*head, std::move(*body)));
  return core_->Process(stream, !keep) && keep && !stopping_;
}

void Transport::StopAccepting() {
  if (stopping_.exchange(true)) return;
  if (wake_fd_ >= 0) {
    const uint64_t one = 1;
    [[maybe_unused]] const auto written = write(wake_fd_, &one, sizeof one);
  }
  if (listen_fd_ >= 0) shutdown(listen_fd_, SHUT_RDWR);  // new clients are refused at once
  const std::lock_guard lock(mutex_);
  for (Connection* c : connections_)
    if (c->idle()) c->Cut();
}

bool Transport::WaitIdle(Clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  if (deadline == Clock::time_point::max()) {
    idle_.wait(lock, [&] { return threads_ == 0; });
    return true;
  }
  return idle_.wait_until(lock, deadline, [&] { return threads_ == 0; });
}

void Transport::Abort() {
  const std::lock_guard lock(mutex_);
  for (Connection* c : connections_) c->Cut();
}

int64_t Transport::open_connections() const {
  const std::lock_guard lock(mutex_);
  return threads_;
}

}  // namespace moend::serve
