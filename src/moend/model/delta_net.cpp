#include "moend/model/delta_net.h"

#include <cmath>

namespace moend {
namespace {

// dst: f32 [floats, contexts], their states.
void LoadOp(ggml_tensor* dst, int thread, int /*n_threads*/, void* user) {
  if (thread != 0) return;
  const auto* slot = static_cast<const HookSlot*>(user);
  AttentionHook& hook = *slot->hook;
  if (hook.failed()) return;
  try {
    hook.LoadStates(slot->layer, static_cast<float*>(dst->data), dst->ne[1]);
  } catch (...) {
    hook.NoteException();
  }
}

// src[0]: f32 [floats, contexts].
void StoreStatesOp(ggml_tensor* dst, int thread, int /*n_threads*/, void* user) {
  if (thread != 0) return;
  const auto* slot = static_cast<const HookSlot*>(user);
  AttentionHook& hook = *slot->hook;
  if (hook.failed()) return;
  const ggml_tensor* states = dst->src[0];
  try {
    hook.StoreStates(slot->layer, static_cast<const float*>(states->data), states->ne[1]);
  } catch (...) {
    hook.NoteException();
  }
}

// To the length 1, by the formula that libllama has.
ggml_tensor* UnitLength(ggml_context* ctx, ggml_tensor* x, float eps) {
  const auto n = static_cast<float>(x->ne[0]);
  return ggml_scale(ctx, ggml_rms_norm(ctx, x, eps / n), 1.0f / std::sqrt(n));
}

// Heads of a convolution's output, from channel `first` on.
ggml_tensor* HeadsAt(ggml_context* ctx, ggml_tensor* x, int64_t size, int64_t heads, int64_t first) {
  return ggml_view_4d(ctx, x, size, heads, x->ne[1], x->ne[2], ggml_row_size(GGML_TYPE_F32, size), x->nb[1],
                      x->nb[2], ggml_row_size(GGML_TYPE_F32, first));
}

// x: [size, heads, n, contexts]. Each head `times` times in a row.
ggml_tensor* RepeatHeads(ggml_context* ctx, ggml_tensor* x, int64_t times) {
  const int64_t size = x->ne[0], heads = x->ne[1], n = x->ne[2], contexts = x->ne[3];
  x = ggml_repeat_4d(ctx, ggml_reshape_4d(ctx, x, size, 1, heads, n * contexts), size, times, heads,
                     n * contexts);
  return ggml_reshape_4d(ctx, x, size, times * heads, n, contexts);
}

struct Gates {
  ggml_tensor *rate, *decay;  // [1, n_v_heads, n, contexts]: how much is rewritten; the log of what stays
};

Gates BuildGates(ggml_context* ctx, const DeltaNetParams& p, const LayerWeights& w, ggml_tensor* x, int64_t n,
                 int64_t contexts) {
  const int64_t heads = p.n_v_heads, group = heads / p.n_k_heads;
  ggml_tensor *rate, *step;
  if (p.grouped) {
    // For each head of K: the rates of its heads of V, then their steps.
    ggml_tensor* both =
        ggml_reshape_3d(ctx, ggml_mul_mat(ctx, w.delta_gates, x), 2 * group, p.n_k_heads, n * contexts);
    const auto half = [&](int64_t first) {
      ggml_tensor* view = ggml_view_3d(ctx, both, group, p.n_k_heads, n * contexts, both->nb[1], both->nb[2],
                                       ggml_row_size(GGML_TYPE_F32, first));
      return ggml_cont_3d(ctx, view, heads, n, contexts);
    };
    rate = half(0);
    step = half(group);
  } else {
    rate = ggml_mul_mat(ctx, w.delta_rate, x);
    step = ggml_reshape_3d(ctx, ggml_mul_mat(ctx, w.delta_step, x), heads, n, contexts);
  }
  ggml_tensor* decay = ggml_mul(ctx, ggml_softplus(ctx, ggml_add(ctx, step, w.delta_step_b)), w.delta_decay);
  return {ggml_reshape_4d(ctx, ggml_sigmoid(ctx, rate), 1, heads, n, contexts),
          ggml_reshape_4d(ctx, decay, 1, heads, n, contexts)};
}

}  // namespace

ggml_tensor* BuildDeltaNet(ggml_context* ctx, ggml_cgraph* graph, const HyperParams& h,
                           const DeltaNetParams& p, const LayerWeights& w, ggml_tensor* x, HookSlot* slot) {
  const int64_t contexts = slot->one_token_each ? x->ne[1] : 1, n = x->ne[1] / contexts;
  const int64_t size = p.head_size, heads = p.n_v_heads, channels = p.channels(), past = p.kernel - 1;
  const int64_t conv_floats = past * channels, matrix_floats = size * size * heads;

  ggml_tensor* loaded =
      ggml_custom_4d(ctx, GGML_TYPE_F32, conv_floats + matrix_floats, contexts, 1, 1, &x, 1, LoadOp, 1, slot);
  const auto bytes = [](int64_t floats) { return ggml_row_size(GGML_TYPE_F32, floats); };
  ggml_tensor* old = ggml_view_3d(ctx, loaded, past, channels, contexts, bytes(past), loaded->nb[1], 0);
  ggml_tensor* matrices = ggml_view_4d(ctx, loaded, size, size, heads, contexts, bytes(size),
                                       bytes(size * size), loaded->nb[1], bytes(conv_floats));
  if (contexts > 1) matrices = ggml_cont(ctx, matrices);

  ggml_tensor* mixed = ggml_reshape_3d(ctx, ggml_mul_mat(ctx, w.delta_qkv, x), channels, n, contexts);
  ggml_tensor* line = ggml_concat(ctx, old, ggml_transpose(ctx, mixed), 0);  // [past + n, channels, contexts]
  ggml_tensor* convolved = ggml_silu(ctx, ggml_ssm_conv(ctx, line, w.delta_conv));

  ggml_tensor* q = UnitLength(ctx, HeadsAt(ctx, convolved, size, p.n_k_heads, 0), h.rms_eps);
  ggml_tensor* k = UnitLength(ctx, HeadsAt(ctx, convolved, size, p.n_k_heads, size * p.n_k_heads), h.rms_eps);
  ggml_tensor* v = HeadsAt(ctx, convolved, size, heads, 2 * size * p.n_k_heads);
  // ggml's operation pairs head i of V with head i % n_k_heads of K.
  if (p.grouped && heads != p.n_k_heads) {
    q = RepeatHeads(ctx, q, heads / p.n_k_heads);
    k = RepeatHeads(ctx, k, heads / p.n_k_heads);
  }
  const Gates gates = BuildGates(ctx, p, w, x, n, contexts);
  ggml_tensor* both = ggml_gated_delta_net(ctx, q, k, v, gates.decay, gates.rate, matrices, /*K=*/1);
  ggml_tensor* out = ggml_view_4d(ctx, both, size, heads, n, contexts, bytes(size), bytes(size * heads),
                                  bytes(size * heads * n), 0);

  ggml_tensor* newest =
      ggml_cont_2d(ctx, ggml_view_3d(ctx, line, past, channels, contexts, line->nb[1], line->nb[2], bytes(n)),
                   conv_floats, contexts);
  ggml_tensor* rewritten = ggml_view_2d(ctx, both, matrix_floats, contexts, bytes(matrix_floats),
                                        bytes(size * heads * n * contexts));
  ggml_tensor* states = ggml_concat(ctx, newest, rewritten, 0);
  ggml_build_forward_expand(
      graph, ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, &states, 1, StoreStatesOp, 1, slot));

  ggml_tensor* gate = ggml_reshape_4d(ctx, ggml_mul_mat(ctx, w.delta_gate, x), size, heads, n, contexts);
  out = ggml_mul(ctx, ggml_rms_norm(ctx, out, h.rms_eps), w.delta_norm);
  out = ggml_mul(ctx, out, ggml_silu(ctx, gate));
  return ggml_mul_mat(ctx, w.delta_out, ggml_reshape_2d(ctx, out, size * heads, n * contexts));
}

}  // namespace moend
