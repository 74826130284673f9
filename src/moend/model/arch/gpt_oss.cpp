// gpt-oss: a sink in every softmax, every second layer sliding, biases everywhere, experts with a SwiGLU of
// their own.
#include "moend/model/arch/arch.h"

namespace moend {

Expected<void> DescribeGptOss(const GgufFile& file, HyperParams& h) {
  h.optional.biases = true;
  h.ffn_norm = "post_attention_norm";
  MOEND_TRY(ReadWindows(file, h, {}, 2, h.rope.freq_base));
  for (LayerParams& layer : h.layers) {
    layer.sinks = true;
    layer.ffn.activation = Activation::kSwigluOai;
    layer.ffn.router = Router::kSoftmaxOfChosen;
    layer.ffn.expert_biases = true;
  }
  return ReadExperts(file, h, /*required=*/true);
}

}  // namespace moend
