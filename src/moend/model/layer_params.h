// What the layers of a model are made of. The three graphs of old (llama, qwen2, qwen3) and all others are
// one graph over this description (graph.h); arch/ says how a file's keys become it.
#pragma once

#include <cmath>
#include <cstdint>

namespace moend {

struct RopeParams {
  int mode = 0;  // GGML_ROPE_TYPE_NORMAL (channels 2p and 2p + 1 are a pair) or GGML_ROPE_TYPE_NEOX (p and p
                 // + n / 2)
  int n_dims = 0;      // channels of a head that are turned, its first ones; 0: no RoPE
  int n_ctx_orig = 0;  // YaRN
  float freq_base = 10000.0f, freq_scale = 1.0f, ext_factor = 0.0f, attn_factor = 1.0f, beta_fast = 32.0f,
        beta_slow = 1.0f;
};

// An RMS norm over Q and K, before RoPE.
enum class QkNorm {
  kNone,
  kHeads,  // each head by itself, with the same weights
  kRow,    // all heads of a token together
};

// Of the gate, which `up` is then multiplied by.
enum class Activation {
  kSilu,
  kGelu,       // ggml's, by the tanh formula
  kSwigluOai,  // gpt-oss: gate and up clamped at 7, gate * sigmoid(1.702 gate) * (up + 1)
};

// What a router makes of its logits; the n_used largest are chosen.
enum class Router {
  kSoftmax,          // of all
  kSoftmaxOfChosen,  // of those chosen
  kSigmoid,          // of each by itself
};

// down(activation(gate(x)) * up(x)).
struct FfnParams {
  Activation activation = Activation::kSilu;
  int64_t n_ff = 0;       // of the dense network, or of one expert
  bool fused = false;     // gate and up are the halves of one matrix
  int64_t n_experts = 0;  // 0: dense
  int64_t n_used = 0;     // experts a token goes through
  Router router = Router::kSoftmax;
  bool expert_biases = false;   // of the router and of the experts' three matrices
  bool selection_bias = false;  // a number an expert decides with its weight whether it is chosen
  bool normalize = false;       // the weights of those used add up to 1
  float weight_scale = 1.0f;    // that the weights are then multiplied by
  int64_t n_ff_shared = 0;      // of an expert that all tokens go through beside; 0: none
  bool shared_gate = false;     // whose output is weighed by a sigmoid
};

// A gated delta net (delta_net.h). Its heads of K and V are of one size.
struct DeltaNetParams {
  int64_t n_k_heads = 0;  // 0: the layer attends
  int64_t n_v_heads = 0;  // a multiple
  int64_t head_size = 0;
  int64_t kernel = 0;    // tokens that the convolution sees, the newest included
  bool grouped = false;  // neighbouring heads of V share a head of K, and its gates are stored with it; else
                         // heads i, i + n_k_heads, ... do
  int64_t channels() const { return (2 * n_k_heads + n_v_heads) * head_size; }  // of the convolution
  // What is remembered of a context, f32: [channels][kernel - 1] inputs of the convolution, and a matrix for
  // each head of V.
  int64_t state_floats() const { return (kernel - 1) * channels() + n_v_heads * head_size * head_size; }
};

struct LayerParams {
  RopeParams rope;
  int64_t window = 0;        // a sliding layer: a token sees the newest so many up to itself; 0: a full layer
  float soft_cap = 0;        // a score s counts as soft_cap * tanh(s / soft_cap); 0: as it is
  DeltaNetParams delta_net;  // in the place of attention; what is said of attention here means nothing then
  bool output_gate = false;  // a query head's rows of the Q projection are followed by those of a gate, whose
                             // sigmoid weighs the head's output
  bool sinks = false;        // a learned logit a query head has its share of the softmax
  QkNorm qk_norm = QkNorm::kNone;
  bool post_norms =
      false;  // norms behind attention and feed-forward too, before they are added to the stream
  float residual_scale = 1.0f;  // of what is added to the stream
  FfnParams ffn;
  bool holds_state() const { return delta_net.n_k_heads > 0; }
  // Whether its K/V is a matter of plans.
  bool compresses() const { return window == 0 && !holds_state(); }
};

// Queries far behind the trained context are made sharper: times 1 + scale * ln(1 + floor(position / every)).
struct QueryTemperature {
  float scale = 0;  // 0: none
  int64_t every = 0;
  float factor(int32_t position) const {
    const double turn = std::floor(static_cast<float>(position) / static_cast<float>(every));
    return static_cast<float>(std::log(turn + 1.0) * static_cast<double>(scale) + 1.0);
  }
};

}  // namespace moend
