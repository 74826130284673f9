// granite and granitemoe (Granite 3): scales for embeddings, residuals and logits; experts, one of them
// shared.
#include <cmath>

#include "moend/model/arch/arch.h"

namespace moend {
namespace {

// A scale that the file may leave out, or write as 0 for none.
Expected<float> Scale(const GgufFile& file, const std::string& key, std::optional<float> fallback) {
  MOEND_ASSIGN(const float scale, file.Real(key, fallback));
  if (scale < 0 || !std::isfinite(1.0f / (scale == 0 ? 1.0f : scale)))
    return Fail(ErrorCode::kCorrupt, "{}: {} is {}, no usable scale", file.path(), key, scale);
  return scale == 0 ? 1.0f : scale;
}

}  // namespace

Expected<void> DescribeGranite(const GgufFile& file, HyperParams& h) {
  h.optional.biases = h.optional.rope_freqs = true;
  MOEND_ASSIGN(const float logits, Scale(file, Key(h, "logit_scale"), {}));
  h.logit_scale = 1.0f / logits;
  MOEND_ASSIGN(h.embedding_scale, Scale(file, Key(h, "embedding_scale"), 1.0f));
  MOEND_ASSIGN(const float residual, Scale(file, Key(h, "residual_scale"), 1.0f));
  MOEND_ASSIGN(const bool rope, file.Boolean(Key(h, "rope.scaling.finetuned"), true));
  MOEND_TRY(ReadExperts(file, h, /*required=*/false));
  if (h.layers[0].ffn.n_experts > 0) MOEND_TRY(ReadSharedExpert(file, h, 0, /*gate=*/false));
  for (LayerParams& layer : h.layers) {
    layer.residual_scale = residual;
    layer.ffn.normalize = true;
    // In granite the key says whether there is RoPE at all; granitemoe always has it.
    if (!rope && h.architecture_name == "granite") layer.rope.n_dims = 0;
  }
  return {};
}

}  // namespace moend
