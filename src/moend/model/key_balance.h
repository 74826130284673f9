// How large the channels of a model's queries and keys are to be expected, by its weights.
#pragma once

#include <vector>

#include "moend/model/gguf.h"
#include "moend/model/model.h"

namespace moend {

// What `model`, whose weights lie in `file`, says in Model::KeyBalance().
std::vector<float> KeyBalance(const GgufFile& file, const Model& model, int64_t layer);

}  // namespace moend
