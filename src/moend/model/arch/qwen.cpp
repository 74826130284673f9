// qwen2 (Qwen2, Qwen2.5), qwen3 and their mixtures of experts.
#include "moend/model/arch/arch.h"

namespace moend {
namespace {

Expected<void> HeadsFillTheWidth(const GgufFile& file, const HyperParams& h) {
  if (h.head_size * h.n_heads == h.n_embd) return {};
  return Fail(ErrorCode::kCorrupt, "{}: {} heads of {} channels do not add up to {}.embedding_length = {}",
              file.path(), h.n_heads, h.head_size, h.architecture_name, h.n_embd);
}

}  // namespace

Expected<void> DescribeQwen2(const GgufFile& file, HyperParams& h) {
  h.optional.logit_bias = true;
  MOEND_TRY(HeadsFillTheWidth(file, h));
  return RefuseExperts(file, h);
}

Expected<void> DescribeQwen2Moe(const GgufFile& file, HyperParams& h) {
  MOEND_TRY(HeadsFillTheWidth(file, h));
  MOEND_TRY(ReadExperts(file, h, /*required=*/true));
  const bool own_width = file.Find(Key(h, "expert_feed_forward_length"));
  if (!own_width)  // as libllama has it
    for (LayerParams& layer : h.layers) layer.ffn.n_ff = h.n_ff / layer.ffn.n_used;
  return ReadSharedExpert(file, h, h.n_ff, /*gate=*/true);
}

Expected<void> DescribeQwen3(const GgufFile& file, HyperParams& h) {
  for (LayerParams& layer : h.layers) layer.qk_norm = QkNorm::kHeads;
  return RefuseExperts(file, h);
}

Expected<void> DescribeQwen3Moe(const GgufFile& file, HyperParams& h) {
  MOEND_TRY(ReadExperts(file, h, /*required=*/true));
  const bool own_width = file.Find(Key(h, "expert_feed_forward_length"));
  for (LayerParams& layer : h.layers) {
    layer.qk_norm = QkNorm::kHeads;
    layer.ffn.normalize = true;
    if (!own_width) layer.ffn.n_ff = h.n_ff / layer.ffn.n_used;
  }
  return {};
}

}  // namespace moend
