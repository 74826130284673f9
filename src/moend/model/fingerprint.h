// Tells models apart by their content, fast enough to run at every load.
#pragma once

#include <string>

#include "moend/model/gguf.h"
#include "moend/model/model.h"

namespace moend {

// 16 hex digits over the hyper-parameters, every tensor's name, type and shape, and samples of its data (all
// of a small tensor, some KiB of a large one). Not cryptographic: it protects from mistakes.
std::string ModelHash(const GgufFile& file, const HyperParams& h);

}  // namespace moend
