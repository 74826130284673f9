// olmoe: one norm over all heads of Q, and of K.
#include "moend/model/arch/arch.h"

namespace moend {

Expected<void> DescribeOlmoe(const GgufFile& file, HyperParams& h) {
  if (h.head_size * h.n_heads != h.n_embd || h.n_kv_heads != h.n_heads)
    return Fail(ErrorCode::kCorrupt,
                "{}: {} heads and {} KV heads of {} channels are not as wide as the model, {}", file.path(),
                h.n_heads, h.n_kv_heads, h.head_size, h.n_embd);
  for (LayerParams& layer : h.layers) layer.qk_norm = QkNorm::kRow;
  return ReadExperts(file, h, /*required=*/true);
}

}  // namespace moend
