// Weights of a model: ggml tensors whose data is the mapped file, or a copy in a layout that is multiplied
// faster.
#pragma once

#include <ggml-cpp.h>

#include "moend/base/error.h"
#include "moend/model/gguf.h"
#include "moend/model/model.h"
#include "moend/model/repack.h"

namespace moend {

// Weights and what keeps their descriptions alive; the data belongs to the GgufFile, which must outlive this.
struct BoundWeights {
  ggml_context_ptr context;
  std::vector<ggml_backend_buffer_ptr> buffers;  // the mapping of each part, read-only
  RepackedWeights repacked;                      // those that ggml multiplies faster so
  Weights weights;
};

// Finds every tensor that the architecture needs, checks its shape against the hyper-parameters and its type
// against what ggml's CPU back end multiplies. Sets h.n_vocab, which only the embedding's shape tells.
// `repack`: as LoadOptions, of layers below `n_repacked`, the output counting as one behind them. kCorrupt
// for missing or misshapen tensors, kUnsupported for types and tensors that moend cannot honour.
Expected<BoundWeights> BindWeights(const GgufFile& file, HyperParams& h, bool repack = true,
                                   int64_t n_repacked = INT64_MAX);

}  // namespace moend
