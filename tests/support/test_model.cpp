#include "tests/support/test_model.h"

#include <ggml-cpp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>

namespace moend::test {
namespace {

struct Writer {
  gguf_context_ptr file{gguf_init_empty()};
  std::vector<ggml_context_ptr> contexts;  // own the tensors until the file is written

  // rows x row_size values, stored as `type`.
  void Add(const std::string& name, ggml_type type, const std::vector<float>& values, int64_t row_size) {
    const int64_t rows = static_cast<int64_t>(values.size()) / row_size;
    const std::size_t bytes = ggml_row_size(type, row_size) * static_cast<std::size_t>(rows);
    ggml_context* ctx = ggml_init({bytes + 2 * ggml_tensor_overhead(), nullptr, false});
    contexts.emplace_back(ctx);
    ggml_tensor* t =
        rows == 1 ? ggml_new_tensor_1d(ctx, type, row_size) : ggml_new_tensor_2d(ctx, type, row_size, rows);
    ggml_set_name(t, name.c_str());
    if (!ggml_is_quantized(type) && type != GGML_TYPE_F32 && type != GGML_TYPE_F16 && type != GGML_TYPE_BF16)
      std::memset(t->data, 0, bytes);  // integers: for models to be refused
    else
      ggml_quantize_chunk(type, values.data(), t->data, 0, rows, row_size, nullptr);
    gguf_add_tensor(file.get(), t);
  }
  // The same for `count` matrices of `rows` rows each.
  void AddStack(const std::string& name, ggml_type type, const std::vector<float>& values, int64_t row_size,
                int64_t rows, int64_t count) {
    const std::size_t bytes = ggml_row_size(type, row_size) * static_cast<std::size_t>(rows * count);
    ggml_context* ctx = ggml_init({bytes + 2 * ggml_tensor_overhead(), nullptr, false});
    contexts.emplace_back(ctx);
    ggml_tensor* t = ggml_new_tensor_3d(ctx, type, row_size, rows, count);
    ggml_set_name(t, name.c_str());
    ggml_quantize_chunk(type, values.data(), t->data, 0, rows * count, row_size, nullptr);
    gguf_add_tensor(file.get(), t);
  }
  bool Write(const std::string& path) const { return gguf_write_to_file(file.get(), path.c_str(), false); }
};

// A GGUF file read as a whole.
struct Source {
  explicit Source(const std::string& path) {
    ggml_context* ctx = nullptr;
    file.reset(gguf_init_from_file(path.c_str(), {/*no_alloc=*/false, &ctx}));
    context.reset(ctx);
    for (int64_t i = 0; file && i < gguf_get_n_tensors(file.get()); ++i)
      tensors.push_back(ggml_get_tensor(ctx, gguf_get_tensor_name(file.get(), i)));
  }
  gguf_context_ptr file;
  ggml_context_ptr context;
  std::vector<ggml_tensor*> tensors;
};

// The character that byte-level BPE writes for a byte: printable ones stand for themselves, the others are
// moved up to U+0100 and following, in order.
std::string ByteToken(int byte) {
  const auto printable = [](int b) {
    return (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || (b >= 0xae && b <= 0xff);
  };
  int code = byte;
  if (!printable(byte)) {
    code = 0x100;
    for (int b = 0; b < byte; ++b) code += !printable(b);
  }
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 0x3f))};
}

enum TokenType : int32_t { kNormal = 1, kUnknown = 2, kControl = 3, kUnused = 5, kByte = 6 };

// Tokens as they go into the file.
struct Vocabulary {
  std::vector<std::string> texts;
  std::vector<int32_t> types;
  std::vector<float> scores;
  void Add(std::string text, TokenType type, float score = 0.0f) {
    texts.push_back(std::move(text));
    types.push_back(type);
    scores.push_back(score);
  }
  uint32_t size() const { return static_cast<uint32_t>(texts.size()); }
  void Write(gguf_context* file, int64_t n_vocab) {
    while (size() < n_vocab) Add("<unused" + std::to_string(size()) + ">", kUnused);
    std::vector<const char*> pointers;
    for (const std::string& t : texts) pointers.push_back(t.c_str());
    gguf_set_arr_str(file, "tokenizer.ggml.tokens", pointers.data(), pointers.size());
    gguf_set_arr_data(file, "tokenizer.ggml.token_type", GGUF_TYPE_INT32, types.data(), types.size());
  }
};

void AddBytePairs(const TestModelOptions& o, gguf_context* file) {
  Vocabulary v;
  std::vector<std::string> merges;
  for (int b = 0; b < 256; ++b) v.Add(ByteToken(b), kNormal);
  const std::string space = ByteToken(' ');
  for (const auto& [left, right] : {std::pair<std::string, std::string>{space, "t"},
                                    {"h", "e"},
                                    {space + "t", "he"},
                                    {"i", "n"},
                                    {"a", "n"},
                                    {space, "a"},
                                    {"e", "r"},
                                    {"o", "n"}}) {
    merges.push_back(left + " " + right);
    v.Add(left + right, kNormal);
  }
  const uint32_t special = v.size();
  for (const char* text : {"<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"}) v.Add(text, kControl);
  v.Write(file, o.n_vocab);
  std::vector<const char*> merge_texts;
  for (const std::string& m : merges) merge_texts.push_back(m.c_str());
  const std::string usual = o.architecture == "llama" ? "gpt-2" : "qwen2";
  gguf_set_val_str(file, "tokenizer.ggml.model", "gpt2");
  gguf_set_val_str(file, "tokenizer.ggml.pre", (o.pre_tokenizer.empty() ? usual : o.pre_tokenizer).c_str());
  gguf_set_arr_str(file, "tokenizer.ggml.merges", merge_texts.data(), merge_texts.size());
  gguf_set_val_u32(file, "tokenizer.ggml.bos_token_id", special);
  gguf_set_val_u32(file, "tokenizer.ggml.eos_token_id", special + 1);
}

void AddSentencePieces(const TestModelOptions& o, gguf_context* file) {
  Vocabulary v;
  v.Add("<unk>", kUnknown);
  v.Add("<s>", kControl);
  v.Add("</s>", kControl);
  for (int b = 0; b < 256; ++b) {
    constexpr const char* kHex = "0123456789ABCDEF";
    v.Add({'<', '0', 'x', kHex[b >> 4], kHex[b & 15], '>'}, kByte);
  }
  const std::string space = "\u2581";
  float score = 0;
  for (const std::string& piece :
       {space + "t", std::string("he"), space + "the", std::string("in"), space, std::string("e"),
        std::string("t"), std::string("h"), std::string("i"), std::string("n")})
    v.Add(piece, kNormal, score -= 1.0f);
  v.Write(file, o.n_vocab);
  gguf_set_val_str(file, "tokenizer.ggml.model", "llama");
  gguf_set_arr_data(file, "tokenizer.ggml.scores", GGUF_TYPE_FLOAT32, v.scores.data(), v.scores.size());
  gguf_set_val_u32(file, "tokenizer.ggml.bos_token_id", 1);
  gguf_set_val_u32(file, "tokenizer.ggml.eos_token_id", 2);
}

void AddTokenizer(const TestModelOptions& o, gguf_context* file) {
  if (o.sentencepiece)
    AddSentencePieces(o, file);
  else
    AddBytePairs(o, file);
  gguf_set_val_bool(file, "tokenizer.ggml.add_bos_token", true);
  if (o.chat_template)
    gguf_set_val_str(
        file, "tokenizer.chat_template",
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
        "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% "
        "endif %}");
}

void AddHyperParams(const TestModelOptions& o, gguf_context* file) {
  const auto key = [&](const char* name) { return o.architecture + "." + name; };
  const auto number = [&](const char* name, int64_t value) {
    gguf_set_val_u32(file, key(name).c_str(), static_cast<uint32_t>(value));
  };
  gguf_set_val_str(file, "general.architecture", o.architecture.c_str());
  gguf_set_val_str(file, "general.name", "random test model");
  number("context_length", o.n_ctx_train);
  number("embedding_length", o.n_embd);
  number("block_count", o.n_layers + o.prediction_layers);
  number("feed_forward_length", o.n_ff_dense > 0 ? o.n_ff_dense : o.n_ff);
  if (o.prediction_layers > 0) number("nextn_predict_layers", o.prediction_layers);
  number("attention.head_count", o.n_heads);
  number("attention.head_count_kv", o.n_kv_heads);
  number("attention.key_length", o.head_size);
  number("attention.value_length", o.head_size);
  number("rope.dimension_count", o.rope_dims > 0 ? o.rope_dims : o.head_size);
  if (o.n_experts > 0) {
    number("expert_count", o.n_experts);
    number("expert_used_count", o.n_used);
    const bool sigmoid = o.architecture == "glm4moe" || o.architecture == "minimax-m2";
    if (o.architecture.starts_with("qwen") || o.architecture == "gpt-oss" || sigmoid)
      number("expert_feed_forward_length", o.n_ff);
    if (sigmoid) number("expert_gating_func", 2);
    if (o.architecture == "glm4moe") {
      number("leading_dense_block_count", o.dense_layers);
      number("expert_shared_count", o.n_ff_shared / o.n_ff);
      gguf_set_val_bool(file, key("expert_weights_norm").c_str(), o.normalized_experts);
    }
    if (o.n_ff_shared > 0) number("expert_shared_feed_forward_length", o.n_ff_shared);
  }
  for (const auto& [name, value] : {std::pair{"logit_scale", o.logit_scale},
                                    {"residual_scale", o.residual_scale},
                                    {"embedding_scale", o.embedding_scale},
                                    {"attention.scale", o.attention_scale},
                                    {"attention.temperature_scale", o.temperature_scale},
                                    {"expert_weights_scale", o.expert_scale},
                                    {"attn_logit_softcapping", o.attn_soft_cap},
                                    {"final_logit_softcapping", o.final_soft_cap},
                                    {"rope.scaling.yarn_beta_fast", o.yarn_beta_fast},
                                    {"rope.scaling.yarn_log_multiplier", o.yarn_log_multiplier}})
    if (value != 0) gguf_set_val_f32(file, key(name).c_str(), value);
  if (o.window > 0) number("attention.sliding_window", o.window);
  if (o.window_pattern > 0) number("attention.sliding_window_pattern", o.window_pattern);
  if (!o.sliding.empty()) {
    const std::vector<int8_t> flags(o.sliding.begin(), o.sliding.end());
    gguf_set_arr_data(file, key("attention.sliding_window_pattern").c_str(), GGUF_TYPE_BOOL, flags.data(),
                      flags.size());
  }
  if (o.attention_interval > 0) number("full_attention_interval", o.attention_interval);
  if (!o.recurrent.empty()) {
    const std::vector<int8_t> flags(o.recurrent.begin(), o.recurrent.end());
    gguf_set_arr_data(file, key("attention.recurrent_layers").c_str(), GGUF_TYPE_BOOL, flags.data(),
                      flags.size());
  }
  if (!o.rope_sections.empty())
    gguf_set_arr_data(file, key("rope.dimension_sections").c_str(), GGUF_TYPE_INT32, o.rope_sections.data(),
                      o.rope_sections.size());
  if (o.delta_k_heads > 0) {
    number("ssm.conv_kernel", o.delta_kernel);
    number("ssm.inner_size", o.delta_v_heads * o.delta_head_size);
    number("ssm.state_size", o.delta_head_size);
    number("ssm.time_step_rank", o.delta_v_heads);
    number("ssm.group_count", o.delta_k_heads);
  }
  if (!o.rope_finetuned) gguf_set_val_bool(file, key("rope.scaling.finetuned").c_str(), false);
  gguf_set_val_f32(file, key("attention.layer_norm_rms_epsilon").c_str(), 1e-5f);
  gguf_set_val_f32(file, key("rope.freq_base").c_str(), o.rope_freq_base);
  if (!o.rope_scaling.empty())
    gguf_set_val_str(file, key("rope.scaling.type").c_str(), o.rope_scaling.c_str());
  if (o.rope_factor > 0) gguf_set_val_f32(file, key("rope.scaling.factor").c_str(), o.rope_factor);
  if (o.rope_attn_factor > 0)
    gguf_set_val_f32(file, key("rope.scaling.attn_factor").c_str(), o.rope_attn_factor);
  if (o.rope_original_context > 0) number("rope.scaling.original_context_length", o.rope_original_context);
}

class Weights {
 public:
  Weights(const TestModelOptions& o, Writer& out) : o_(o), out_(out), random_(o.seed) {}

  void AddAll() {
    // Logits of a spread of about 3: some tokens are likely, none is certain.
    constexpr float kLogitSpread = 3.0f;
    Matrix("token_embd.weight", o_.n_embd, o_.n_vocab,
           o_.tied ? kLogitSpread : std::sqrt(static_cast<float>(o_.n_embd)));
    Vector("output_norm.weight", o_.n_embd, 1.0f, 0.1f);
    if (!o_.tied) Matrix("output.weight", o_.n_embd, o_.n_vocab, kLogitSpread);
    if (o_.rope_factors) {
      const int64_t pairs = (o_.rope_dims > 0 ? o_.rope_dims : o_.head_size) / 2;
      std::vector<float> factors, others;  // as llama-3.1: long waves are stretched by 8, short ones not
      for (int64_t i = 0; i < pairs; ++i) {
        factors.push_back(i < pairs / 3 ? 1.0f : i < 2 * pairs / 3 ? 3.0f : 8.0f);
        others.push_back(1.0f + 0.01f * static_cast<float>(i));
      }
      if (o_.architecture == "phi3") {
        out_.Add("rope_factors_long.weight", GGML_TYPE_F32, factors, pairs);
        out_.Add("rope_factors_short.weight", GGML_TYPE_F32, others, pairs);
      } else {
        out_.Add("rope_freqs.weight", GGML_TYPE_F32, factors, pairs);
      }
    }
    for (int64_t l = 0; l < o_.n_layers; ++l) Layer("blk." + std::to_string(l) + ".", l);
    for (int64_t l = o_.n_layers; l < o_.n_layers + o_.prediction_layers; ++l) {
      Layer("blk." + std::to_string(l) + ".", l);
      Matrix("blk." + std::to_string(l) + ".nextn.eh_proj.weight", 2 * o_.n_embd, o_.n_embd, 1.0f);
      for (const char* name : {".nextn.enorm.weight", ".nextn.hnorm.weight"})
        Vector("blk." + std::to_string(l) + name, o_.n_embd, 1.0f, 0.1f);
    }
    if (o_.vision) {
      Matrix("v.blk.0.attn_q.weight", o_.n_embd, o_.n_embd, 1.0f);
      Matrix("mm.input_projection.weight", o_.n_embd, o_.n_embd, 1.0f);
    }
  }

 private:
  std::vector<float> Normal(int64_t n, float mean, float deviation) {
    std::normal_distribution<float> distribution(mean, deviation);
    std::vector<float> out(static_cast<std::size_t>(n));
    for (float& x : out) x = distribution(random_);
    return out;
  }
  // Deviation gain / sqrt(inputs): inputs of size 1 give outputs of size `gain`.
  std::vector<float> Projection(int64_t in, int64_t out, float gain) {
    return Normal(in * out, 0.0f, gain / std::sqrt(static_cast<float>(in)));
  }
  void Matrix(const std::string& name, int64_t in, int64_t out, float gain) {
    out_.Add(name, o_.weight_type, Projection(in, out, gain), in);
  }
  void Vector(const std::string& name, int64_t n, float mean, float deviation) {
    out_.Add(name, GGML_TYPE_F32, Normal(n, mean, deviation), n);
  }

  void Layer(const std::string& prefix, int64_t layer) {
    const int64_t q_rows = o_.n_heads * o_.head_size, kv_rows = o_.n_kv_heads * o_.head_size;
    Vector(prefix + "attn_norm.weight", o_.n_embd, 1.0f, 0.1f);
    if (o_.delta_k_heads > 0) {
      const auto at = static_cast<std::size_t>(layer);
      const int64_t interval = o_.attention_interval > 0 ? o_.attention_interval : 4;
      if (o_.recurrent.empty() ? (layer + 1) % interval != 0 : o_.recurrent[at])
        DeltaNet(prefix);
      else
        GatedAttention(prefix);
      Vector(prefix + "post_attention_norm.weight", o_.n_embd, 1.0f, 0.1f);
      if (o_.n_experts > 0) return Experts(prefix);
      return DenseFfn(prefix, o_.n_ff);
    }
    // Scores of a spread of about 2: attention neither uniform nor stuck on one token.
    std::vector<float> q = Projection(o_.n_embd, q_rows, o_.qk_gain),
                       k = Projection(o_.n_embd, kv_rows, o_.qk_gain);
    const std::vector<float> v = Projection(o_.n_embd, kv_rows, 1.0f);
    for (int64_t row = 0; row < kv_rows; row += 8)
      for (int64_t i = 0; i < o_.n_embd; ++i)
        k[static_cast<std::size_t>(row * o_.n_embd + i)] *= o_.k_outlier;
    if (o_.fused_qkv) {
      q.insert(q.end(), k.begin(), k.end());
      q.insert(q.end(), v.begin(), v.end());
      out_.Add(prefix + "attn_qkv.weight", o_.weight_type, q, o_.n_embd);
    } else {
      out_.Add(prefix + "attn_q.weight", o_.weight_type, q, o_.n_embd);
      out_.Add(prefix + "attn_k.weight", o_.weight_type, k, o_.n_embd);
      out_.Add(prefix + "attn_v.weight", o_.weight_type, v, o_.n_embd);
    }
    if (o_.biases && o_.fused_qkv) {
      Vector(prefix + "attn_qkv.bias", q_rows + 2 * kv_rows, 0.0f, 0.3f);
    } else if (o_.biases) {
      Vector(prefix + "attn_q.bias", q_rows, 0.0f, 0.3f);
      Vector(prefix + "attn_k.bias", kv_rows, 0.0f, 0.3f);
      Vector(prefix + "attn_v.bias", kv_rows, 0.0f, 0.3f);
    }
    if (o_.architecture == "qwen3" || o_.architecture == "qwen3moe" || o_.architecture == "olmoe" ||
        o_.architecture == "gemma3" || o_.architecture == "minimax-m2" || o_.qk_norms) {
      const bool row = o_.architecture == "olmoe" || o_.architecture == "minimax-m2";
      Vector(prefix + "attn_q_norm.weight", row ? q_rows : o_.head_size, 1.4f, 0.1f);
      Vector(prefix + "attn_k_norm.weight", row ? kv_rows : o_.head_size, 1.4f, 0.1f);
    }
    Matrix(prefix + "attn_output.weight", q_rows, o_.n_embd, 1.0f);
    if (o_.architecture == "gpt-oss") {
      Vector(prefix + "attn_output.bias", o_.n_embd, 0.0f, 0.3f);
      Vector(prefix + "attn_sinks.weight", o_.n_heads, 1.0f, 2.0f);
      Vector(prefix + "post_attention_norm.weight", o_.n_embd, 1.0f, 0.1f);
      return Experts(prefix);
    }
    if (o_.architecture == "glm4moe") {
      Vector(prefix + "post_attention_norm.weight", o_.n_embd, 1.0f, 0.1f);
      return layer >= o_.dense_layers ? Experts(prefix) : DenseFfn(prefix, o_.n_ff_dense);
    }
    Vector(prefix + "ffn_norm.weight", o_.n_embd, 1.0f, 0.1f);
    if (o_.architecture == "glm4" || o_.architecture.starts_with("gemma")) {
      Vector(prefix + "post_attention_norm.weight", o_.n_embd, 1.0f, 0.1f);
      Vector(prefix + "post_ffw_norm.weight", o_.n_embd, 1.0f, 0.1f);
    }
    if (o_.n_experts > 0) return Experts(prefix);
    const bool fused = o_.architecture == "glm4" || o_.architecture == "phi3";
    if (!fused) Matrix(prefix + "ffn_gate.weight", o_.n_embd, o_.n_ff, 1.0f);
    Matrix(prefix + "ffn_up.weight", o_.n_embd, fused ? 2 * o_.n_ff : o_.n_ff, 1.0f);
    Matrix(prefix + "ffn_down.weight", o_.n_ff, o_.n_embd, 1.0f);
  }

  void DenseFfn(const std::string& prefix, int64_t n_ff) {
    Matrix(prefix + "ffn_gate.weight", o_.n_embd, n_ff, 1.0f);
    Matrix(prefix + "ffn_up.weight", o_.n_embd, n_ff, 1.0f);
    Matrix(prefix + "ffn_down.weight", n_ff, o_.n_embd, 1.0f);
  }

  void GatedAttention(const std::string& prefix) {
    const int64_t q_rows = o_.n_heads * o_.head_size, kv_rows = o_.n_kv_heads * o_.head_size;
    Matrix(prefix + "attn_q.weight", o_.n_embd, 2 * q_rows, 1.4f);
    Matrix(prefix + "attn_k.weight", o_.n_embd, kv_rows, 1.4f);
    Matrix(prefix + "attn_v.weight", o_.n_embd, kv_rows, 1.0f);
    Vector(prefix + "attn_q_norm.weight", o_.head_size, 1.4f, 0.1f);
    Vector(prefix + "attn_k_norm.weight", o_.head_size, 1.4f, 0.1f);
    Matrix(prefix + "attn_output.weight", q_rows, o_.n_embd, 1.0f);
  }

  void DeltaNet(const std::string& prefix) {
    const int64_t heads = o_.delta_v_heads, values = heads * o_.delta_head_size,
                  channels = 2 * o_.delta_k_heads * o_.delta_head_size + values;
    Matrix(prefix + "attn_qkv.weight", o_.n_embd, channels, 1.0f);
    Matrix(prefix + "attn_gate.weight", o_.n_embd, values, 1.0f);
    out_.Add(prefix + "ssm_conv1d.weight", GGML_TYPE_F32, Normal(o_.delta_kernel * channels, 0.0f, 0.7f),
             o_.delta_kernel);
    Vector(prefix + "ssm_dt.bias", heads, -2.0f, 1.0f);
    // Some heads forget within a few tokens, others over hundreds.
    Vector(prefix + "ssm_a", heads, -0.3f, 0.1f);
    if (o_.architecture == "qwen3next") {
      Matrix(prefix + "ssm_ba.weight", o_.n_embd, 2 * heads, 1.0f);
    } else {
      Matrix(prefix + "ssm_beta.weight", o_.n_embd, heads, 1.0f);
      Matrix(prefix + "ssm_alpha.weight", o_.n_embd, heads, 1.0f);
    }
    Vector(prefix + "ssm_norm.weight", o_.delta_head_size, 1.0f, 0.1f);
    Matrix(prefix + "ssm_out.weight", values, o_.n_embd, 1.0f);
  }

  void Experts(const std::string& prefix) {
    const auto stack = [&](const char* name, int64_t in, int64_t out) {
      out_.AddStack(prefix + name, o_.weight_type,
                    Normal(in * out * o_.n_experts, 0.0f, 1.0f / std::sqrt(static_cast<float>(in))), in, out,
                    o_.n_experts);
    };
    // Logits of a spread of about 2: the chosen experts are clear, and none takes it all.
    Matrix(prefix + "ffn_gate_inp.weight", o_.n_embd, o_.n_experts, 2.0f);
    stack("ffn_gate_exps.weight", o_.n_embd, o_.n_ff);
    stack("ffn_up_exps.weight", o_.n_embd, o_.n_ff);
    stack("ffn_down_exps.weight", o_.n_ff, o_.n_embd);
    if (o_.architecture == "gpt-oss") {
      const auto biases = [&](const char* name, int64_t out) {
        out_.Add(prefix + name, GGML_TYPE_F32, Normal(out * o_.n_experts, 0.0f, 0.5f), out);
      };
      Vector(prefix + "ffn_gate_inp.bias", o_.n_experts, 0.0f, 0.5f);
      biases("ffn_gate_exps.bias", o_.n_ff);
      biases("ffn_up_exps.bias", o_.n_ff);
      biases("ffn_down_exps.bias", o_.n_embd);
    }
    if (o_.architecture == "glm4moe" || o_.architecture == "minimax-m2")
      Vector(prefix + "exp_probs_b.bias", o_.n_experts, 0.0f, 0.2f);
    if (o_.n_ff_shared == 0) return;
    Matrix(prefix + "ffn_gate_shexp.weight", o_.n_embd, o_.n_ff_shared, 1.0f);
    Matrix(prefix + "ffn_up_shexp.weight", o_.n_embd, o_.n_ff_shared, 1.0f);
    Matrix(prefix + "ffn_down_shexp.weight", o_.n_ff_shared, o_.n_embd, 1.0f);
    if (o_.architecture == "qwen2moe" || o_.delta_k_heads > 0)
      Vector(prefix + "ffn_gate_inp_shexp.weight", o_.n_embd, 0.0f, 0.1f);
  }

  const TestModelOptions& o_;
  Writer& out_;
  std::mt19937_64 random_;
};

}  // namespace

TestModelOptions SlidingModelOptions(const std::string& architecture, int64_t window) {
  TestModelOptions o;
  o.architecture = architecture;
  o.n_layers = 4;
  o.window = window;
  o.window_pattern = 2;
  if (architecture == "gpt-oss") {
    o.n_experts = 4;
    o.n_used = 2;
    o.biases = true;
  } else {
    o.tied = true;
  }
  if (architecture == "gemma2") o.attn_soft_cap = 3;
  return o;
}

TestModelOptions HybridModelOptions(const std::string& architecture) {
  TestModelOptions o;
  o.architecture = architecture;
  o.n_layers = 4;
  o.n_ff = 96;
  o.rope_dims = 16;
  o.attention_interval = 2;
  o.delta_k_heads = 2;
  o.delta_v_heads = architecture == "qwen35" ? 2 : 4;
  o.delta_head_size = 16;
  if (architecture != "qwen3next") o.rope_sections = {3, 3, 2, 0};
  if (architecture == "qwen35") return o;
  o.n_experts = 4;
  o.n_used = 2;
  o.n_ff_shared = 48;
  return o;
}

bool WriteTestModel(const TestModelOptions& options, const std::string& path) {
  Writer out;
  AddHyperParams(options, out.file.get());
  AddTokenizer(options, out.file.get());
  Weights(options, out).AddAll();
  return out.Write(path);
}

bool ConvertModel(const std::string& from, const std::string& to, ggml_type type) {
  const Source source(from);
  if (!source.file) return false;
  Writer out;
  gguf_set_kv(out.file.get(), source.file.get());
  for (ggml_tensor* t : source.tensors) {
    std::vector<float> values(static_cast<std::size_t>(ggml_nelements(t)));
    if (t->type == GGML_TYPE_F32)
      std::copy_n(static_cast<const float*>(t->data), values.size(), values.data());
    else
      ggml_get_type_traits(t->type)->to_float(t->data, values.data(), ggml_nelements(t));
    out.Add(t->name, ggml_n_dims(t) == 1 ? GGML_TYPE_F32 : type, values, t->ne[0]);
  }
  return out.Write(to);
}

bool EditModel(const std::string& from, const std::string& to, const std::function<void(gguf_context*)>& keys,
               const std::function<std::string(const std::string&)>& name) {
  const Source source(from);
  if (!source.file) return false;
  Writer out;
  gguf_set_kv(out.file.get(), source.file.get());
  if (keys) keys(out.file.get());
  for (ggml_tensor* t : source.tensors) {
    const std::string new_name = name ? name(t->name) : t->name;
    if (new_name.empty()) continue;
    ggml_set_name(t, new_name.c_str());
    gguf_add_tensor(out.file.get(), t);
  }
  return out.Write(to);
}

std::vector<int32_t> RandomTokens(int64_t n, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::uniform_int_distribution<int32_t> distribution(0, 255);
  std::vector<int32_t> tokens(static_cast<std::size_t>(n));
  for (int32_t& t : tokens) t = distribution(random);
  return tokens;
}

TempDir::TempDir() {
  path_ = (std::filesystem::temp_directory_path() / "moend-test-XXXXXX").string();
  if (!mkdtemp(path_.data())) std::abort();
}

TempDir::~TempDir() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace moend::test
