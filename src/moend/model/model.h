// A GGUF model, checked and mapped. Every count, offset and size in the file is checked by our own reader
// (gguf.h) before ggml or libllama see the file. Weights stay in the mapping, but for those that are copied
// into a layout that ggml multiplies faster (LoadOptions::repack).
#pragma once

#include <ggml.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moend/base/error.h"

namespace moend {

enum class Architecture { kLlama, kQwen2, kQwen3 };

struct RopeParams {
  int mode = 0;  // GGML_ROPE_TYPE_NORMAL (llama) or GGML_ROPE_TYPE_NEOX (qwen)
  int n_dims = 0;
  int n_ctx_orig = 0;  // YaRN
  float freq_base = 10000.0f, freq_scale = 1.0f, ext_factor = 0.0f, attn_factor = 1.0f, beta_fast = 32.0f,
        beta_slow = 1.0f;
};

struct HyperParams {
  Architecture architecture = Architecture::kLlama;
  std::string architecture_name, name;
  int64_t n_layers = 0, n_embd = 0, n_heads = 0, n_kv_heads = 0, head_size = 0, n_ff = 0, n_vocab = 0;
  int64_t n_ctx_train = 0;
  float rms_eps = 1e-5f;
  float softmax_scale = 0;  // 1 / sqrt(head_size) unless the file says otherwise
  RopeParams rope;
};

// Weights of a layer; optional ones are null. Names as in GGUF (blk.N.attn_q.weight ...).
struct LayerWeights {
  ggml_tensor *attn_norm = nullptr, *wq = nullptr, *wk = nullptr, *wv = nullptr, *wo = nullptr;
  ggml_tensor *bq = nullptr, *bk = nullptr, *bv = nullptr, *bo = nullptr;
  ggml_tensor *q_norm = nullptr, *k_norm = nullptr;  // qwen3
  ggml_tensor* rope_freqs = nullptr;                 // llama-3 frequency factors
  ggml_tensor *ffn_norm = nullptr, *ffn_gate = nullptr, *ffn_up = nullptr, *ffn_down = nullptr;
  ggml_tensor *ffn_gate_b = nullptr, *ffn_up_b = nullptr, *ffn_down_b = nullptr;  // llama
};

struct Weights {
  ggml_tensor *tok_embd = nullptr, *output_norm = nullptr, *output = nullptr;
  // The file has no output matrix; `output` is tok_embd or a repacked copy of it.
  bool tied = false;
  ggml_tensor* output_b = nullptr;  // qwen2, optional
  ggml_tensor* rope_freqs = nullptr;
  std::vector<LayerWeights> layers;
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
};

struct ChatMessage {
  std::string role, content;
};

// Tokenizer and chat template, by libllama (vocabulary-only load of the same file). Thread safe.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  // add_special: BOS etc. as the model wants; parse_special: "<|...|>" in the text become their tokens. With
  // both, a text that begins with BOS gets no second one.
  virtual Expected<std::vector<int32_t>> Tokenize(std::string_view text, bool add_special,
                                                  bool parse_special) const = 0;
  virtual std::string Piece(int32_t token, bool special) const = 0;
  virtual std::string Detokenize(std::span<const int32_t> tokens, bool special) const = 0;
  virtual bool IsEndOfGeneration(int32_t token) const = 0;
  virtual int32_t bos() const = 0;  // -1: none
  virtual bool adds_bos() const = 0;
  virtual bool has_chat_template() const = 0;
  virtual Expected<std::string> ApplyChatTemplate(std::span<const ChatMessage> messages,
                                                  bool add_generation_prompt) const = 0;
};

class Model {
 public:
  static Expected<std::shared_ptr<const Model>> Load(const std::string& path,
                                                     const LoadOptions& options = {});
  virtual ~Model() = default;
  virtual const std::string& path() const = 0;
  virtual const HyperParams& hparams() const = 0;
  virtual const Weights& weights() const = 0;
  virtual const Tokenizer& tokenizer() const = 0;  // only when loaded with `vocabulary`
  virtual const std::string& hash() const = 0;     // Fingerprint::hash
  // [n_kv_heads][head_size]: by what the channels of a layer's keys are multiplied, and those of its queries
  // divided, so that both are about as large: sqrt(|q| / |k|) as the projections' rows, biases and norms have
  // it, equal for the channels of a RoPE pair, with a geometric mean of 1 a head. Reads the weights: some
  // milliseconds a layer.
  virtual std::vector<float> KeyBalance(int64_t layer) const = 0;
  virtual int64_t file_bytes() const = 0;
  virtual int64_t repacked_bytes() const = 0;  // allocated for copies of weights
};

}  // namespace moend
