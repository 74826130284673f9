// A folder of saved prefixes: <dir>/<cache>/<scope>/<length>-<hash>.kv. Several servers may share it: files
// appear whole (temporary file, sync, rename) and may vanish at any time.
#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <vector>

#include "moend/serve/kv_store.h"

namespace moend::serve {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kSuffix = ".kv", kTemporarySuffix = ".tmp";
constexpr auto kTemporaryAge = std::chrono::minutes(10);  // then its writer is dead

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

// Names come from PrefixNames; this is a second lock on the door out of the folder.
bool SafeName(const std::string& name) {
  const auto ok = [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' ||
           c == '_' || c == '/';
  };
  return !name.empty() && name.front() != '/' && std::ranges::all_of(name, ok) &&
         name.find("//") == std::string::npos;
}

class DiskStore : public KvStore {
 public:
  DiskStore(fs::path dir, int64_t max_bytes) : dir_(std::move(dir)), max_bytes_(max_bytes) {}

  std::string description() const override { return dir_.string(); }

  Expected<std::optional<int64_t>> FirstPresent(std::span<const std::string> names) override {
    for (std::size_t i = 0; i < names.size(); ++i)
      if (SafeName(names[i]) && access(Path(names[i]).c_str(), R_OK) == 0) return static_cast<int64_t>(i);
    return std::nullopt;
  }

  Expected<std::string> Get(const std::string& name) override {
    if (!SafeName(name)) return Fail(ErrorCode::kInvalidArgument, "{} is no name of a prefix", name);
    const fs::path path = Path(name);
    // A link or a device in place of a file is not followed.
    const Descriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
    struct stat status {};
    if (file.get() < 0)
      return Fail(errno == ENOENT ? ErrorCode::kNotFound : ErrorCode::kIo, "{}: {}", path.string(),
                  std::strerror(errno));
    if (fstat(file.get(), &status) != 0 || !S_ISREG(status.st_mode))
      return Fail(ErrorCode::kIo, "{} is no file", path.string());
    if (status.st_size > max_bytes_)
      return Fail(ErrorCode::kCorrupt, "{} has {} bytes, more than the whole store may", path.string(),
                  status.st_size);
    std::string bytes(static_cast<std::size_t>(status.st_size), '\0');
    for (std::size_t at = 0; at < bytes.size();) {
      const ssize_t n = read(file.get(), bytes.data() + at, bytes.size() - at);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0)
        return Fail(ErrorCode::kIo, "{}: {}", path.string(), n < 0 ? std::strerror(errno) : "cut short");
      at += static_cast<std::size_t>(n);
    }
    futimens(file.get(), nullptr);  // used now; the oldest go first
    return bytes;
  }

  Expected<void> Put(const std::string& name, std::string_view bytes) override {
    if (!SafeName(name)) return Fail(ErrorCode::kInvalidArgument, "{} is no name of a prefix", name);
    if (std::ssize(bytes) > max_bytes_)
      return Fail(ErrorCode::kBudget, "{} bytes are more than the {} that the store may hold", bytes.size(),
                  max_bytes_);
    const fs::path path = Path(name);
    std::error_code error;
    fs::create_directories(path.parent_path(), error);
    if (error) return Fail(ErrorCode::kIo, "{}: {}", path.parent_path().string(), error.message());
    Prune(std::ssize(bytes));
    std::string temporary = path.string() + ".XXXXXX" + std::string(kTemporarySuffix);
    {
      const Descriptor file(
          mkostemps(temporary.data(), static_cast<int>(kTemporarySuffix.size()), O_CLOEXEC));
      if (file.get() < 0) return Fail(ErrorCode::kIo, "{}: {}", temporary, std::strerror(errno));
      if (auto ok = Write(file.get(), bytes, temporary); !ok) {
        unlink(temporary.c_str());
        return ok;
      }
    }
    if (rename(temporary.c_str(), path.c_str()) != 0) {
      const int e = errno;
      unlink(temporary.c_str());
      return Fail(ErrorCode::kIo, "{}: {}", path.string(), std::strerror(e));
    }
    const Descriptor folder(open(path.parent_path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (folder.get() < 0 || fsync(folder.get()) != 0)
      return Fail(ErrorCode::kIo, "{}: {}", path.parent_path().string(), std::strerror(errno));
    return {};
  }

  Expected<void> Remove(const std::string& name) override {
    if (SafeName(name)) unlink(Path(name).c_str());
    return {};
  }

 private:
  fs::path Path(const std::string& name) const { return dir_ / (name + std::string(kSuffix)); }

  static Expected<void> Write(int fd, std::string_view bytes, const std::string& path) {
    while (!bytes.empty()) {
      const ssize_t n = write(fd, bytes.data(), bytes.size());
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return Fail(ErrorCode::kIo, "{}: {}", path, std::strerror(errno));
      bytes.remove_prefix(static_cast<std::size_t>(n));
    }
    if (fsync(fd) != 0) return Fail(ErrorCode::kIo, "{}: {}", path, std::strerror(errno));
    return {};
  }

  // Makes room for `more` bytes, and clears what writers left behind that were killed.
  void Prune(int64_t more) {
    struct File {
      fs::path path;
      fs::file_time_type used;
      int64_t bytes;
    };
    std::vector<File> files;
    int64_t total = more;
    std::error_code error;
    const auto now = fs::file_time_type::clock::now();
    for (auto it = fs::recursive_directory_iterator(dir_, error);
         !error && it != fs::recursive_directory_iterator(); it.increment(error)) {
      std::error_code gone;
      if (!it->is_regular_file(gone) || it->is_symlink(gone)) continue;
      const auto used = it->last_write_time(gone);
      const auto bytes = static_cast<int64_t>(it->file_size(gone));
      const std::string extension = it->path().extension();
      if (gone) continue;
      if (extension == kTemporarySuffix && now - used > kTemporaryAge) {
        fs::remove(it->path(), gone);
      } else if (extension == kSuffix) {
        files.push_back({it->path(), used, bytes});
        total += bytes;
      }
    }
    std::ranges::sort(files, {}, &File::used);
    for (const File& f : files) {
      if (total <= max_bytes_) break;
      std::error_code gone;
      fs::remove(f.path, gone);
      total -= f.bytes;
    }
  }

  fs::path dir_;
  int64_t max_bytes_;
};

}  // namespace

Expected<std::unique_ptr<KvStore>> OpenDiskStore(const std::string& dir, int64_t max_bytes) {
  std::error_code error;
  fs::create_directories(dir, error);
  if (error) return Fail(ErrorCode::kIo, "{}: {}", dir, error.message());
  if (access(dir.c_str(), R_OK | W_OK | X_OK) != 0)
    return Fail(ErrorCode::kIo, "{}: {}; a folder that can be written is wanted", dir, std::strerror(errno));
  return std::make_unique<DiskStore>(dir, max_bytes);
}

}  // namespace moend::serve
