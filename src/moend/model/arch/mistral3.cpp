// mistral3: Ministral 3 and Devstral. YaRN with its own constants, and queries that get sharper with their
// position.
#include <cmath>

#include "moend/model/arch/arch.h"

namespace moend {

Expected<void> DescribeMistral3(const GgufFile& file, HyperParams& h) {
  h.optional.biases = h.optional.rope_freqs = true;
  MOEND_ASSIGN(const float scale, file.Real(Key(h, "attention.temperature_scale"), 0.0f));
  if (scale != 0) h.query_temperature = {scale, h.rope.n_ctx_orig};
  MOEND_ASSIGN(h.rope.beta_fast, file.Real(Key(h, "rope.scaling.yarn_beta_fast"), h.rope.beta_fast));
  MOEND_ASSIGN(h.rope.beta_slow, file.Real(Key(h, "rope.scaling.yarn_beta_slow"), h.rope.beta_slow));
  MOEND_ASSIGN(const float log_multiplier, file.Real(Key(h, "rope.scaling.yarn_log_multiplier"), 0.0f));
  if (h.rope.ext_factor != 0 && log_multiplier != 0) {
    // YaRN's magnitude over that of all dimensions: read so far was 1 + 0.1 ln(factor), if the factor is
    // above 1.
    const float factor = 1.0f / h.rope.freq_scale;
    if (factor > 1.0f) h.rope.attn_factor /= 0.1f * log_multiplier * std::log(factor) + 1.0f;
  }
  if (!(h.rope.beta_fast > 0) || !(h.rope.beta_slow > 0) || !std::isfinite(h.rope.attn_factor))
    return Fail(ErrorCode::kCorrupt, "{}: its YaRN constants {}, {} and {} leave no usable frequencies",
                file.path(), h.rope.beta_fast, h.rope.beta_slow, log_multiplier);
  for (LayerParams& layer : h.layers) {
    layer.rope = h.rope;
    layer.ffn.normalize = true;  // of experts, where it has them
  }
  return ReadExperts(file, h, /*required=*/false);
}

}  // namespace moend
