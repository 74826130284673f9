// A gated delta net in the place of attention (Yang et al. 2024, arXiv 2412.06464): a convolution over the
// newest tokens, then a matrix a head that each token rewrites a little. What is remembered of a context has
// the same size after any number of tokens.
#pragma once

#include <ggml.h>

#include "moend/model/graph.h"
#include "moend/model/model.h"

namespace moend {

// x: f32 [n_embd, n], normed. Returns f32 [n_embd, n]. The states come from the slot's hook and go back to
// it.
ggml_tensor* BuildDeltaNet(ggml_context* ctx, ggml_cgraph* graph, const HyperParams& h,
                           const DeltaNetParams& p, const LayerWeights& w, ggml_tensor* x, HookSlot* slot);

// Upper bound of the graph nodes that it adds.
inline constexpr int64_t kDeltaNetNodes = 64;

}  // namespace moend
