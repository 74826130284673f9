// How strongly errors of attention's output reach the residual stream.
#pragma once

#include <vector>

#include "moend/model/gguf.h"
#include "moend/model/model.h"

namespace moend {

// What `model`, whose weights lie in `file`, says in Model::OutputGrams().
std::vector<float> OutputGrams(const GgufFile& file, const Model& model, int64_t layer);

}  // namespace moend
