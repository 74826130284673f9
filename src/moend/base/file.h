// Files: whole reads with a size limit, and writes that are never seen half done.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "moend/base/error.h"

namespace moend {

// kNotFound / kIo name the path. A file larger than `limit` bytes is refused.
Expected<std::string> ReadFile(const std::string& path, int64_t limit = int64_t{1} << 30);

// Writes to a temporary file beside `path`, syncs it, and renames it over `path`.
Expected<void> WriteFileAtomically(const std::string& path, std::string_view content);

// Whether WriteFileAtomically(path) can be expected to work; for checking before long work. Leaves nothing
// behind.
Expected<void> CheckWritable(const std::string& path);

}  // namespace moend
