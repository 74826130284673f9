// A server over the fake backend, and a bare socket client that can misbehave.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "moend/serve/server.h"
#include "tests/support/serve_fake.h"

namespace moend::serve::test {

inline constexpr const char* kChat = "/v1/chat/completions";
inline constexpr const char* kComplete = "/v1/completions";

inline bool Eventually(const std::function<bool()>& condition, double seconds = 5) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

class Client {
 public:
  explicit Client(int port) {
    fd_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in a{};
    a.sin_family = AF_INET;
    a.sin_port = htons(static_cast<uint16_t>(port));
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connected_ = connect(fd_, reinterpret_cast<sockaddr*>(&a), sizeof a) == 0;
  }
  explicit Client(const std::string& path) {  // of a Unix socket
    fd_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un a{};
    a.sun_family = AF_UNIX;
    std::memcpy(a.sun_path, path.data(), std::min(path.size(), sizeof a.sun_path - 1));
    connected_ = connect(fd_, reinterpret_cast<sockaddr*>(&a), sizeof a) == 0;
  }
  ~Client() { Close(); }
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;
  bool connected() const { return connected_; }
  void Close() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }
  bool Send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t n = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n <= 0) return false;
      bytes.remove_prefix(static_cast<std::size_t>(n));
    }
    return true;
  }
  // Reads until `enough` says so, the peer closes, or the time is over.
  std::string Read(const std::function<bool(const std::string&)>& enough, double seconds = 10) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    while (!enough(read_)) {
      const auto left =
          std::chrono::duration_cast<std::chrono::milliseconds>(end - std::chrono::steady_clock::now());
      pollfd p{fd_, POLLIN, 0};
      if (left.count() <= 0 || poll(&p, 1, static_cast<int>(left.count())) <= 0) break;
      char buffer[65536];
      const ssize_t n = recv(fd_, buffer, sizeof buffer, 0);
      if (n <= 0) {
        closed_ = true;
        break;
      }
      read_.append(buffer, static_cast<std::size_t>(n));
    }
    return read_;
  }
  std::string ReadAll(double seconds = 10) {
    return Read([](const std::string&) { return false; }, seconds);
  }
  bool closed() const { return closed_; }

 private:
  int fd_ = -1;
  bool connected_ = false, closed_ = false;
  std::string read_;
};

struct Reply {
  int status = 0;
  std::string head, body;
  nlohmann::json json() const { return nlohmann::json::parse(body, nullptr, false); }
};

inline Reply ParseReply(const std::string& raw) {
  Reply r;
  const auto end = raw.find("\r\n\r\n");
  if (!raw.starts_with("HTTP/1.1 ") || end == std::string::npos) return r;
  r.status = std::atoi(raw.c_str() + 9);
  r.head = raw.substr(0, end);
  r.body = raw.substr(end + 4);
  if (r.head.find("chunked") == std::string::npos) return r;
  std::string whole;
  for (std::size_t at = 0; at < r.body.size();) {
    const auto size = static_cast<std::size_t>(std::strtoul(r.body.c_str() + at, nullptr, 16));
    at = r.body.find("\r\n", at);
    if (size == 0 || at == std::string::npos) break;
    whole += r.body.substr(at + 2, size);
    at += size + 4;
  }
  r.body = whole;
  return r;
}

inline std::string Post(const std::string& path, const std::string& body, const std::string& extra = {}) {
  return "POST " + path + " HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n" +
         extra + "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}

inline std::string Get(const std::string& path, const std::string& extra = {}) {
  return "GET " + path + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + extra + "\r\n";
}

// One request on a connection of its own.
inline Reply Ask(int port, const std::string& request, double seconds = 20) {
  Client c(port);
  c.Send(request);
  return ParseReply(c.ReadAll(seconds));
}

// The events of a stream, "[DONE]" as a string.
inline std::vector<nlohmann::json> Events(const std::string& body) {
  std::vector<nlohmann::json> events;
  for (std::size_t at = 0; (at = body.find("data: ", at)) != std::string::npos;) {
    const auto end = body.find("\n\n", at);
    const std::string data = body.substr(at + 6, end - at - 6);
    events.push_back(data == "[DONE]" ? nlohmann::json("[DONE]")
                                      : nlohmann::json::parse(data, nullptr, false));
    at = end;
  }
  return events;
}

struct Running {
  explicit Running(ServerOptions options = {}, const FakeOptions& fake = {},
                   std::unique_ptr<PrefixStore> store = nullptr)
      : server((options.port = 0, std::move(options)), Log()) {
    port = server.Start().value();
    auto owned = std::make_unique<FakeBackend>(fake);
    backend = owned.get();
    server.Serve(std::move(owned), std::move(store));
  }
  Server server;
  int port = 0;
  FakeBackend* backend = nullptr;
};

}  // namespace moend::serve::test
