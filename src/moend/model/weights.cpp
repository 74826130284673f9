#include "moend/model/weights.h"

#include <ggml-backend.h>
#include <ggml-cpu.h>

#include <cmath>
#include <string>
#include <unordered_set>

namespace moend {
namespace {

constexpr int64_t kMaxVocab = 1 << 24;

enum class Role {
  kRows,     // rows are taken of it: any type ggml's CPU back end can multiply
  kMatrix,   // only multiplied, so that its layout is ggml's to choose; the same types
  kExperts,  // such matrices, one for each expert
  kVector,   // norms, biases and frequency factors: float32
};

// Whether ggml's CPU back end has a dot product for rows of this type.
bool CanMultiply(ggml_type type) {
  if (type == GGML_TYPE_F32) return true;  // the only one that needs no conversion to f32
  return ggml_get_type_traits_cpu(type)->vec_dot != nullptr &&
         ggml_get_type_traits(type)->to_float != nullptr;
}

std::string MultipliedTypes() {
  std::string out;
  for (int t = 0; t < GGML_TYPE_COUNT; ++t) {
    const auto type = static_cast<ggml_type>(t);
    const ggml_type_traits* traits = ggml_get_type_traits(type);
    if (traits->blck_size <= 0 || traits->type_size == 0 || !CanMultiply(type)) continue;
    out += fmt::format("{}{}", out.empty() ? "" : ", ", traits->type_name);
  }
  return out;
}

class Binder {
 public:
  // repacker: null leaves all weights in the file.
  Binder(const GgufFile& file, ggml_context* context, std::span<const ggml_backend_buffer_ptr> buffers,
         Repacker* repacker)
      : file_(file), context_(context), buffers_(buffers), given_(repacker), repacker_(repacker) {}

  // Whether what is bound next may be repacked.
  void Repack(bool may) { repacker_ = may ? given_ : nullptr; }

  // Optional() leaves null where the file has no such tensor.
  Expected<ggml_tensor*> Optional(const std::string& name, Role role, int64_t ne0, int64_t ne1 = 1,
                                  int64_t ne2 = 1) {
    const GgufTensor* t = file_.FindTensor(name);
    if (!t) return nullptr;
    const std::array<int64_t, 4> wanted = {ne0, ne1, ne2, 1};
    if (t->ne != wanted)
      return Fail(ErrorCode::kCorrupt, "{}: tensor {} has the shape {}, but the model's keys call for {}",
                  file_.path(), name, ShapeText(t->ne), ShapeText(wanted));
    MOEND_TRY(CheckType(*t, role));
    used_.insert(t->name);
    return Place(*t, role, ne0, ne1, ne2, 0);
  }

  Expected<ggml_tensor*> Required(const std::string& name, Role role, int64_t ne0, int64_t ne1 = 1,
                                  int64_t ne2 = 1) {
    MOEND_ASSIGN(ggml_tensor * tensor, Optional(name, role, ne0, ne1, ne2));
    if (!tensor)
      return Fail(ErrorCode::kCorrupt, "{} lacks the tensor {} of shape {}", file_.path(), name,
                  ShapeText({ne0, ne1, ne2, 1}));
    return tensor;
  }

  // A copy of a matrix that is already checked, for products; null where ggml has no better layout for it.
  ggml_tensor* Repacked(const std::string& name) {
    const GgufTensor& t = *file_.FindTensor(name);
    if (!repacker_) return nullptr;
    return repacker_->Add(t.type, t.ne[0], t.ne[1], t.data, name.c_str());
  }

  // Parts of a tensor that is already checked: rows [first, first + rows) of a matrix, elements of a vector.
  ggml_tensor* Rows(const std::string& name, int64_t first, int64_t rows) {
    const GgufTensor& t = *file_.FindTensor(name);
    return Place(t, Role::kMatrix, t.ne[0], rows, 1, t.bytes / t.ne[1] * first);
  }
  ggml_tensor* Elements(const std::string& name, int64_t first, int64_t count) {
    return Place(*file_.FindTensor(name), Role::kVector, count, 1, 1,
                 first * static_cast<int64_t>(sizeof(float)));
  }

  // A tensor that no part of the graph asked for would silently change what the model computes.
  Expected<void> RefuseUnused() const {
    for (const GgufTensor& t : file_.tensors())
      if (!used_.contains(t.name))
        return Fail(ErrorCode::kUnsupported,
                    "{} has a tensor {} that moend's graph of this architecture has no place for",
                    file_.path(), Escaped(t.name));
    return {};
  }
  void Ignore(std::string_view name) {
    if (const GgufTensor* t = file_.FindTensor(name)) used_.insert(t->name);
  }
  void IgnoreAll(std::string_view prefix) {
    for (const GgufTensor& t : file_.tensors())
      if (t.name.starts_with(prefix)) used_.insert(t.name);
  }

 private:
  Expected<void> CheckType(const GgufTensor& t, Role role) const {
    if (role == Role::kVector && t.type != GGML_TYPE_F32)
      return Fail(ErrorCode::kUnsupported, "{}: tensor {} is of type {}; moend reads norms and biases as f32",
                  file_.path(), t.name, ggml_type_name(t.type));
    if (role != Role::kVector && !CanMultiply(t.type))
      return Fail(ErrorCode::kUnsupported, "{}: tensor {} is of type {}; ggml's CPU back end multiplies {}",
                  file_.path(), t.name, ggml_type_name(t.type), MultipliedTypes());
    return {};
  }

  ggml_tensor* Place(const GgufTensor& t, Role role, int64_t ne0, int64_t ne1, int64_t ne2,
                     int64_t skipped_bytes) {
    const std::string name(t.name);
    const uint8_t* data = t.data + skipped_bytes;
    if (repacker_ && role == Role::kMatrix)
      if (ggml_tensor* repacked = repacker_->Add(t.type, ne0, ne1, data, name.c_str())) return repacked;
    if (repacker_ && role == Role::kExperts)
      if (ggml_tensor* repacked = repacker_->AddExperts(t.type, ne0, ne1, ne2, data, name.c_str()))
        return repacked;
    ggml_tensor* tensor = ggml_new_tensor_3d(context_, t.type, ne0, ne1, ne2);
    ggml_set_name(tensor, name.c_str());
    // ggml's interface has no read-only tensors; nothing writes to a weight.
    tensor->data = const_cast<uint8_t*>(data);
    tensor->buffer = buffers_[static_cast<std::size_t>(t.part)].get();
    return tensor;
  }

  const GgufFile& file_;
  ggml_context* context_;
  std::span<const ggml_backend_buffer_ptr> buffers_;  // of the file's parts
  Repacker *given_, *repacker_;                       // null leaves all weights in the file
  std::unordered_set<std::string_view> used_;
};

// Q, K and V projections, apart or as one matrix of stacked rows, with optional biases.
Expected<void> BindProjections(Binder& bind, const GgufFile& file, const HyperParams& h, const LayerParams& p,
                               const std::string& prefix, LayerWeights& w) {
  const int64_t q_rows = (p.output_gate ? 2 : 1) * h.n_heads * h.head_size,
                kv_rows = h.n_kv_heads * h.head_size;
  const std::string fused = prefix + "attn_qkv.weight", fused_bias = prefix + "attn_qkv.bias";
  if (file.FindTensor(fused)) {
    MOEND_TRY(bind.Required(fused, Role::kRows, h.n_embd, q_rows + 2 * kv_rows));
    w.wq = bind.Rows(fused, 0, q_rows);
    w.wk = bind.Rows(fused, q_rows, kv_rows);
    w.wv = bind.Rows(fused, q_rows + kv_rows, kv_rows);
  } else {
    MOEND_ASSIGN(w.wq, bind.Required(prefix + "attn_q.weight", Role::kMatrix, h.n_embd, q_rows));
    MOEND_ASSIGN(w.wk, bind.Required(prefix + "attn_k.weight", Role::kMatrix, h.n_embd, kv_rows));
    MOEND_ASSIGN(w.wv, bind.Required(prefix + "attn_v.weight", Role::kMatrix, h.n_embd, kv_rows));
  }
  if (file.FindTensor(fused) && file.FindTensor(fused_bias)) {
    MOEND_TRY(bind.Required(fused_bias, Role::kVector, q_rows + 2 * kv_rows));
    w.bq = bind.Elements(fused_bias, 0, q_rows);
    w.bk = bind.Elements(fused_bias, q_rows, kv_rows);
    w.bv = bind.Elements(fused_bias, q_rows + kv_rows, kv_rows);
  } else {
    MOEND_ASSIGN(w.bq, bind.Optional(prefix + "attn_q.bias", Role::kVector, q_rows));
    MOEND_ASSIGN(w.bk, bind.Optional(prefix + "attn_k.bias", Role::kVector, kv_rows));
    MOEND_ASSIGN(w.bv, bind.Optional(prefix + "attn_v.bias", Role::kVector, kv_rows));
  }
  return {};
}

Expected<void> BindDeltaNet(Binder& bind, const HyperParams& h, const DeltaNetParams& p,
                            const std::string& prefix, LayerWeights& w) {
  const auto name = [&](const char* what) { return prefix + what; };
  const int64_t values = p.n_v_heads * p.head_size;
  MOEND_ASSIGN(w.delta_qkv, bind.Required(name("attn_qkv.weight"), Role::kMatrix, h.n_embd, p.channels()));
  MOEND_ASSIGN(w.delta_gate, bind.Required(name("attn_gate.weight"), Role::kMatrix, h.n_embd, values));
  MOEND_ASSIGN(w.delta_conv, bind.Required(name("ssm_conv1d.weight"), Role::kVector, p.kernel, p.channels()));
  MOEND_ASSIGN(w.delta_step_b, bind.Required(name("ssm_dt.bias"), Role::kVector, p.n_v_heads));
  MOEND_ASSIGN(w.delta_decay, bind.Required(name("ssm_a"), Role::kVector, p.n_v_heads));
  if (p.grouped) {
    MOEND_ASSIGN(w.delta_gates,
                 bind.Required(name("ssm_ba.weight"), Role::kMatrix, h.n_embd, 2 * p.n_v_heads));
  } else {
    MOEND_ASSIGN(w.delta_rate, bind.Required(name("ssm_beta.weight"), Role::kMatrix, h.n_embd, p.n_v_heads));
    MOEND_ASSIGN(w.delta_step, bind.Required(name("ssm_alpha.weight"), Role::kMatrix, h.n_embd, p.n_v_heads));
  }
  MOEND_ASSIGN(w.delta_norm, bind.Required(name("ssm_norm.weight"), Role::kVector, p.head_size));
  MOEND_ASSIGN(w.delta_out, bind.Required(name("ssm_out.weight"), Role::kMatrix, values, h.n_embd));
  return {};
}

// The feed-forward network, or the experts in its place.
Expected<void> BindFfn(Binder& bind, const HyperParams& h, const FfnParams& f, const std::string& prefix,
                       LayerWeights& w) {
  const auto name = [&](const char* what) { return prefix + what; };
  if (f.n_experts > 0) {
    MOEND_ASSIGN(w.router, bind.Required(name("ffn_gate_inp.weight"), Role::kMatrix, h.n_embd, f.n_experts));
    MOEND_ASSIGN(w.gate_experts,
                 bind.Required(name("ffn_gate_exps.weight"), Role::kExperts, h.n_embd, f.n_ff, f.n_experts));
    MOEND_ASSIGN(w.up_experts,
                 bind.Required(name("ffn_up_exps.weight"), Role::kExperts, h.n_embd, f.n_ff, f.n_experts));
    MOEND_ASSIGN(w.down_experts,
                 bind.Required(name("ffn_down_exps.weight"), Role::kExperts, f.n_ff, h.n_embd, f.n_experts));
    if (f.expert_biases) {
      MOEND_ASSIGN(w.router_b, bind.Required(name("ffn_gate_inp.bias"), Role::kVector, f.n_experts));
      MOEND_ASSIGN(w.gate_experts_b,
                   bind.Required(name("ffn_gate_exps.bias"), Role::kVector, f.n_ff, f.n_experts));
      MOEND_ASSIGN(w.up_experts_b,
                   bind.Required(name("ffn_up_exps.bias"), Role::kVector, f.n_ff, f.n_experts));
      MOEND_ASSIGN(w.down_experts_b,
                   bind.Required(name("ffn_down_exps.bias"), Role::kVector, h.n_embd, f.n_experts));
    }
    if (f.selection_bias) {
      MOEND_ASSIGN(w.selection_b, bind.Required(name("exp_probs_b.bias"), Role::kVector, f.n_experts));
    }
    if (f.n_ff_shared == 0) return {};
    MOEND_ASSIGN(w.gate_shared,
                 bind.Required(name("ffn_gate_shexp.weight"), Role::kMatrix, h.n_embd, f.n_ff_shared));
    MOEND_ASSIGN(w.up_shared,
                 bind.Required(name("ffn_up_shexp.weight"), Role::kMatrix, h.n_embd, f.n_ff_shared));
    MOEND_ASSIGN(w.down_shared,
                 bind.Required(name("ffn_down_shexp.weight"), Role::kMatrix, f.n_ff_shared, h.n_embd));
    if (!f.shared_gate) return {};
    MOEND_ASSIGN(w.shared_gate, bind.Required(name("ffn_gate_inp_shexp.weight"), Role::kMatrix, h.n_embd));
    return {};
  }
  if (f.fused) {
    MOEND_TRY(bind.Required(name("ffn_up.weight"), Role::kRows, h.n_embd, 2 * f.n_ff));
    w.ffn_gate = bind.Rows(name("ffn_up.weight"), 0, f.n_ff);
    w.ffn_up = bind.Rows(name("ffn_up.weight"), f.n_ff, f.n_ff);
  } else {
    MOEND_ASSIGN(w.ffn_gate, bind.Required(name("ffn_gate.weight"), Role::kMatrix, h.n_embd, f.n_ff));
    MOEND_ASSIGN(w.ffn_up, bind.Required(name("ffn_up.weight"), Role::kMatrix, h.n_embd, f.n_ff));
  }
  MOEND_ASSIGN(w.ffn_down, bind.Required(name("ffn_down.weight"), Role::kMatrix, f.n_ff, h.n_embd));
  if (h.optional.biases) {
    MOEND_ASSIGN(w.ffn_gate_b, bind.Optional(name("ffn_gate.bias"), Role::kVector, f.n_ff));
    MOEND_ASSIGN(w.ffn_up_b, bind.Optional(name("ffn_up.bias"), Role::kVector, f.n_ff));
    MOEND_ASSIGN(w.ffn_down_b, bind.Optional(name("ffn_down.bias"), Role::kVector, h.n_embd));
  }
  return {};
}

// One that is no number would make every output one that is no number.
Expected<void> CheckSinks(const GgufFile& file, const ggml_tensor* sinks) {
  const auto* s = static_cast<const float*>(sinks->data);
  for (int64_t i = 0; i < sinks->ne[0]; ++i)
    if (!std::isfinite(s[i]))
      return Fail(ErrorCode::kCorrupt, "{}: tensor {} holds {} at {}; sinks are finite", file.path(),
                  sinks->name, s[i], i);
  return {};
}

Expected<void> BindAttention(Binder& bind, const GgufFile& file, const HyperParams& h, const LayerParams& p,
                             const std::string& prefix, LayerWeights& w) {
  const int64_t q_rows = h.n_heads * h.head_size, k_rows = h.n_kv_heads * h.head_size;
  MOEND_TRY(BindProjections(bind, file, h, p, prefix, w));
  MOEND_ASSIGN(w.wo, bind.Required(prefix + "attn_output.weight", Role::kMatrix, q_rows, h.n_embd));
  if (p.qk_norm != QkNorm::kNone) {
    const bool row = p.qk_norm == QkNorm::kRow;
    MOEND_ASSIGN(w.q_norm,
                 bind.Required(prefix + "attn_q_norm.weight", Role::kVector, row ? q_rows : h.head_size));
    MOEND_ASSIGN(w.k_norm,
                 bind.Required(prefix + "attn_k_norm.weight", Role::kVector, row ? k_rows : h.head_size));
  }
  if (p.sinks) {
    MOEND_ASSIGN(w.sinks, bind.Required(prefix + "attn_sinks.weight", Role::kVector, h.n_heads));
    MOEND_TRY(CheckSinks(file, w.sinks));
  }
  return {};
}

Expected<void> BindLayer(Binder& bind, const GgufFile& file, const HyperParams& h, int64_t layer,
                         LayerWeights& w) {
  const LayerParams& p = h.layers[static_cast<std::size_t>(layer)];
  const std::string prefix = fmt::format("blk.{}.", layer);
  MOEND_ASSIGN(w.attn_norm, bind.Required(prefix + "attn_norm.weight", Role::kVector, h.n_embd));
  MOEND_TRY(p.holds_state() ? BindDeltaNet(bind, h, p.delta_net, prefix, w)
                            : BindAttention(bind, file, h, p, prefix, w));
  MOEND_ASSIGN(w.ffn_norm, bind.Required(prefix + h.ffn_norm + ".weight", Role::kVector, h.n_embd));
  if (p.post_norms) {
    MOEND_ASSIGN(w.attn_post_norm,
                 bind.Required(prefix + "post_attention_norm.weight", Role::kVector, h.n_embd));
    MOEND_ASSIGN(w.ffn_post_norm, bind.Required(prefix + "post_ffw_norm.weight", Role::kVector, h.n_embd));
  }
  MOEND_TRY(BindFfn(bind, h, p.ffn, prefix, w));
  if (h.optional.biases) {
    MOEND_ASSIGN(w.bo, bind.Optional(prefix + "attn_output.bias", Role::kVector, h.n_embd));
    // Rotation tables that old converters stored; they follow from the hyper-parameters.
    bind.Ignore(prefix + "attn_rot_embd.weight");
  }
  return {};
}

// The frequency factors divide; zeros and what is no number would make every logit one that is no number.
Expected<void> CheckFactors(const GgufFile& file, const ggml_tensor* factors) {
  const auto* f = static_cast<const float*>(factors->data);
  for (int64_t i = 0; i < factors->ne[0]; ++i)
    if (!std::isfinite(f[i]) || f[i] <= 0)
      return Fail(ErrorCode::kCorrupt, "{}: tensor {} holds {} at {}; factors are above 0", file.path(),
                  factors->name, f[i], i);
  return {};
}

Expected<void> BindRopeFactors(Binder& bind, const GgufFile& file, const HyperParams& h, Weights& w) {
  const int64_t pairs = h.rope.n_dims / 2;
  if (h.optional.rope_freqs) {
    MOEND_ASSIGN(w.rope_freqs, bind.Optional("rope_freqs.weight", Role::kVector, pairs));
  }
  if (h.optional.long_rope_factors) {
    // A model of long contexts is run with the factors for them, whatever the length at hand.
    MOEND_ASSIGN(ggml_tensor * far, bind.Optional("rope_factors_long.weight", Role::kVector, pairs));
    MOEND_ASSIGN(ggml_tensor * near, bind.Optional("rope_factors_short.weight", Role::kVector, pairs));
    w.rope_freqs = h.n_ctx_train > h.rope.n_ctx_orig ? far : near;
  }
  if (w.rope_freqs) MOEND_TRY(CheckFactors(file, w.rope_freqs));
  return {};
}

}  // namespace

Expected<BoundWeights> BindWeights(const GgufFile& file, HyperParams& h, bool repack, int64_t n_repacked) {
  const GgufTensor* embedding = file.FindTensor("token_embd.weight");
  if (!embedding) return Fail(ErrorCode::kCorrupt, "{} lacks the tensor token_embd.weight", file.path());
  h.n_vocab = embedding->ne[1];
  if (h.n_vocab > kMaxVocab)
    return Fail(ErrorCode::kCorrupt,
                "{}: tensor token_embd.weight has {} rows; moend runs vocabularies up to {}", file.path(),
                h.n_vocab, kMaxVocab);

  BoundWeights out;
  // Fused projections are described three times over.
  const auto descriptions = file.tensors().size() * 3 + 8;
  Repacker repacker(static_cast<int64_t>(descriptions));
  out.context.reset(ggml_init({ggml_tensor_overhead() * descriptions, nullptr, /*no_alloc=*/true}));
  for (const std::span<const uint8_t> bytes : file.parts()) {
    if (out.context)
      out.buffers.emplace_back(
          ggml_backend_cpu_buffer_from_ptr(const_cast<uint8_t*>(bytes.data()), bytes.size()));
    if (out.buffers.empty() || !out.buffers.back())
      return Fail(ErrorCode::kOutOfMemory, "{}: no memory to describe its tensors", file.path());
    ggml_backend_buffer_set_usage(out.buffers.back().get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
  }

  Binder bind(file, out.context.get(), out.buffers, repack ? &repacker : nullptr);
  Weights& w = out.weights;
  MOEND_ASSIGN(w.tok_embd, bind.Required("token_embd.weight", Role::kRows, h.n_embd, h.n_vocab));
  bind.Repack(h.n_layers < n_repacked);
  MOEND_ASSIGN(w.head.norm, bind.Required("output_norm.weight", Role::kVector, h.n_embd));
  MOEND_ASSIGN(w.head.output, bind.Optional("output.weight", Role::kMatrix, h.n_embd, h.n_vocab));
  w.tied = w.head.output == nullptr;
  // Rows are taken of a tied embedding, so that it stays as it is; products may gain from a repacked copy.
  if (w.tied) w.head.output = bind.Repacked("token_embd.weight");
  if (!w.head.output) w.head.output = w.tok_embd;
  if (h.optional.logit_bias) {
    MOEND_ASSIGN(w.head.bias, bind.Optional("output.bias", Role::kVector, h.n_vocab));
  }
  MOEND_TRY(BindRopeFactors(bind, file, h, w));
  for (int64_t layer = 0; layer < h.n_layers; ++layer) {
    LayerWeights weights;
    bind.Repack(layer < n_repacked);
    MOEND_TRY(BindLayer(bind, file, h, layer, weights));
    weights.rope_freqs = w.rope_freqs;
    w.layers.push_back(weights);
  }
  if (h.optional.vision)
    for (const char* prefix : {"v.", "mm."}) bind.IgnoreAll(prefix);
  for (int64_t block = h.n_layers; block < h.n_blocks; ++block) bind.IgnoreAll(fmt::format("blk.{}.", block));
  MOEND_TRY(bind.RefuseUnused());
  MOEND_ASSIGN(out.repacked, repacker.Finish());
  return out;
}

}  // namespace moend
