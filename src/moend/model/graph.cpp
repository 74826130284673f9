#include "moend/model/graph.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "moend/base/caught.h"
#include "moend/model/delta_net.h"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace moend {
namespace {

// ggml puts a barrier between operations, which ThreadSanitizer does not see in a library built without it.
// This tells it: what was done before the end of one custom operation is visible in the next.
class BarrierNote {
 public:
  explicit BarrierNote([[maybe_unused]] AttentionHook* hook) {
#if defined(__SANITIZE_THREAD__)
    hook_ = hook;
    __tsan_acquire(hook_);
#endif
  }
  ~BarrierNote() {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(hook_);
#endif
  }
  BarrierNote(const BarrierNote&) = delete;
  BarrierNote& operator=(const BarrierNote&) = delete;

#if defined(__SANITIZE_THREAD__)
 private:
  AttentionHook* hook_;
#endif
};

ggml_tensor* Norm(ggml_context* ctx, const HyperParams& h, ggml_tensor* x, ggml_tensor* weight) {
  return ggml_mul(ctx, ggml_rms_norm(ctx, x, h.rms_eps), weight);
}

// weight: [in, out], bias: [out] or null, x: [in, n]. Returns [out, n].
ggml_tensor* Linear(ggml_context* ctx, ggml_tensor* weight, ggml_tensor* bias, ggml_tensor* x) {
  ggml_tensor* y = ggml_mul_mat(ctx, weight, x);
  return bias ? ggml_add(ctx, y, bias) : y;
}

// x: [head_size, heads, n], rotated by the tokens' positions.
ggml_tensor* Rope(ggml_context* ctx, const RopeParams& r, ggml_tensor* x, ggml_tensor* positions,
                  ggml_tensor* factors) {
  if (r.n_dims == 0) return x;
  return ggml_rope_ext(ctx, x, positions, factors, r.n_dims, r.mode, r.n_ctx_orig, r.freq_base, r.freq_scale,
                       r.ext_factor, r.attn_factor, r.beta_fast, r.beta_slow);
}

const float* Data(const ggml_tensor* t) {
  return static_cast<const float*>(t->data);
}

// The custom operations. Each names the tensors it reads as sources, which keeps ggml's allocator from
// giving their memory away too early, and the operation before it, which orders them. Store and Attend have
// no result of their own; one float stands for it.
template <class F>
void Call(const HookSlot* slot, F&& f) noexcept {
  AttentionHook& hook = *slot->hook;
  if (hook.failed()) return;
  try {
    f(hook);
  } catch (...) {
    hook.NoteException();
  }
}

void StoreOp(ggml_tensor* dst, int thread, int /*n_threads*/, void* user) {
  const auto* slot = static_cast<const HookSlot*>(user);
  const BarrierNote note(slot->hook);
  if (thread != 0) return;  // ggml calls every operation on all threads
  const ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2];
  Call(slot, [&](AttentionHook& hook) { hook.Store(slot->layer, Data(q), Data(k), Data(v), q->ne[2]); });
}

void AttendOp(ggml_tensor* dst, int thread, int n_threads, void* user) {
  const auto* slot = static_cast<const HookSlot*>(user);
  const BarrierNote note(slot->hook);
  const ggml_tensor* q = dst->src[0];
  Call(slot, [&](AttentionHook& hook) { hook.Attend(slot->layer, Data(q), q->ne[2], thread, n_threads); });
}

void CombineOp(ggml_tensor* dst, int thread, int n_threads, void* user) {
  const auto* slot = static_cast<const HookSlot*>(user);
  const BarrierNote note(slot->hook);
  Call(slot, [&](AttentionHook& hook) {
    hook.Combine(slot->layer, static_cast<float*>(dst->data), dst->ne[1], thread, n_threads);
  });
}

}  // namespace

ggml_tensor* BuildAttention(ggml_context* ctx, HookSlot* slot, ggml_tensor* q, ggml_tensor* k,
                            ggml_tensor* v) {
  ggml_tensor* stored_from[] = {q, k, v};
  ggml_tensor* stored = ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, stored_from, 3, StoreOp, 1, slot);
  ggml_tensor* attended_from[] = {q, stored};
  ggml_tensor* attended =
      ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, attended_from, 2, AttendOp, GGML_N_TASKS_MAX, slot);
  ggml_tensor* combined_from[] = {attended};
  return ggml_custom_4d(ctx, GGML_TYPE_F32, q->ne[0] * q->ne[1], q->ne[2], 1, 1, combined_from, 1, CombineOp,
                        GGML_N_TASKS_MAX, slot);
}

namespace {

// dst: f32 [1, 1, n] from positions i32 [n].
void TemperatureOp(ggml_tensor* dst, int thread, int /*n_threads*/, void* user) {
  if (thread != 0) return;
  const auto& t = *static_cast<const QueryTemperature*>(user);
  const auto* positions = static_cast<const int32_t*>(dst->src[0]->data);
  auto* out = static_cast<float*>(dst->data);
  for (int64_t i = 0; i < dst->ne[2]; ++i) out[i] = t.factor(positions[i]);
}

ggml_tensor* Temperature(ggml_context* ctx, const HyperParams& h, ggml_tensor* positions) {
  if (h.query_temperature.scale == 0) return nullptr;
  // The user data is only read.
  return ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, positions->ne[0], 1, &positions, 1, TemperatureOp, 1,
                        const_cast<QueryTemperature*>(&h.query_temperature));
}

// x: [width of all heads, n]. Returns [head_size, heads, n], normed as `norm` says.
ggml_tensor* Heads(ggml_context* ctx, const HyperParams& h, ggml_tensor* x, int64_t heads, QkNorm norm,
                   ggml_tensor* weight) {
  if (norm == QkNorm::kRow) x = Norm(ctx, h, x, weight);
  x = ggml_reshape_3d(ctx, x, h.head_size, heads, x->ne[1]);
  return norm == QkNorm::kHeads ? Norm(ctx, h, x, weight) : x;
}

ggml_tensor* Gated(ggml_context* ctx, Activation activation, ggml_tensor* gate, ggml_tensor* up) {
  constexpr float kAlpha = 1.702f, kLimit = 7.0f;
  switch (activation) {
    case Activation::kGelu:
      return ggml_geglu_split(ctx, gate, up);
    case Activation::kSwigluOai:
      return ggml_swiglu_oai(ctx, gate, up, kAlpha, kLimit);
    case Activation::kSilu:
      break;
  }
  return ggml_swiglu_split(ctx, gate, up);
}

ggml_tensor* DenseFfn(ggml_context* ctx, const FfnParams& f, const LayerWeights& w, ggml_tensor* x) {
  ggml_tensor* gate = Linear(ctx, w.ffn_gate, w.ffn_gate_b, x);
  ggml_tensor* up = Linear(ctx, w.ffn_up, w.ffn_up_b, x);
  return Linear(ctx, w.ffn_down, w.ffn_down_b, Gated(ctx, f.activation, gate, up));
}

// x: [in, 1 or n_used, n]. Returns [out, n_used, n]: each token by its experts' matrices.
ggml_tensor* ExpertLinear(ggml_context* ctx, ggml_tensor* weight, ggml_tensor* bias, ggml_tensor* x,
                          ggml_tensor* chosen) {
  ggml_tensor* y = ggml_mul_mat_id(ctx, weight, x, chosen);
  return bias ? ggml_add_id(ctx, y, bias, chosen) : y;
}

// x: [n_embd, n]. Each token goes through the experts that the router gives the most weight. The order of the
// sums is libllama's, so that nothing but the attention rounds otherwise.
ggml_tensor* ExpertsFfn(ggml_context* ctx, ggml_cgraph* graph, const FfnParams& f, const LayerWeights& w,
                        ggml_tensor* x) {
  const int64_t n_embd = x->ne[0], n = x->ne[1];
  const bool late = f.router == Router::kSoftmaxOfChosen;
  ggml_tensor* logits = Linear(ctx, w.router, w.router_b, x);
  ggml_tensor* probabilities = late                           ? logits
                               : f.router == Router::kSigmoid ? ggml_sigmoid(ctx, logits)
                                                              : ggml_soft_max(ctx, logits);
  ggml_tensor* selection = w.selection_b ? ggml_add(ctx, probabilities, w.selection_b) : probabilities;
  ggml_tensor* chosen = ggml_argsort_top_k(ctx, selection, static_cast<int>(f.n_used));  // [n_used, n]
  ggml_tensor* weights =
      ggml_get_rows(ctx, ggml_reshape_3d(ctx, probabilities, 1, f.n_experts, n), chosen);  // [1, n_used, n]
  if (late) {
    weights = ggml_soft_max(ctx, ggml_reshape_2d(ctx, weights, f.n_used, n));
    weights = ggml_reshape_3d(ctx, weights, 1, f.n_used, n);
  }
  if (f.normalize) {
    constexpr float kLeast = 6.103515625e-5f;  // the smallest normal half float
    weights = ggml_reshape_2d(ctx, weights, f.n_used, n);
    ggml_tensor* sum = ggml_clamp(ctx, ggml_sum_rows(ctx, weights), kLeast, INFINITY);
    weights = ggml_reshape_3d(ctx, ggml_div(ctx, weights, sum), 1, f.n_used, n);
  }
  if (f.weight_scale != 1.0f) weights = ggml_scale(ctx, weights, f.weight_scale);
  ggml_build_forward_expand(graph, weights);

  ggml_tensor* in = ggml_reshape_3d(ctx, x, n_embd, 1, n);
  ggml_tensor* up = ExpertLinear(ctx, w.up_experts, w.up_experts_b, in, chosen);        // [n_ff, n_used, n]
  ggml_tensor* gate = ExpertLinear(ctx, w.gate_experts, w.gate_experts_b, in, chosen);  // the same
  ggml_tensor* each =
      ExpertLinear(ctx, w.down_experts, w.down_experts_b, Gated(ctx, f.activation, gate, up), chosen);
  each = ggml_mul(ctx, each, weights);  // [n_embd, n_used, n]
  ggml_build_forward_expand(graph, each);
  ggml_tensor* out = nullptr;
  for (int64_t e = 0; e < f.n_used; ++e) {
    ggml_tensor* one =
        ggml_view_2d(ctx, each, n_embd, n, each->nb[2], static_cast<std::size_t>(e) * each->nb[1]);
    out = out ? ggml_add(ctx, out, one) : one;
  }
  if (f.n_used == 1) out = ggml_cont(ctx, out);
  if (f.n_ff_shared == 0) return out;

  ggml_tensor* shared =
      ggml_swiglu_split(ctx, ggml_mul_mat(ctx, w.gate_shared, x), ggml_mul_mat(ctx, w.up_shared, x));
  shared = ggml_mul_mat(ctx, w.down_shared, shared);
  if (f.shared_gate) shared = ggml_mul(ctx, shared, ggml_sigmoid(ctx, ggml_mul_mat(ctx, w.shared_gate, x)));
  return ggml_add(ctx, out, shared);
}

// What a block adds to the stream: normed and scaled where the architecture has it so.
ggml_tensor* AddToStream(ggml_context* ctx, const HyperParams& h, const LayerParams& p, ggml_tensor* stream,
                         ggml_tensor* x, ggml_tensor* post_norm) {
  if (post_norm) x = Norm(ctx, h, x, post_norm);
  if (p.residual_scale != 1.0f) x = ggml_scale(ctx, x, p.residual_scale);
  return ggml_add(ctx, x, stream);
}

}  // namespace

Expected<void> AttentionHook::TakeError() {
  if (!failed()) return {};
  Error error = std::exchange(error_, Error());
  failed_.store(false, std::memory_order_relaxed);
  noted_.store(false, std::memory_order_relaxed);
  return std::unexpected(std::move(error));
}

void AttentionHook::NoteError(Error error) noexcept {
  if (noted_.exchange(true, std::memory_order_relaxed)) return;
  error_ = std::move(error);
  failed_.store(true, std::memory_order_release);
}

void AttentionHook::NoteException() noexcept {
  NoteError(ErrorOf(std::current_exception(), "attending"));
}

void AttentionHook::LoadStates(int64_t, float*, int64_t) {
  throw std::logic_error("no states of delta nets are kept here");
}

void AttentionHook::StoreStates(int64_t, const float*, int64_t) {
  throw std::logic_error("no states of delta nets are kept here");
}

int64_t NodesPerLayer(const HyperParams& h) {
  constexpr int64_t kDense = 56, kExperts = 48;
  int64_t most = 0;
  for (const LayerParams& l : h.layers) most = std::max(most, l.ffn.n_used);
  return kDense + (h.recurrent() ? kDeltaNetNodes : 0) + (most > 0 ? kExperts + 2 * most : 0);
}

ggml_tensor* BuildEmbedding(ggml_context* ctx, const Model& model, ggml_tensor* tokens) {
  ggml_tensor* x = ggml_get_rows(ctx, model.weights().tok_embd, tokens);
  const float scale = model.hparams().embedding_scale;
  return scale == 1.0f ? x : ggml_scale(ctx, x, scale);
}

AttentionInputs BuildAttentionInputs(ggml_context* ctx, const HyperParams& h, const LayerParams& p,
                                     const LayerWeights& w, ggml_tensor* x, ggml_tensor* positions,
                                     ggml_tensor* temperature) {
  const int64_t size = h.head_size;
  AttentionInputs in;
  x = Norm(ctx, h, x, w.attn_norm);
  ggml_tensor* q = Linear(ctx, w.wq, w.bq, x);
  if (p.output_gate) {
    q = ggml_reshape_3d(ctx, q, 2 * size, h.n_heads, x->ne[1]);
    const auto half = [&](int64_t first) {
      return ggml_cont_2d(ctx,
                          ggml_view_3d(ctx, q, size, h.n_heads, x->ne[1], q->nb[1], q->nb[2],
                                       ggml_row_size(GGML_TYPE_F32, first)),
                          size * h.n_heads, x->ne[1]);
    };
    in.gate = half(size);
    q = half(0);
  }
  q = Heads(ctx, h, q, h.n_heads, p.qk_norm, w.q_norm);
  ggml_tensor* k = Heads(ctx, h, Linear(ctx, w.wk, w.bk, x), h.n_kv_heads, p.qk_norm, w.k_norm);
  in.v = Heads(ctx, h, Linear(ctx, w.wv, w.bv, x), h.n_kv_heads, QkNorm::kNone, nullptr);
  in.q = Rope(ctx, p.rope, q, positions, w.rope_freqs);
  if (temperature) in.q = ggml_mul(ctx, in.q, temperature);
  in.k = Rope(ctx, p.rope, k, positions, w.rope_freqs);
  return in;
}

namespace {

// mixed: what attention, or what stands in its place, adds.
ggml_tensor* AfterMixing(ggml_context* ctx, ggml_cgraph* graph, const HyperParams& h, const LayerParams& p,
                         const LayerWeights& w, ggml_tensor* x, ggml_tensor* mixed) {
  x = AddToStream(ctx, h, p, x, mixed, w.attn_post_norm);
  ggml_tensor* normed = Norm(ctx, h, x, w.ffn_norm);
  ggml_tensor* ffn =
      p.ffn.n_experts > 0 ? ExpertsFfn(ctx, graph, p.ffn, w, normed) : DenseFfn(ctx, p.ffn, w, normed);
  return AddToStream(ctx, h, p, x, ffn, w.ffn_post_norm);
}

}  // namespace

ggml_tensor* BuildAfterAttention(ggml_context* ctx, ggml_cgraph* graph, const HyperParams& h,
                                 const LayerParams& p, const LayerWeights& w, ggml_tensor* x,
                                 ggml_tensor* attended, ggml_tensor* gate) {
  if (gate) attended = ggml_mul(ctx, attended, ggml_sigmoid(ctx, gate));
  return AfterMixing(ctx, graph, h, p, w, x, Linear(ctx, w.wo, w.bo, attended));
}

ggml_tensor* BuildLayer(ggml_context* ctx, ggml_cgraph* graph, const Model& model, int64_t layer,
                        ggml_tensor* x, ggml_tensor* positions, HookSlot* slot, ggml_tensor** attn_out) {
  const HyperParams& h = model.hparams();
  const LayerParams& p = h.layers[static_cast<std::size_t>(layer)];
  const LayerWeights& w = model.weights().layers[static_cast<std::size_t>(layer)];
  if (p.holds_state()) {
    ggml_tensor* normed = Norm(ctx, h, x, w.attn_norm);
    x = AfterMixing(ctx, graph, h, p, w, x, BuildDeltaNet(ctx, graph, h, p.delta_net, w, normed, slot));
  } else {
    const AttentionInputs in =
        BuildAttentionInputs(ctx, h, p, w, x, positions, Temperature(ctx, h, positions));
    ggml_tensor* attended = BuildAttention(ctx, slot, in.q, in.k, in.v);
    if (attn_out) *attn_out = attended;
    x = BuildAfterAttention(ctx, graph, h, p, w, x, attended, in.gate);
  }
  ggml_build_forward_expand(graph, x);
  return x;
}

ggml_tensor* BuildHead(ggml_context* ctx, const HyperParams& h, const HeadWeights& w, ggml_tensor* x) {
  ggml_tensor* logits = Linear(ctx, w.output, w.bias, Norm(ctx, h, x, w.norm));
  if (h.logit_scale != 1.0f) logits = ggml_scale(ctx, logits, h.logit_scale);
  if (h.logit_soft_cap == 0) return logits;
  logits = ggml_tanh(ctx, ggml_scale(ctx, logits, 1.0f / h.logit_soft_cap));
  return ggml_scale(ctx, logits, h.logit_soft_cap);
}

}  // namespace moend
