// A GGUF model, checked and mapped. Every count, offset and size in the file is checked by our own reader
// (gguf.h) before ggml or libllama see the file. Weights stay in the mapping, but for those that are copied
// into a layout that ggml multiplies faster (LoadOptions::repack).
#pragma once

#include <ggml.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moend/attention/params.h"
#include "moend/base/error.h"
#include "moend/model/chat.h"
#include "moend/model/grammar.h"
#include "moend/model/layer_params.h"

namespace moend {

// Tensors that files of an architecture may have or lack.
struct OptionalTensors {
  bool biases = false;  // of the attention's output and the feed-forward network
  bool logit_bias = false;
  bool rope_freqs = false;         // llama-3's frequency factors
  bool long_rope_factors = false;  // phi3's two lists of them
  bool vision = false;             // parts for images, which are passed over: the text runs
};

struct HyperParams {
  std::string architecture_name, name;
  int64_t n_blocks = 0;  // layers of the file: behind n_layers may be some for multi-token prediction
  int64_t n_layers = 0, n_embd = 0, n_ff = 0, n_vocab = 0, n_ctx_train = 0;
  int64_t n_heads = 0, n_kv_heads = 0, head_size = 0;  // of every layer
  float rms_eps = 1e-5f;
  float softmax_scale = 0;  // 1 / sqrt(head_size) unless the file says otherwise
  float embedding_scale = 1.0f, logit_scale = 1.0f;
  float logit_soft_cap = 0;  // as LayerParams::soft_cap, of the logits
  QueryTemperature query_temperature;
  RopeParams rope;  // of layers that have RoPE
  OptionalTensors optional;
  const char* ffn_norm = "ffn_norm";  // the name in files of the norm in front of the feed-forward network
  std::vector<LayerParams> layers;    // [n_layers]
  bool recurrent() const;             // some layers hold a state instead of K/V
  int64_t state_floats() const;       // of the largest of those states
};

// Weights of a layer; absent ones are null. Names as in GGUF (blk.N.attn_q.weight ...).
struct LayerWeights {
  ggml_tensor *attn_norm = nullptr, *wq = nullptr, *wk = nullptr, *wv = nullptr, *wo = nullptr;
  ggml_tensor *bq = nullptr, *bk = nullptr, *bv = nullptr, *bo = nullptr;
  ggml_tensor *q_norm = nullptr, *k_norm = nullptr;  // QkNorm
  ggml_tensor* sinks = nullptr;                      // [n_heads]
  ggml_tensor* rope_freqs = nullptr;                 // factors that RoPE's frequencies are divided by
  ggml_tensor *attn_post_norm = nullptr, *ffn_post_norm = nullptr;
  ggml_tensor *ffn_norm = nullptr, *ffn_gate = nullptr, *ffn_up = nullptr, *ffn_down = nullptr;
  ggml_tensor *ffn_gate_b = nullptr, *ffn_up_b = nullptr, *ffn_down_b = nullptr;
  // Experts: [n_embd, n_experts]; [in, out, n_experts]; the shared one; [n_embd].
  ggml_tensor *router = nullptr, *gate_experts = nullptr, *up_experts = nullptr, *down_experts = nullptr;
  // [n_experts]; [out, n_experts]
  ggml_tensor *router_b = nullptr, *selection_b = nullptr, *gate_experts_b = nullptr, *up_experts_b = nullptr,
              *down_experts_b = nullptr;
  // DeltaNetParams: [n_embd, channels] of all K heads' queries and keys, and values; [n_embd, values];
  // [values, n_embd]; [kernel, channels]; [head_size].
  ggml_tensor *delta_qkv = nullptr, *delta_gate = nullptr, *delta_out = nullptr, *delta_conv = nullptr,
              *delta_norm = nullptr;
  // [n_v_heads]: times softplus of the step, that is the log of what stays; bias of the step.
  ggml_tensor *delta_decay = nullptr, *delta_step_b = nullptr;
  // Either one matrix [n_embd, 2 * n_v_heads] or one each [n_embd, n_v_heads].
  ggml_tensor *delta_gates = nullptr, *delta_rate = nullptr, *delta_step = nullptr;
  ggml_tensor *gate_shared = nullptr, *up_shared = nullptr, *down_shared = nullptr, *shared_gate = nullptr;
};

// All of them but `rope_freqs`, which layers share.
inline constexpr ggml_tensor* LayerWeights::*kLayerWeights[] = {&LayerWeights::attn_norm,
                                                                &LayerWeights::wq,
                                                                &LayerWeights::wk,
                                                                &LayerWeights::wv,
                                                                &LayerWeights::wo,
                                                                &LayerWeights::bq,
                                                                &LayerWeights::bk,
                                                                &LayerWeights::bv,
                                                                &LayerWeights::bo,
                                                                &LayerWeights::q_norm,
                                                                &LayerWeights::k_norm,
                                                                &LayerWeights::sinks,
                                                                &LayerWeights::attn_post_norm,
                                                                &LayerWeights::ffn_post_norm,
                                                                &LayerWeights::ffn_norm,
                                                                &LayerWeights::ffn_gate,
                                                                &LayerWeights::ffn_up,
                                                                &LayerWeights::ffn_down,
                                                                &LayerWeights::ffn_gate_b,
                                                                &LayerWeights::ffn_up_b,
                                                                &LayerWeights::ffn_down_b,
                                                                &LayerWeights::router,
                                                                &LayerWeights::gate_experts,
                                                                &LayerWeights::up_experts,
                                                                &LayerWeights::down_experts,
                                                                &LayerWeights::router_b,
                                                                &LayerWeights::selection_b,
                                                                &LayerWeights::gate_experts_b,
                                                                &LayerWeights::up_experts_b,
                                                                &LayerWeights::down_experts_b,
                                                                &LayerWeights::gate_shared,
                                                                &LayerWeights::up_shared,
                                                                &LayerWeights::down_shared,
                                                                &LayerWeights::shared_gate,
                                                                &LayerWeights::delta_qkv,
                                                                &LayerWeights::delta_gate,
                                                                &LayerWeights::delta_out,
                                                                &LayerWeights::delta_conv,
                                                                &LayerWeights::delta_norm,
                                                                &LayerWeights::delta_decay,
                                                                &LayerWeights::delta_step_b,
                                                                &LayerWeights::delta_gates,
                                                                &LayerWeights::delta_rate,
                                                                &LayerWeights::delta_step};

// Calls fn(const ggml_tensor*) for those that a layer has.
template <class F>
void ForEachWeight(const LayerWeights& w, F&& fn) {
  for (ggml_tensor* LayerWeights::*member : kLayerWeights)
    if (const ggml_tensor* t = w.*member) fn(t);
}

// What turns hidden states into logits.
struct HeadWeights {
  ggml_tensor *norm = nullptr, *output = nullptr;
  ggml_tensor* bias = nullptr;  // qwen2, optional
};

struct Weights {
  ggml_tensor* tok_embd = nullptr;
  HeadWeights head;
  // The file has no output matrix; `head.output` is tok_embd or a repacked copy of it.
  bool tied = false;
  ggml_tensor* rope_freqs = nullptr;
  std::vector<LayerWeights> layers;
};

// Where layers run that do not run on the CPU, as llama.cpp's --device and -ngl have it.
struct DeviceOptions {
  // A name as ListDevices() gives it (model/device.h), "none" for the CPU alone; empty: the first GPU, if
  // there is one.
  std::string name = {};
  // Of the model's layers the last ones, the output matrix counting as one behind them; kAllThatFit: as many
  // as the device has memory for.
  static constexpr int64_t kAllThatFit = -1;
  int64_t n_gpu_layers = kAllThatFit;
};

struct LoadOptions {
  int n_threads = 0;       // 0: all cores; for fingerprinting only
  bool vocabulary = true;  // load the tokenizer through libllama as well
  // Copy matrices of the types for which ggml has a faster layout on this machine (on x86 Q4_0, IQ4_NL and
  // most K quants; with AMX Q8_0 too). Costs as much memory as they take in the file; results differ by the
  // order of the sums.
  bool repack = true;
  // Map the file. It must not be written to or cut short while the model lives then (replacing it by a rename
  // is harmless); false reads it into memory of its own.
  bool map = true;
  DeviceOptions device = {"none", DeviceOptions::kAllThatFit};
};

// Tokenizer, by libllama (vocabulary-only load of the same file), and chat template. Thread safe. No message
// of an error names the file, since clients of a server may read it.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  // add_special: BOS etc. as the model wants, BOS once even if the text begins with one; parse_special:
  // "<|...|>" in the text become their tokens. `stop`, if there is one, is asked between two pieces of the
  // text; true ends the call with kCancelled.
  virtual Expected<std::vector<int32_t>> Tokenize(std::string_view text, bool add_special, bool parse_special,
                                                  const std::function<bool()>& stop = {}) const = 0;
  // The same with special tokens parsed but for those that `prompt` says are text; from byte `from` on.
  virtual Expected<std::vector<int32_t>> TokenizePrompt(const PromptText& prompt, bool add_special,
                                                        int64_t from = 0,
                                                        const std::function<bool()>& stop = {}) const = 0;
  // Most bytes of text that one token can stand for, so that a text has at least its bytes divided by this
  // many tokens; 0 where no such bound holds.
  virtual int64_t longest_token() const = 0;
  virtual std::string Piece(int32_t token, bool special) const = 0;
  virtual std::string Detokenize(std::span<const int32_t> tokens, bool special) const = 0;
  virtual bool IsEndOfGeneration(int32_t token) const = 0;
  virtual int32_t bos() const = 0;  // -1: none
  virtual bool adds_bos() const = 0;
  virtual bool has_chat_template() const = 0;
  // The template of the file, which is run as it is. kInvalidArgument where it refuses the messages,
  // kUnsupported where there is none or it cannot be run.
  virtual Expected<PromptText> ApplyChatTemplate(std::span<const ChatMessage> messages,
                                                 const ChatOptions& options) const = 0;
  // The same with tools, thoughts and schemas, and how to read the answer. Models whose template knows no
  // tools, or that have none, are told of them in words. The grammar, if there is one, is not checked.
  virtual Expected<ChatPrompt> PrepareChat(std::span<const ChatMessage> messages,
                                           const ChatOptions& options) const = 0;
  // See GrammarHost.
  virtual Expected<std::unique_ptr<Grammar>> MakeGrammar(const GrammarSource& source) const = 0;
  // kInvalidArgument names what in the schema, a JSON text, cannot be had.
  virtual Expected<GrammarSource> SchemaGrammar(const std::string& schema) const = 0;
  // Splits off the processes in which templates and grammars run, while this one is small.
  virtual void StartWorkers() const = 0;
  // Empty where the template is run as it is; else a sentence on what is done instead. Runs it once.
  virtual std::string chat_template_note() const = 0;
};

struct DeviceWeights;

class Model {
 public:
  static Expected<std::shared_ptr<const Model>> Load(const std::string& path,
                                                     const LoadOptions& options = {});
  virtual ~Model() = default;
  virtual const std::string& path() const = 0;
  virtual const HyperParams& hparams() const = 0;
  virtual const Weights& weights() const = 0;
  virtual bool has_tokenizer() const = 0;          // when it was loaded with `vocabulary`
  virtual const Tokenizer& tokenizer() const = 0;  // only then
  virtual const std::string& hash() const = 0;     // Fingerprint::hash
  // [n_kv_heads][head_size]: by what the channels of a layer's keys are multiplied, and those of its queries
  // divided, so that both are about as large: sqrt(|q| / |k|) as the projections' rows, biases and norms have
  // it, equal for the channels of a RoPE pair, with a geometric mean of 1 a head. Reads the weights: some
  // milliseconds a layer.
  virtual std::vector<float> KeyBalance(int64_t layer) const = 0;
  // [n_heads][head_size][head_size]: W'W of each query head's part W of the output projection, so that e'
  // (W'W) e is the square of what an error e of the head's attention does to the residual stream. Within some
  // percent.
  virtual std::vector<float> OutputGrams(int64_t layer) const = 0;
  // How a layer's queries attend.
  AttentionStyle Style(int64_t layer) const {
    const LayerParams& p = hparams().layers[static_cast<std::size_t>(layer)];
    const ggml_tensor* sinks = weights().layers[static_cast<std::size_t>(layer)].sinks;
    return {hparams().softmax_scale, p.soft_cap, p.window,
            sinks ? static_cast<const float*>(sinks->data) : nullptr};
  }
  virtual int64_t file_bytes() const = 0;
  virtual int64_t repacked_bytes() const = 0;  // allocated for copies of weights
  // The layers that lie on a device, too (model/device_weights.h); null: none.
  virtual const DeviceWeights* device() const = 0;
};

}  // namespace moend
