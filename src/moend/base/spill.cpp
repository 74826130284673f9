#include "moend/base/spill.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <system_error>

namespace moend {
namespace {

// An open file that no folder lists, or -1: it is gone when its last user is, however that ends.
int NamelessFile(const std::string& folder) {
#ifdef O_TMPFILE
  const int fd = ::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd >= 0) return fd;
#endif
  // Some file systems have no such files.
  std::string path = folder + "/moend-spill-XXXXXX";
  const int named = ::mkstemp(path.data());
  if (named >= 0) ::unlink(path.c_str());
  return named;
}

}  // namespace

Expected<std::shared_ptr<Ledger>> SpillLedger::Create(const std::string& folder) {
  const int fd = NamelessFile(folder);
  if (fd < 0)
    return Fail(ErrorCode::kIo, "{}: no file can be made in this folder: {}", folder,
                std::generic_category().message(errno));
  ::close(fd);
  return std::shared_ptr<Ledger>(new SpillLedger(folder));
}

void* SpillLedger::Take(int64_t bytes) {
  const int fd = NamelessFile(folder_);
  if (fd < 0) return nullptr;
  void* p = nullptr;
  if (::posix_fallocate(fd, 0, bytes) == 0) {
    p = ::mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) p = nullptr;
  }
  ::close(fd);
  return p;
}

void SpillLedger::Give(void* p, int64_t bytes) {
  ::munmap(p, static_cast<std::size_t>(bytes));
}

}  // namespace moend
