// gemma2 and gemma3: embeddings times the root of their width, norms before and behind, GeGLU, sliding
// layers; gemma2 with soft caps, gemma3 with a norm over each head of Q and K.
#include <cmath>

#include "moend/model/arch/arch.h"

namespace moend {
namespace {

constexpr float kSlidingFreqBase = 10000.0f;  // of gemma3

// What both have. `wide`: the number of layers of the one size whose queries are scaled by the width of the
// model over its heads instead of the heads' size, which no key of a file says.
void DescribeGemma(HyperParams& h, int64_t wide) {
  h.embedding_scale = std::sqrt(static_cast<float>(h.n_embd));
  const int64_t per_head = h.n_layers == wide ? h.n_embd / h.n_heads : h.head_size;
  h.softmax_scale = 1.0f / std::sqrt(static_cast<float>(std::max<int64_t>(per_head, 1)));
  for (LayerParams& layer : h.layers) {
    layer.post_norms = true;
    layer.ffn.activation = Activation::kGelu;
  }
}

}  // namespace

Expected<void> DescribeGemma2(const GgufFile& file, HyperParams& h) {
  DescribeGemma(h, 46);
  MOEND_TRY(ReadWindows(file, h, 4096, 2, h.rope.freq_base));
  MOEND_ASSIGN(const float cap, ReadSoftCap(file, Key(h, "attn_logit_softcapping"), 50.0f));
  for (LayerParams& layer : h.layers) layer.soft_cap = cap;
  const std::string final_key = Key(h, "final_logit_softcapping");
  MOEND_ASSIGN(h.logit_soft_cap, ReadSoftCap(file, final_key, 30.0f));
  if (h.logit_soft_cap == 0)
    return Fail(ErrorCode::kCorrupt, "{}: {} is 0, which leaves no logits", file.path(), final_key);
  return RefuseExperts(file, h);
}

Expected<void> DescribeGemma3(const GgufFile& file, HyperParams& h) {
  DescribeGemma(h, 62);
  h.optional.vision = true;
  MOEND_TRY(ReadWindows(file, h, 0, 6, kSlidingFreqBase));
  MOEND_ASSIGN(h.logit_soft_cap, ReadSoftCap(file, Key(h, "final_logit_softcapping"), 0.0f));
  for (LayerParams& layer : h.layers) {
    layer.qk_norm = QkNorm::kHeads;
    if (layer.window > 0) layer.rope.freq_scale = 1.0f;  // contexts are stretched where all of them is seen
  }
  return RefuseExperts(file, h);
}

}  // namespace moend
