#include "moend/model/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace moend {
namespace {

std::unexpected<Error> SystemError(const std::string& path, const char* what) {
  const int code = errno;
  if (code == ENOENT || code == ENOTDIR) return Fail(ErrorCode::kNotFound, "{}: there is no such file", path);
  return Fail(ErrorCode::kIo, "{}: the system refused to {} it: {}", path, what, std::strerror(code));
}

struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

constexpr std::size_t kMostAtOnce = std::size_t{1} << 30;  // the system reads no more than 2 GiB at once

FileIdentity IdentityOf(const struct stat& info) {
  return {info.st_dev, info.st_ino, info.st_size,
          int64_t{info.st_mtim.tv_sec} * 1000000000 + info.st_mtim.tv_nsec};
}

std::unexpected<Error> Changed(const std::string& path) {
  return Fail(ErrorCode::kCorrupt,
              "{} was changed while it was being loaded; put a new model in place by renaming it", path);
}

}  // namespace

Expected<MappedFile> MappedFile::Open(const std::string& path, bool map) {
  if (path.find('\0') != std::string::npos)
    return Fail(ErrorCode::kInvalidArgument, "a file name must not contain a zero byte");
  // O_NONBLOCK: opening a pipe by mistake must not wait for its other end.
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.fd < 0) return SystemError(path, "open");
  struct stat info {};
  if (::fstat(file.fd, &info) != 0) return SystemError(path, "examine");
  if (S_ISDIR(info.st_mode))
    return Fail(ErrorCode::kInvalidArgument, "{} is a directory; a model is a file *.gguf", path);
  if (!S_ISREG(info.st_mode))
    return Fail(ErrorCode::kInvalidArgument, "{} is not a regular file and cannot be mapped", path);

  MappedFile mapped;
  mapped.identity_ = IdentityOf(info);
  if (info.st_size == 0) return mapped;
  const auto size = static_cast<std::size_t>(info.st_size);
  void* data = map ? ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.fd, 0)
                   : ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED && !map)
    return Fail(ErrorCode::kOutOfMemory, "{}: no memory for its {} bytes; without --no-mmap it needs none",
                path, size);
  if (data == MAP_FAILED) return SystemError(path, "map");
  mapped.data_ = static_cast<const uint8_t*>(data);
  mapped.size_ = size;
  if (map) return mapped;
  for (std::size_t done = 0; done < size;) {
    const ssize_t n = ::read(file.fd, static_cast<uint8_t*>(data) + done, std::min(size - done, kMostAtOnce));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return SystemError(path, "read");
    if (n == 0) return Changed(path);
    done += static_cast<std::size_t>(n);
  }
  MOEND_TRY(mapped.CheckUnchanged(path));
  return mapped;
}

Expected<void> MappedFile::CheckUnchanged(const std::string& path) const {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) return SystemError(path, "examine");
  if (IdentityOf(info) != identity_) return Changed(path);
  return {};
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      identity_(other.identity_) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(identity_, other.identity_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<uint8_t*>(data_), size_);
}

}  // namespace moend
