// A LayerCache as a string of bytes and back, for saving a prefix that was read to disk. Little-endian, with
// a version and a checksum; pages are stored as they are, so nothing is quantized again.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "moend/base/error.h"
#include "moend/cache/layer_cache.h"

namespace moend {

Expected<std::string> SerializeCache(const LayerCache& cache);

// `source` names the blob's origin (a path) in errors: kCorrupt for anything that SerializeCache() cannot
// have written, kMismatch for another version, or when one has rotations and the other has not (`rotations`
// as in LayerCache::Create(); they are not saved). Everything is checked before it is used, also behind the
// checksum, and no more memory is asked for than the blob's size accounts for.
Expected<LayerCache> DeserializeCache(std::shared_ptr<Ledger> ledger, std::string_view blob,
                                      std::string_view source,
                                      std::shared_ptr<const KeyRotations> rotations = {});

}  // namespace moend
