#include "moend/model/hparams.h"

#include <cmath>

#include "moend/model/arch/arch.h"

namespace moend {
namespace {

// Features of related models that no graph here has.
Expected<void> RefuseVariants(const GgufFile& file, const HyperParams& arch) {
  MOEND_ASSIGN(const bool causal, file.Boolean(Key(arch, "attention.causal"), true));
  if (!causal)
    return Fail(ErrorCode::kUnsupported,
                "{} attends to later tokens too (an encoder); moend runs text generators", file.path());
  MOEND_ASSIGN(const int64_t parts, file.Integer("split.count", 0, INT64_MAX, 0));
  if (parts > 1 && parts != std::ssize(file.parts()))
    return Fail(ErrorCode::kUnsupported,
                "{} is one of {} parts of a model, which is opened by its first file", file.path(), parts);
  return {};
}

// The model's layers, and those for multi-token prediction that may stand behind them.
Expected<void> ReadLayerCounts(const GgufFile& file, const Architecture& architecture, HyperParams& h) {
  MOEND_ASSIGN(h.n_blocks, file.Integer(Key(h, "block_count"), 1, kMaxLayers));
  MOEND_ASSIGN(const int64_t predict, file.Integer(Key(h, "nextn_predict_layers"), 0, INT64_MAX, 0));
  if (predict > 0 && !architecture.passes_prediction)
    return Fail(ErrorCode::kUnsupported,
                "{} has {} layers for multi-token prediction, which moend does not run", file.path(),
                predict);
  if (predict >= h.n_blocks)
    return Fail(ErrorCode::kCorrupt, "{} has {} layers, of which {} are for multi-token prediction",
                file.path(), h.n_blocks, predict);
  h.n_layers = h.n_blocks - predict;
  return {};
}

Expected<void> ReadHeads(const GgufFile& file, HyperParams& h) {
  const HyperParams& arch = h;
  const std::string& path = file.path();
  MOEND_ASSIGN(h.n_heads, file.SameInteger(Key(arch, "attention.head_count"), h.n_blocks, 1, kMaxWidth));
  MOEND_ASSIGN(h.n_kv_heads,
               file.SameInteger(Key(arch, "attention.head_count_kv"), h.n_blocks, 1, kMaxWidth, h.n_heads));
  if (h.n_heads % h.n_kv_heads != 0)
    return Fail(ErrorCode::kCorrupt, "{}: {} query heads cannot share {} KV heads evenly", path, h.n_heads,
                h.n_kv_heads);
  const int64_t usual = h.n_embd / h.n_heads;
  MOEND_ASSIGN(h.head_size, file.Integer(Key(arch, "attention.key_length"), 1, kMaxWidth, usual));
  MOEND_ASSIGN(const int64_t v_size, file.Integer(Key(arch, "attention.value_length"), 1, kMaxWidth, usual));
  if (v_size != h.head_size)
    return Fail(ErrorCode::kUnsupported,
                "{} has K heads of {} and V heads of {} channels; moend runs models where "
                "both are equal",
                path, h.head_size, v_size);
  if (h.head_size % 16 != 0 || h.head_size > 256 || h.head_size == 0)
    return Fail(ErrorCode::kUnsupported, "{} has heads of {} channels; moend runs multiples of 16 up to 256",
                path, h.head_size);
  MOEND_ASSIGN(const float scale, file.Real(Key(arch, "attention.scale"), 0.0f));
  if (scale < 0)
    return Fail(ErrorCode::kCorrupt, "{}: {} is {}, below 0", path, Key(arch, "attention.scale"), scale);
  h.softmax_scale = scale > 0 ? scale : 1.0f / std::sqrt(static_cast<float>(h.head_size));
  return {};
}

// Magnitude of YaRN's attention temperature, Peng et al. 2023 (arXiv 2309.00071), eq. 22, against what ggml
// multiplies by itself when it is given ext_factor != 0: 1 + 0.1 ln(factor). The two cancel for factor >= 1.
float YarnMagnitude(float factor) {
  const float log_factor = std::log(factor);
  const float wanted = factor <= 1.0f ? 1.0f : 1.0f + 0.1f * log_factor;
  return wanted / (1.0f + 0.1f * log_factor);
}

Expected<void> ReadRope(const GgufFile& file, const Architecture& architecture, HyperParams& h) {
  const HyperParams& arch = h;
  const std::string& path = file.path();
  RopeParams& rope = h.rope;
  rope.mode = architecture.rope_mode;

  MOEND_ASSIGN(const int64_t n_dims,
               file.Integer(Key(arch, "rope.dimension_count"), 0, kMaxWidth, h.head_size));
  if (n_dims != h.head_size && !architecture.partial_rope)
    return Fail(
        ErrorCode::kUnsupported,
        "{} rotates {} of {} channels of a head; moend runs models of the architecture {} that rotate "
        "them all",
        path, n_dims, h.head_size, h.architecture_name);
  if (n_dims > h.head_size || n_dims % 2 != 0 || n_dims == 0)
    return Fail(ErrorCode::kCorrupt, "{} rotates {} of {} channels of a head, not an even part of them", path,
                n_dims, h.head_size);
  rope.n_dims = static_cast<int>(n_dims);
  MOEND_ASSIGN(rope.freq_base, file.Real(Key(arch, "rope.freq_base"), 10000.0f));
  if (!(rope.freq_base > 1.0f))
    return Fail(ErrorCode::kCorrupt, "{}: {} is {}, but must be above 1", path, Key(arch, "rope.freq_base"),
                rope.freq_base);
  MOEND_ASSIGN(const int64_t n_ctx_orig, file.Integer(Key(arch, "rope.scaling.original_context_length"), 0,
                                                      kMaxContext, h.n_ctx_train));
  rope.n_ctx_orig = static_cast<int>(n_ctx_orig > 0 ? n_ctx_orig : h.n_ctx_train);

  // A factor without a type means linear scaling (position interpolation), as in files older than the key.
  MOEND_ASSIGN(const std::string_view type, file.String(Key(arch, "rope.scaling.type"), "linear"));
  const bool known = type == "none" || type == "linear" || type == "yarn" ||
                     (type == "longrope" && h.architecture_name == "phi3");
  if (!known)
    return Fail(
        ErrorCode::kUnsupported,
        "{} scales its RoPE by the method \"{}\"; moend knows none, linear and yarn, and longrope in phi3",
        path, Escaped(type));
  MOEND_ASSIGN(const float old_factor, file.Real(Key(arch, "rope.scale_linear"), 0.0f));
  MOEND_ASSIGN(float factor, file.Real(Key(arch, "rope.scaling.factor"), old_factor));
  if (factor < 0)
    return Fail(ErrorCode::kCorrupt, "{}: {} is {}, below 0", path, Key(arch, "rope.scaling.factor"), factor);
  if (factor == 0 || type == "none") factor = 1.0f;
  rope.freq_scale = 1.0f / factor;
  MOEND_ASSIGN(rope.attn_factor, file.Real(Key(arch, "rope.scaling.attn_factor"), 1.0f));
  if (type == "yarn") {
    rope.ext_factor = 1.0f;
    rope.attn_factor *= YarnMagnitude(factor);
  }
  if (!std::isfinite(rope.freq_scale) || !std::isfinite(rope.attn_factor))
    return Fail(ErrorCode::kCorrupt, "{}: {} is {}, which leaves no usable frequencies", path,
                Key(arch, "rope.scaling.factor"), factor);
  return {};
}

}  // namespace

Expected<HyperParams> ReadHyperParams(const GgufFile& file) {
  HyperParams h;
  MOEND_ASSIGN(const std::string_view arch, file.String("general.architecture"));
  const Architecture* architecture = FindArchitecture(arch);
  if (!architecture)
    return Fail(ErrorCode::kUnsupported, "{} is a model of architecture \"{}\"; moend runs {}", file.path(),
                Escaped(arch), ArchitectureNames());
  h.architecture_name = arch;
  MOEND_TRY(RefuseVariants(file, h));
  MOEND_ASSIGN(const std::string_view name, file.String("general.name", ""));
  h.name = Escaped(name);

  MOEND_TRY(ReadLayerCounts(file, *architecture, h));
  MOEND_ASSIGN(h.n_embd, file.Integer(Key(h, "embedding_length"), 1, kMaxWidth));
  MOEND_ASSIGN(h.n_ff, file.SameInteger(Key(h, "feed_forward_length"), h.n_blocks, 1, kMaxWidth));
  MOEND_ASSIGN(h.n_ctx_train, file.Integer(Key(h, "context_length"), 1, kMaxContext));
  MOEND_ASSIGN(h.rms_eps, file.Real(Key(h, "attention.layer_norm_rms_epsilon")));
  if (!(h.rms_eps >= 0.0f && h.rms_eps < 1.0f))
    return Fail(ErrorCode::kCorrupt, "{}: {} is {}, outside 0 to 1", file.path(),
                Key(h, "attention.layer_norm_rms_epsilon"), h.rms_eps);
  MOEND_TRY(ReadHeads(file, h));
  MOEND_TRY(ReadRope(file, *architecture, h));
  LayerParams layer;
  layer.rope = h.rope;
  layer.ffn.n_ff = h.n_ff;
  h.layers.assign(static_cast<std::size_t>(h.n_layers), layer);
  MOEND_TRY(architecture->describe(file, h));
  return h;
}

}  // namespace moend
