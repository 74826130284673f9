// glm4: GLM-4 9B and 32B. Half of a head's channels are turned; norms stand before and behind. glm4moe:
// GLM-4.5 to 4.7. The first layers are dense, the others have experts that a sigmoid weighs and a bias helps
// to choose.
#include <cmath>

#include "moend/model/arch/arch.h"

namespace moend {
namespace {

Expected<void> RefuseSections(const GgufFile& file, const HyperParams& h) {
  if (const std::string key = Key(h, "rope.dimension_sections"); file.Find(key))
    return Fail(ErrorCode::kUnsupported, "{} has RoPE in sections ({}), for images; moend runs text models",
                file.path(), key);
  return {};
}

}  // namespace

Expected<void> DescribeGlm4Moe(const GgufFile& file, HyperParams& h) {
  MOEND_TRY(RefuseSections(file, h));
  MOEND_TRY(RequireSigmoid(file, h));
  h.ffn_norm = "post_attention_norm";
  MOEND_ASSIGN(const int64_t dense, file.Integer(Key(h, "leading_dense_block_count"), 0, h.n_layers, 0));
  MOEND_ASSIGN(const int64_t shared, file.Integer(Key(h, "expert_shared_count"), 0, kMaxExperts));
  MOEND_ASSIGN(const bool normalize, file.Boolean(Key(h, "expert_weights_norm"), false));
  const std::string scale_key = Key(h, "expert_weights_scale");
  MOEND_ASSIGN(const float scale, file.Real(scale_key, 0.0f));
  if (scale < 0) return Fail(ErrorCode::kCorrupt, "{}: {} is {}, below 0", file.path(), scale_key, scale);
  MOEND_TRY(ReadExperts(file, h, /*required=*/true));
  const bool own_width = file.Find(Key(h, "expert_feed_forward_length"));
  for (int64_t l = 0; l < h.n_layers; ++l) {
    LayerParams& layer = h.layers[static_cast<std::size_t>(l)];
    if (file.FindTensor(fmt::format("blk.{}.attn_q_norm.weight", l))) layer.qk_norm = QkNorm::kHeads;
    FfnParams& ffn = layer.ffn;
    if (l < dense) {
      ffn = FfnParams();
      ffn.n_ff = h.n_ff;
      continue;
    }
    if (!own_width) ffn.n_ff = h.n_ff / ffn.n_used;
    ffn.router = Router::kSigmoid;
    ffn.selection_bias = true;
    ffn.normalize = normalize;
    if (scale > 0) ffn.weight_scale = scale;
    if (ffn.n_ff * shared > kMaxWidth)
      return Fail(ErrorCode::kCorrupt, "{}: {} shared experts of {} channels are too wide", file.path(),
                  shared, ffn.n_ff);
    ffn.n_ff_shared = ffn.n_ff * shared;
  }
  return {};
}

Expected<void> DescribeGlm4(const GgufFile& file, HyperParams& h) {
  MOEND_TRY(RefuseSections(file, h));
  for (LayerParams& layer : h.layers) {
    layer.post_norms = true;
    layer.ffn.fused = true;
  }
  return RefuseExperts(file, h);
}

}  // namespace moend
