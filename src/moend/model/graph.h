// Builds the parts of a transformer as ggml graph nodes, everything but attention itself, which enters as
// custom operations that call an AttentionHook. One graph serves all architectures: LayerParams says what is
// in a layer.
#pragma once

#include <ggml.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>

#include "moend/base/error.h"
#include "moend/model/model.h"

namespace moend {

// Called by ggml's threads while a graph runs, for each layer in this order, each step after all threads
// finished the one before: Store on one thread; Attend on every thread; Combine on every thread. q: f32
// [n][n_heads][head_size] and k, v: f32 [n][n_kv_heads][head_size], post bias, norm and RoPE; q is not yet
// scaled. out: f32 [n][n_heads][head_size]; complete after Combine. k and v are valid during Store only, q
// during Store and Attend: out may take their place in memory.
//
// The three may throw. Nothing leaves through ggml, whose threads are in the middle of the graph: the first
// exception is kept, the hook is not called again in this graph, and whoever ran the graph asks TakeError().
class AttentionHook {
 public:
  virtual ~AttentionHook() = default;
  // Whether the graph that runs, or is about to, is in vain. Any thread may ask.
  bool failed() const { return failed_.load(std::memory_order_acquire); }
  // The error of the graph that ended, if any; the hook can be used again then.
  Expected<void> TakeError();
  // What a hook does that meets an error before its graph or in it. Any thread; the first one stays.
  void NoteError(Error error) noexcept;
  void NoteException() noexcept;  // the one that is being handled
  virtual void Store(int64_t layer, const float* q, const float* k, const float* v, int64_t n) = 0;
  // Store outside of a graph, where `each` calls a function for 0 <= i < n on all threads.
  using Each = std::function<void(int64_t n, const std::function<void(int64_t)>&)>;
  virtual void StoreApart(int64_t layer, const float* q, const float* k, const float* v, int64_t n,
                          const Each& each) {
    static_cast<void>(each);
    Store(layer, q, k, v, n);
  }
  virtual void Attend(int64_t layer, const float* q, int64_t n, int thread, int n_threads) = 0;
  virtual void Combine(int64_t layer, float* out, int64_t n, int thread, int n_threads) = 0;
  // Whether a layer's queries see nothing but the tokens that were given to Store since the layer's first
  // block, as is the case where a prompt is read: `before` of them before the n that come next, `most`
  // in all. A device can then attend by itself: it calls Store and neither Attend nor Combine.
  struct OwnTokens {
    int64_t before = 0, most = 0;
    bool queries = true;  // Store looks at q of some of the n
  };
  virtual std::optional<OwnTokens> SeesOnlyOwn(int64_t n) const {
    static_cast<void>(n);
    return std::nullopt;
  }
  // Of layers that are delta nets, on one thread: what they remember of each of `contexts` contexts before
  // the graph's tokens, and after them; f32 [contexts][DeltaNetParams::state_floats()], zeros before the
  // first token. Those who do not keep states throw.
  virtual void LoadStates(int64_t layer, float* states, int64_t contexts);
  virtual void StoreStates(int64_t layer, const float* states, int64_t contexts);

 private:
  std::atomic<bool> noted_{false}, failed_{false};  // failed_ once error_ is there
  Error error_;
};

// User data of the three custom operations of a layer; the caller keeps one per (graph, layer) alive while
// the graph is.
struct HookSlot {
  AttentionHook* hook = nullptr;
  int64_t layer = 0;
  bool one_token_each = false;  // the graph's tokens are of as many contexts; else of one
};

// tokens: i32 [n]. Returns f32 [n_embd, n].
ggml_tensor* BuildEmbedding(ggml_context* ctx, const Model& model, ggml_tensor* tokens);

// x: f32 [n_embd, n]; positions: i32 [n]. Returns the layer's output, f32 [n_embd, n]. If attn_out is not
// null it receives the attention output before the output projection, f32 [head_size * n_heads, n].
ggml_tensor* BuildLayer(ggml_context* ctx, ggml_cgraph* graph, const Model& model, int64_t layer,
                        ggml_tensor* x, ggml_tensor* positions, HookSlot* slot,
                        ggml_tensor** attn_out = nullptr);

// Final norm and output projection: f32 [n_vocab, n].
ggml_tensor* BuildHead(ggml_context* ctx, const HyperParams& h, const HeadWeights& w, ggml_tensor* x);

// The same layer in three parts, for who attends elsewhere.
//
// What attention takes, contiguous: q f32 [head_size, n_heads, n], k, v f32 [head_size, n_kv_heads, n]; and
// what weighs its result, f32 [head_size * n_heads, n], null unless the layer has an output gate.
struct AttentionInputs {
  ggml_tensor *q = nullptr, *k = nullptr, *v = nullptr, *gate = nullptr;
};
// temperature: f32 [1, 1, n], by what queries are multiplied (QueryTemperature::factor); null unless the
// model has that.
AttentionInputs BuildAttentionInputs(ggml_context* ctx, const HyperParams& h, const LayerParams& p,
                                     const LayerWeights& w, ggml_tensor* x, ggml_tensor* positions,
                                     ggml_tensor* temperature);
// By the slot's hook. Returns f32 [head_size * n_heads, n], which is no view, so that a caller can mark it as
// an output.
ggml_tensor* BuildAttention(ggml_context* ctx, HookSlot* slot, ggml_tensor* q, ggml_tensor* k,
                            ggml_tensor* v);
// attended: f32 [head_size * n_heads, n]. Returns the layer's output, f32 [n_embd, n].
ggml_tensor* BuildAfterAttention(ggml_context* ctx, ggml_cgraph* graph, const HyperParams& h,
                                 const LayerParams& p, const LayerWeights& w, ggml_tensor* x,
                                 ggml_tensor* attended, ggml_tensor* gate);

// Upper bound of graph nodes that one layer adds, for sizing ggml contexts.
int64_t NodesPerLayer(const HyperParams& h);

}  // namespace moend
