#include "moend/serve/transport.h"

#include <fmt/format.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <new>

#include "moend/serve/connection.h"

namespace moend::serve {
namespace {

thread_local const Connection* current = nullptr;

using Clock = std::chrono::steady_clock;

constexpr auto kGoodbye = std::chrono::milliseconds(500);

Clock::time_point After(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

}  // namespace

bool ClientGone() {
  return current && current->PeerGone();
}

Transport::Transport(const Limits& limits, TransportHooks hooks)
    : limits_(limits),
      hooks_(std::move(hooks)),
      out_of_memory_(ErrorText({.status = 503,
                                .message = "the server ran out of memory",
                                .code = "out_of_memory",
                                .retry_after = 1})),
      too_many_(ErrorText({.status = 503,
                           .message = "too many connections",
                           .code = "too_many_connections",
                           .retry_after = 1})) {}

Transport::~Transport() {
  StopAccepting();
  Abort();
  WaitIdle(Clock::time_point::max());
  if (accept_thread_.joinable()) accept_thread_.join();
  if (listen_fd_ >= 0) close(listen_fd_);
  if (wake_fd_ >= 0) close(wake_fd_);
  if (!socket_path_.empty()) unlink(socket_path_.c_str());
}

void Transport::Start() {
  accept_thread_ = std::thread([this] { AcceptLoop(); });
}

void Transport::AcceptLoop() {
  while (!stopping_) {
    std::array<pollfd, 2 + std::tuple_size_v<decltype(goodbyes_)>> fds{};
    fds[0] = {listen_fd_, POLLIN, 0};
    fds[1] = {wake_fd_, POLLIN, 0};
    bool leaving = false;
    for (std::size_t i = 0; i < goodbyes_.size(); ++i) {
      fds[2 + i] = {goodbyes_[i].fd, POLLIN, 0};  // -1 is passed over
      leaving |= goodbyes_[i].fd >= 0;
    }
    if (poll(fds.data(), fds.size(), leaving ? 50 : -1) < 0 && errno != EINTR)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    SayGoodbye(false);
    if (!stopping_ && (fds[0].revents & POLLIN)) Accept();
  }
  SayGoodbye(true);
}

void Transport::Accept() {
  const int fd = accept4(listen_fd_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd < 0) {
    // Out of descriptors or memory: others may end soon. A client that gave up is nothing.
    if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
      MakeRoom();
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return;
  }
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);  // a Unix socket has no such delay
  const auto full = [&] { return threads_ >= limits_.connections; };
  bool no_room = false;
  {
    const std::lock_guard lock(mutex_);
    no_room = full();
  }
  if (no_room && MakeRoom()) {
    // The one that was cut has to end first: there are never more threads than connections are allowed.
    std::unique_lock lock(mutex_);
    no_room = !idle_.wait_for(lock, std::chrono::seconds(1), [&] { return !full(); });
  }
  if (no_room) return Refuse(fd, too_many_);
  {
    const std::lock_guard lock(mutex_);
    ++threads_;
  }
  if (StartThread(fd)) return;
  {
    const std::lock_guard lock(mutex_);
    --threads_;
    idle_.notify_all();
  }
  Refuse(fd, out_of_memory_);
}

// std::thread would reserve as much address space as the main thread's stack has, often 8 MiB.
bool Transport::StartThread(int fd) {
  struct Start {
    Transport* transport;
    int fd;
  };
  std::unique_ptr<Start> start(new (std::nothrow) Start{this, fd});
  pthread_attr_t attributes;
  if (!start || pthread_attr_init(&attributes) != 0) return false;
  pthread_t thread;
  const bool started =
      pthread_attr_setstacksize(&attributes, static_cast<std::size_t>(limits_.stack_bytes)) == 0 &&
      pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED) == 0 &&
      pthread_create(
          &thread, &attributes,
          [](void* p) -> void* {
            const std::unique_ptr<Start> own(static_cast<Start*>(p));
            own->transport->Serve(own->fd);
            return nullptr;
          },
          start.get()) == 0;
  pthread_attr_destroy(&attributes);
  if (started) static_cast<void>(start.release());  // the thread's now
  return started;
}

void Transport::Refuse(int fd, const std::string& answer) {
  Count(503);
  [[maybe_unused]] const auto sent = send(fd, answer.data(), answer.size(), MSG_NOSIGNAL);
  shutdown(fd, SHUT_WR);
  Goodbye& place = *std::ranges::min_element(
      goodbyes_, {}, [](const Goodbye& g) { return g.fd < 0 ? Clock::time_point::min() : g.until; });
  if (place.fd >= 0) close(place.fd);
  place = {fd, Clock::now() + kGoodbye};
}

void Transport::SayGoodbye(bool all) {
  const auto now = Clock::now();
  for (Goodbye& g : goodbyes_) {
    if (g.fd < 0) continue;
    char bytes[4096];
    ssize_t n = 0;
    for (int i = 0; i < 64 && (n = recv(g.fd, bytes, sizeof bytes, 0)) > 0; ++i) {
    }
    const bool open = n > 0 || (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR));
    if (open && now < g.until && !all) continue;
    close(g.fd);
    g.fd = -1;
  }
}

void Transport::Count(int status) const noexcept {
  try {
    if (hooks_.refused) hooks_.refused(status);
  } catch (const std::exception&) {  // memory; an answer is worth more than its being counted
  }
}

bool Transport::MakeRoom() {
  // A connection in the middle of a request it has sent is never sacrificed, nor one that just came.
  constexpr auto kGrace = std::chrono::seconds(1);
  const std::lock_guard lock(mutex_);
  Connection* oldest = nullptr;
  for (Connection* c : connections_)
    if (c->reading() && !c->cut() && (!oldest || c->reading_since() < oldest->reading_since())) oldest = c;
  if (!oldest || Clock::now() - oldest->reading_since() < kGrace) return false;
  oldest->Cut();
  return true;
}

void Transport::Serve(int fd) {
  {
    Connection connection(fd, limits_, stopping_, body_bytes_);
    try {
      ServeAll(connection);
    } catch (const std::exception&) {  // memory ran out; only this connection ends
      if (!connection.answered()) {
        Count(503);
        connection.Send(out_of_memory_);
      }
    }
    connection.Linger();
  }
  // Notifying under the lock: the destructor may free the condition variable right after it.
  const std::lock_guard lock(mutex_);
  --threads_;
  idle_.notify_all();
}

void Transport::ServeAll(Connection& connection) {
  struct Listed {
    Transport& transport;
    std::list<Connection*>::iterator place;
    Listed(Transport& t, Connection& c) : transport(t) {
      const std::lock_guard lock(t.mutex_);
      place = t.connections_.insert(t.connections_.end(), &c);
      current = &c;
    }
    ~Listed() {
      current = nullptr;
      const std::lock_guard lock(transport.mutex_);
      transport.connections_.erase(place);
    }
    Listed(const Listed&) = delete;
    Listed& operator=(const Listed&) = delete;
  };
  const Listed listed(*this, connection);
  for (int64_t n = 1; ServeOne(connection, n >= limits_.requests_per_connection); ++n) {
  }
}

bool Transport::ServeOne(Connection& connection, bool last) {
  std::string more_headers;
  const auto refuse = [&](const ApiError& error) {
    Count(error.status);
    connection.Send(ErrorText(error, more_headers));
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
  if (hooks_.headers) more_headers = hooks_.headers(*head);
  if (hooks_.check)
    if (const auto error = hooks_.check(*head)) return refuse(*error);
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
  HttpRequest request{std::move(*head), {}, std::move(*body)};
  request.path = DecodePath(request.head.path());
  HttpResponse response;
  hooks_.handle(request, response);
  const bool keep = request.head.keep_alive && !last && !stopping_;
  return SendResponse(connection, request.head, response, keep, more_headers) && !stopping_;
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
