// How a model's RoPE turns the channels of a head, as numbers instead of as a graph node.
#pragma once

#include <vector>

#include "moend/model/model.h"
#include "moend/plan/query_stats.h"

namespace moend {

// The head_size / 2 pairs of channels of a layer's heads, with linear and YaRN scaling and llama-3's
// frequency factors, as ggml's RoPE has them. Pairs of channels that it leaves alone come last, with a rate
// of 0.
std::vector<RopePair> RopePairs(const Model& model, int64_t layer);

}  // namespace moend
