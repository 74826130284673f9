#include "moend/model/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

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

}  // namespace

Expected<MappedFile> MappedFile::Open(const std::string& path) {
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
  if (info.st_size == 0) return mapped;
  const auto size = static_cast<std::size_t>(info.st_size);
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.fd, 0);
  if (data == MAP_FAILED) return SystemError(path, "map");
  mapped.data_ = static_cast<const uint8_t*>(data);
  mapped.size_ = size;
  return mapped;
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<uint8_t*>(data_), size_);
}

}  // namespace moend
