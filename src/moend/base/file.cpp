#include "moend/base/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <memory>
#include <system_error>

namespace moend {
namespace {

std::string Reason(int error) {
  return std::generic_category().message(error);
}

// Owns a descriptor; Close() reports what a destructor would have to swallow.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  bool ok() const { return fd_ >= 0; }
  int get() const { return fd_; }
  int Close() { return ::close(std::exchange(fd_, -1)); }

 private:
  int fd_;
};

// Removes the temporary file unless it was renamed.
class TemporaryName {
 public:
  explicit TemporaryName(std::string path) : path_(std::move(path)) {}
  TemporaryName(const TemporaryName&) = delete;
  TemporaryName& operator=(const TemporaryName&) = delete;
  ~TemporaryName() {
    if (!path_.empty()) ::unlink(path_.c_str());
  }
  const std::string& path() const { return path_; }
  void Release() { path_.clear(); }

 private:
  std::string path_;
};

Expected<void> CheckPath(const std::string& path) {
  if (path.empty()) return Fail(ErrorCode::kInvalidArgument, "a file name is empty");
  if (path.find('\0') != std::string::npos)
    return Fail(ErrorCode::kInvalidArgument, "the file name {} holds a zero byte", path.c_str());
  return {};
}

std::string DirectoryOf(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

// Where the bytes will live: a symbolic link is followed, so that the link stays and its target is replaced.
// Devices and pipes are refused: renaming a file over them would replace them.
Expected<std::string> ResolveTarget(const std::string& path, mode_t* mode) {
  MOEND_TRY(CheckPath(path));
  struct stat info {};
  *mode = 0;
  if (::stat(path.c_str(), &info) == 0) {
    if (S_ISDIR(info.st_mode))
      return Fail(ErrorCode::kIo, "{} is a directory; the name of a file is needed", path);
    if (!S_ISREG(info.st_mode))
      return Fail(ErrorCode::kIo, "{} is a device or a pipe; only regular files can be replaced safely",
                  path);
    *mode = info.st_mode & 07777;
    const std::unique_ptr<char, void (*)(void*)> real(::realpath(path.c_str(), nullptr), std::free);
    if (real) return std::string(real.get());
  } else if (errno != ENOENT) {
    return Fail(ErrorCode::kIo, "{} cannot be written: {}", path, Reason(errno));
  }
  if (path.back() == '/')
    return Fail(ErrorCode::kIo, "{} names a directory; the name of a file is needed", path);
  return path;
}

// An empty new file in the directory of `target`. The name is short and of our own making, so that a long
// file name stays possible, and opened with 0666 so that the umask holds.
Expected<int> CreateTemporary(const std::string& target, std::string* name) {
  static std::atomic<uint64_t> counter{0};
  const std::string directory = DirectoryOf(target);
  for (int attempt = 0; attempt < 1000; ++attempt) {
    *name = fmt::format("{}/.moend-{}-{}.tmp", directory, ::getpid(), counter.fetch_add(1));
    const int fd = ::open(name->c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd >= 0) return fd;
    if (errno != EEXIST && errno != EINTR) {
      return Fail(ErrorCode::kIo, "{} cannot be written: no file can be made in {}: {}", target, directory,
                  Reason(errno));
    }
  }
  return Fail(ErrorCode::kIo, "{} cannot be written: {} is full of left-over .moend-*.tmp files", target,
              directory);
}

int WriteAll(int fd, std::string_view content) {
  while (!content.empty()) {
    const ssize_t n =
        ::write(fd, content.data(), std::min<std::size_t>(content.size(), std::size_t{1} << 30));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno;
    content.remove_prefix(static_cast<std::size_t>(n));
  }
  return 0;
}

// Makes the rename itself durable. File systems that cannot sync a directory say EINVAL; then nothing is to
// be done.
int SyncDirectory(const std::string& directory) {
  const Descriptor fd(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd.ok()) return errno == EACCES ? 0 : errno;
  if (::fsync(fd.get()) != 0 && errno != EINVAL && errno != ENOTSUP) return errno;
  return 0;
}

}  // namespace

Expected<std::string> ReadFile(const std::string& path, int64_t limit) {
  MOEND_TRY(CheckPath(path));
  const Descriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd.ok()) {
    const ErrorCode code = errno == ENOENT || errno == ENOTDIR ? ErrorCode::kNotFound : ErrorCode::kIo;
    return Fail(code, "{} cannot be opened: {}", path, Reason(errno));
  }
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0)
    return Fail(ErrorCode::kIo, "{} cannot be examined: {}", path, Reason(errno));
  if (S_ISDIR(info.st_mode)) return Fail(ErrorCode::kIo, "{} is a directory; a file is needed", path);
  if (info.st_size > limit) {
    return Fail(ErrorCode::kInvalidArgument, "{} has {} bytes; at most {} are read here", path,
                static_cast<int64_t>(info.st_size), limit);
  }
  // The size is a hint only: pipes have none, and a file may grow while it is read.
  constexpr int64_t kPiece = 65536;
  std::string content;
  int64_t size = 0;
  for (;;) {
    const int64_t room = size < info.st_size ? info.st_size - size : kPiece;
    try {
      content.reserve(static_cast<std::size_t>(int64_t{info.st_size} + kPiece));
      content.resize(static_cast<std::size_t>(size + room));
    } catch (const std::bad_alloc&) {
      return Fail(ErrorCode::kOutOfMemory, "{} does not fit into memory", path);
    }
    const ssize_t n = ::read(fd.get(), content.data() + size, static_cast<std::size_t>(room));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Fail(ErrorCode::kIo, "{} cannot be read: {}", path, Reason(errno));
    if (n == 0) break;
    size += n;
    if (size > limit) {
      return Fail(ErrorCode::kInvalidArgument, "{} has more than {} bytes; no more are read here", path,
                  limit);
    }
  }
  content.resize(static_cast<std::size_t>(size));
  return content;
}

Expected<void> WriteFileAtomically(const std::string& path, std::string_view content) {
  mode_t mode = 0;
  MOEND_ASSIGN(const std::string target, ResolveTarget(path, &mode));
  std::string name;
  MOEND_ASSIGN(const int created, CreateTemporary(target, &name));
  Descriptor fd(created);
  TemporaryName temporary(std::move(name));
  if (mode != 0) static_cast<void>(::fchmod(fd.get(), mode));  // keeps the old file's rights where allowed
  if (const int error = WriteAll(fd.get(), content)) {
    return Fail(ErrorCode::kIo, "{} cannot be written: {}", path, Reason(error));
  }
  if (::fsync(fd.get()) != 0 || fd.Close() != 0)
    return Fail(ErrorCode::kIo, "{} cannot be written: {}", path, Reason(errno));
  if (::rename(temporary.path().c_str(), target.c_str()) != 0)
    return Fail(ErrorCode::kIo, "{} cannot be replaced: {}", path, Reason(errno));
  temporary.Release();
  if (const int error = SyncDirectory(DirectoryOf(target))) {
    return Fail(ErrorCode::kIo, "{} was written, but its directory cannot be synced: {}", path,
                Reason(error));
  }
  return {};
}

Expected<void> CheckWritable(const std::string& path) {
  mode_t mode = 0;
  MOEND_ASSIGN(const std::string target, ResolveTarget(path, &mode));
  std::string name;
  MOEND_ASSIGN(const int created, CreateTemporary(target, &name));
  const Descriptor fd(created);
  const TemporaryName temporary(std::move(name));
  return {};
}

}  // namespace moend
