// A file mapped read-only into memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "moend/base/error.h"

namespace moend {

// Owns the mapping; move only. A file that another process cuts short while it is mapped raises SIGBUS on
// access, as with every mapped file; replacing it by a rename is harmless.
class MappedFile {
 public:
  // kNotFound, kIo, or kInvalidArgument for what is no regular file; each names the path. An empty file maps
  // to an empty span.
  static Expected<MappedFile> Open(const std::string& path);

  MappedFile() = default;
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const uint8_t> bytes() const { return {data_, size_}; }

 private:
  const uint8_t* data_ = nullptr;  // page aligned
  std::size_t size_ = 0;
};

}  // namespace moend
