// phi3: Phi-3, Phi-3.5 and Phi-4. Fused projections, and two lists of RoPE factors for short and long
// contexts.
#include "moend/model/arch/arch.h"

namespace moend {

Expected<void> DescribePhi3(const GgufFile& file, HyperParams& h) {
  if (h.head_size * h.n_heads != h.n_embd)
    return Fail(ErrorCode::kCorrupt, "{}: {} heads of {} channels do not add up to {}.embedding_length = {}",
                file.path(), h.n_heads, h.head_size, h.architecture_name, h.n_embd);
  h.optional.long_rope_factors = true;
  // attention.sliding_window is not honoured: converters write it wrongly, and libllama switches it off.
  for (LayerParams& layer : h.layers) layer.ffn.fused = true;
  return RefuseExperts(file, h);
}

}  // namespace moend
