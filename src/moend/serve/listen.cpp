// Where a Transport listens: an address and port, or a Unix socket.
#include <netdb.h>
#include <netinet/in.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "moend/serve/transport.h"

namespace moend::serve {
namespace {

constexpr std::string_view kUnix = "unix:";
constexpr int kBacklog = 1024;

}  // namespace

Expected<int> Transport::Listen(const std::string& host, int port) {
  if (host.starts_with(kUnix)) {
    MOEND_TRY(BindUnix(host.substr(kUnix.size())));
  } else {
    MOEND_TRY(Bind(host, port));
  }
  wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (wake_fd_ < 0) return Fail(ErrorCode::kIo, "no event descriptor: {}", std::strerror(errno));
  sockaddr_storage bound{};
  socklen_t length = sizeof bound;
  if (getsockname(listen_fd_, reinterpret_cast<sockaddr*>(&bound), &length) != 0)
    return Fail(ErrorCode::kIo, "the bound port of {} is not known: {}", host, std::strerror(errno));
  if (bound.ss_family == AF_UNIX) return 0;
  return ntohs(bound.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&bound)->sin6_port
                                           : reinterpret_cast<sockaddr_in*>(&bound)->sin_port);
}

Expected<void> Transport::Bind(const std::string& host, int port) {
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
        bind(fd, a->ai_addr, a->ai_addrlen) == 0 && listen(fd, kBacklog) == 0) {
      listen_fd_ = fd;
    } else {
      error = errno;
      if (fd >= 0) close(fd);
    }
  }
  if (listen_fd_ < 0)
    return Fail(ErrorCode::kIo, "cannot listen on {} port {}: {}", host, port, std::strerror(error));
  return {};
}

Expected<void> Transport::BindUnix(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path)
    return Fail(ErrorCode::kIo, "the path of the Unix socket \"{}\" has {} bytes; 1 to {} are possible", path,
                path.size(), sizeof address.sun_path - 1);
  std::memcpy(address.sun_path, path.data(), path.size());
  const auto* generic = reinterpret_cast<const sockaddr*>(&address);
  // What a server that was killed left behind is cleared; a socket in use, or another file, is not.
  struct stat status {};
  if (lstat(path.c_str(), &status) == 0 && S_ISSOCK(status.st_mode)) {
    const int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (probe >= 0) {
      if (connect(probe, generic, sizeof address) != 0 && errno == ECONNREFUSED) unlink(path.c_str());
      close(probe);
    }
  }
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0 || bind(fd, generic, sizeof address) != 0) {
    const int error = errno;
    if (fd >= 0) close(fd);
    return Fail(ErrorCode::kIo, "cannot listen on the Unix socket {}: {}", path, std::strerror(error));
  }
  listen_fd_ = fd;
  socket_path_ = path;
  if (listen(fd, kBacklog) != 0)
    return Fail(ErrorCode::kIo, "cannot listen on the Unix socket {}: {}", path, std::strerror(errno));
  return {};
}

}  // namespace moend::serve
