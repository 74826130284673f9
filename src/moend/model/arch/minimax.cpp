// minimax-m2: one norm over all heads of Q, and of K, RoPE on half of the channels, experts that a sigmoid
// weighs and a bias helps to choose.
#include "moend/model/arch/arch.h"

namespace moend {

Expected<void> DescribeMinimaxM2(const GgufFile& file, HyperParams& h) {
  MOEND_TRY(RequireSigmoid(file, h));
  MOEND_TRY(ReadExperts(file, h, /*required=*/true));
  for (LayerParams& layer : h.layers) {
    layer.qk_norm = QkNorm::kRow;
    layer.ffn.n_ff = h.n_ff;
    layer.ffn.router = Router::kSigmoid;
    layer.ffn.selection_bias = layer.ffn.normalize = true;
  }
  return {};
}

}  // namespace moend
