// Small models with random weights, written as GGUF files that libllama loads too.
#pragma once

#include <ggml.h>
#include <gguf.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace moend::test {

struct TestModelOptions {
  std::string architecture = "llama";  // any that moend runs
  int64_t n_layers = 3, n_embd = 128, n_heads = 4, n_kv_heads = 2, head_size = 32, n_ff = 256;
  int64_t n_vocab = 320;  // at least kLeastVocab
  int64_t n_ctx_train = 4096;
  ggml_type weight_type = GGML_TYPE_F16;  // of the matrices; rows must be multiples of its block size
  float rope_freq_base = 10000.0f;
  std::string rope_scaling;  // none, linear, yarn; empty leaves the key out
  float rope_factor = 0;     // 0 leaves the key out
  int64_t rope_original_context = 0;
  float rope_attn_factor = 0;
  bool rope_factors = false;  // llama-3's tensor rope_freqs.weight (llama only)
  bool tied = false;          // the output projection is the embedding
  bool biases = false;        // of the Q, K and V projections
  bool fused_qkv =
      false;  // one matrix attn_qkv (llama only: libllama reads it in all, converters write none)
  // Every eighth channel of the K projection is this much larger, as in models with outlier channels.
  float k_outlier = 1.0f;
  bool chat_template = false;         // ChatML
  bool sentencepiece = false;         // tokenizer of the kind "llama" instead of "gpt2"
  std::string pre_tokenizer;          // tokenizer.ggml.pre; empty takes the usual one of the architecture
  int64_t n_experts = 0, n_used = 0;  // n_ff is then of an expert
  int64_t n_ff_shared = 0;            // 0: no shared expert
  int64_t rope_dims = 0;              // channels of a head that are turned; 0: all
  float logit_scale = 0, residual_scale = 0, embedding_scale = 0, attention_scale = 0;  // granite; 0: no key
  float temperature_scale = 0;                                                          // mistral3; 0: no key
  float yarn_beta_fast = 0, yarn_log_multiplier = 0;                                    // mistral3; 0: no key
  int64_t window = 0, window_pattern = 0;       // gemma, gpt-oss; 0: no key
  std::vector<bool> sliding;                    // the pattern, layer by layer
  float attn_soft_cap = 0, final_soft_cap = 0;  // gemma; 0: no key
  float qk_gain = 1.4f;                         // scores have a spread of about its square
  int64_t dense_layers = 0;                     // glm4moe: the first ones, of width n_ff_dense
  int64_t n_ff_dense = 0;
  int64_t prediction_layers = 0;    // glm4moe: behind the others, for multi-token prediction
  float expert_scale = 0;           // glm4moe; 0: no key
  bool normalized_experts = false;  // glm4moe
  bool qk_norms = false;            // glm4moe
  bool vision = false;              // gemma3: tensors of an image encoder
  bool rope_finetuned = true;       // granite: false says that there is no RoPE
  // qwen3next, qwen35, qwen35moe: every attention_interval-th layer attends, or those of which `recurrent`
  // says so. Delta nets: heads of K and V, their size, and the length of the convolution.
  int64_t attention_interval = 0;  // 0: no key
  std::vector<bool> recurrent;
  int64_t delta_k_heads = 0, delta_v_heads = 0, delta_head_size = 0, delta_kernel = 4;
  std::vector<int32_t> rope_sections;
  uint64_t seed = 1;
};

// A small model of an architecture whose layers slide in turn (gemma2, gemma3, gpt-oss): every second one, of
// 4, sees the newest `window` tokens. gemma2's scores are capped.
TestModelOptions SlidingModelOptions(const std::string& architecture, int64_t window);

// The same for those of delta nets (qwen3next, qwen35, qwen35moe): every second layer holds a state.
TestModelOptions HybridModelOptions(const std::string& architecture);

inline constexpr int64_t kLeastVocab = 288;  // bytes, merges and special tokens

// Whether the file could be written.
bool WriteTestModel(const TestModelOptions& options, const std::string& path);

// The same model with every matrix stored as `type`; both paths name whole GGUF files.
bool ConvertModel(const std::string& from, const std::string& to, ggml_type type);

// The same model with other keys and tensor names, for files that are wrong on purpose. `keys` may be empty;
// `name` gives a tensor's new name, empty to leave the tensor out.
bool EditModel(const std::string& from, const std::string& to, const std::function<void(gguf_context*)>& keys,
               const std::function<std::string(const std::string&)>& name = {});

// Tokens without order, the same for the same seed; special tokens do not occur.
std::vector<int32_t> RandomTokens(int64_t n, uint64_t seed);

// A directory of its own, removed with all it holds.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

}  // namespace moend::test
