// A file mapped read-only into memory, or read into it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "moend/base/error.h"

namespace moend {

// Which file it was, and as of when: equal as long as nobody wrote to it.
struct FileIdentity {
  uint64_t device = 0, inode = 0;
  int64_t size = 0, modified_ns = 0;
  bool operator==(const FileIdentity&) const = default;
};

// Owns the mapping; move only. A file that another process cuts short while it is mapped raises SIGBUS on
// access, as with every mapped file, and one that it writes to changes under the reader; replacing it by a
// rename is harmless. What was read instead is safe from both.
class MappedFile {
 public:
  // kNotFound, kIo, or kInvalidArgument for what is no regular file; each names the path. An empty file maps
  // to an empty span.
  static Expected<MappedFile> Open(const std::string& path, bool map = true);

  MappedFile() = default;
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const uint8_t> bytes() const { return {data_, size_}; }
  // kCorrupt when `path` is not the file that was opened, or was written to since.
  Expected<void> CheckUnchanged(const std::string& path) const;

 private:
  const uint8_t* data_ = nullptr;  // page aligned
  std::size_t size_ = 0;
  FileIdentity identity_;
};

}  // namespace moend
