#include "moend/model/graph.h"

#include <utility>

#include "moend/base/caught.h"

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
ggml_tensor* Rope(ggml_context* ctx, const HyperParams& h, ggml_tensor* x, ggml_tensor* positions,
                  ggml_tensor* factors) {
  const RopeParams& r = h.rope;
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

// q: [head_size, n_heads, n], k, v: [head_size, n_kv_heads, n], all contiguous. Returns
// [head_size * n_heads, n], which is no view, so that a caller can mark it as an output.
ggml_tensor* Attention(ggml_context* ctx, HookSlot* slot, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v) {
  ggml_tensor* stored_from[] = {q, k, v};
  ggml_tensor* stored = ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, stored_from, 3, StoreOp, 1, slot);
  ggml_tensor* attended_from[] = {q, stored};
  ggml_tensor* attended =
      ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, attended_from, 2, AttendOp, GGML_N_TASKS_MAX, slot);
  ggml_tensor* combined_from[] = {attended};
  return ggml_custom_4d(ctx, GGML_TYPE_F32, q->ne[0] * q->ne[1], q->ne[2], 1, 1, combined_from, 1, CombineOp,
                        GGML_N_TASKS_MAX, slot);
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

ggml_tensor* BuildEmbedding(ggml_context* ctx, const Model& model, ggml_tensor* tokens) {
  return ggml_get_rows(ctx, model.weights().tok_embd, tokens);
}

ggml_tensor* BuildLayer(ggml_context* ctx, ggml_cgraph* graph, const Model& model, int64_t layer,
                        ggml_tensor* x, ggml_tensor* positions, HookSlot* slot, ggml_tensor** attn_out) {
  const HyperParams& h = model.hparams();
  const LayerWeights& w = model.weights().layers[static_cast<std::size_t>(layer)];
  const int64_t n = x->ne[1];

  ggml_tensor* normed = Norm(ctx, h, x, w.attn_norm);
  ggml_tensor* q = ggml_reshape_3d(ctx, Linear(ctx, w.wq, w.bq, normed), h.head_size, h.n_heads, n);
  ggml_tensor* k = ggml_reshape_3d(ctx, Linear(ctx, w.wk, w.bk, normed), h.head_size, h.n_kv_heads, n);
  ggml_tensor* v = ggml_reshape_3d(ctx, Linear(ctx, w.wv, w.bv, normed), h.head_size, h.n_kv_heads, n);
  if (w.q_norm) q = Norm(ctx, h, q, w.q_norm);
  if (w.k_norm) k = Norm(ctx, h, k, w.k_norm);
  q = Rope(ctx, h, q, positions, w.rope_freqs);
  k = Rope(ctx, h, k, positions, w.rope_freqs);

  ggml_tensor* attended = Attention(ctx, slot, q, k, v);
  if (attn_out) *attn_out = attended;
  x = ggml_add(ctx, Linear(ctx, w.wo, w.bo, attended), x);

  normed = Norm(ctx, h, x, w.ffn_norm);
  ggml_tensor* gate = Linear(ctx, w.ffn_gate, w.ffn_gate_b, normed);
  ggml_tensor* up = Linear(ctx, w.ffn_up, w.ffn_up_b, normed);
  x = ggml_add(ctx, Linear(ctx, w.ffn_down, w.ffn_down_b, ggml_swiglu_split(ctx, gate, up)), x);
  ggml_build_forward_expand(graph, x);
  return x;
}

ggml_tensor* BuildHead(ggml_context* ctx, const Model& model, ggml_tensor* x) {
  const Weights& w = model.weights();
  return Linear(ctx, w.output, w.output_b, Norm(ctx, model.hparams(), x, w.output_norm));
}

}  // namespace moend
