// The machine room of the engine: ggml's CPU back end with one thread pool, and the kinds of graphs that it
// runs. Hidden states live outside of ggml, f32 [n][n_embd], because a prefill passes all of a prompt's
// through one layer before the next layer starts.
//
// Layers whose weights lie on a device run there (engine/offload.h); whoever calls sees no difference.
//
// Nothing is thrown through a graph that runs: what a hook or a job throws is kept and returned as an error
// when the graph has ended. What a graph needs is reserved before it starts.
#pragma once

#include <ggml-alloc.h>
#include <ggml-cpu.h>
#include <ggml.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "moend/base/error.h"
#include "moend/base/ledger.h"
#include "moend/engine/decode_hook.h"
#include "moend/engine/offload.h"
#include "moend/model/graph.h"
#include "moend/model/model.h"

namespace moend {

struct GgmlContextDeleter {
  void operator()(ggml_context* p) const { ggml_free(p); }
};
struct GallocrDeleter {
  void operator()(ggml_gallocr* p) const { ggml_gallocr_free(p); }
};
struct ThreadpoolDeleter {
  void operator()(ggml_threadpool* p) const { ggml_threadpool_free(p); }
};

class Compute {
 public:
  static Expected<std::unique_ptr<Compute>> Create(std::shared_ptr<const Model> model, int n_threads,
                                                   int64_t block_tokens);
  ~Compute();

  const Model& model() const { return *model_; }
  int n_threads() const { return n_threads_; }
  int64_t block_tokens() const { return block_tokens_; }
  // Bytes of the graphs that are kept and of the work buffer.
  int64_t bytes() const { return ledger_->live(); }

  // hidden: f32 [tokens.size()][n_embd]. Token ids must be below n_vocab (checked).
  Expected<void> Embed(std::span<const int32_t> tokens, float* hidden);

  // While it lives, hidden states that go through the layers block by block may stay on a device in between,
  // so that who wants to see them must Fetch() them; and the hook may get the newest block late, so that who
  // wants to see what it has stored of a layer must Settle() first.
  class OnDevice {
   public:
    OnDevice() = default;
    OnDevice(Compute& compute, std::span<float> hidden);
    OnDevice(OnDevice&& other) noexcept { *this = std::move(other); }
    OnDevice& operator=(OnDevice&& other) noexcept {
      std::swap(offload_, other.offload_);
      std::swap(hidden_, other.hidden_);
      return *this;
    }
    ~OnDevice();

   private:
    Offload* offload_ = nullptr;
    const float* hidden_ = nullptr;
  };
  Expected<void> Settle();
  // Brings rows of hidden states up to date that Layer() changed.
  Expected<void> Fetch(std::span<const float> rows);

  // A device that holds the layer gets what the context has just got of it, beside what runs there.
  Expected<void> Mirror(const DecodeContext& context, int64_t layer);

  // One layer over one block of n <= block_tokens tokens at positions first .. first + n - 1; `hidden` is
  // updated in place. attn_out, if not null, receives the attention output before its projection, [n][n_heads
  // * head_size].
  Expected<void> Layer(int64_t layer, float* hidden, int64_t n, int64_t first, AttentionHook& hook,
                       float* attn_out = nullptr);

  // logits: f32 [n][n_vocab], of all rows as one product; an error unless all of them are finite.
  Expected<void> Head(const float* hidden, int64_t n, float* logits);

  // One token each of tokens.size() contexts through the whole model in one graph; the hook tells contexts
  // apart by row. logits: f32 [n][n_vocab], valid until the next call; not checked.
  Expected<const float*> Step(std::span<const int32_t> tokens, std::span<const int32_t> positions,
                              DecodeHook& hook);
  // The same without the logits: the hidden states that Head takes, f32 [n][n_embd], valid until the next
  // call.
  Expected<const float*> StepHidden(std::span<const int32_t> tokens, std::span<const int32_t> positions,
                                    DecodeHook& hook);

  // Calls fn(i, thread) for 0 <= i < n on the pool's threads, in any order. fn may throw: then some are not
  // called, and the first exception is returned as an error.
  Expected<void> ParallelFor(int64_t n, const std::function<void(int64_t, int)>& fn);

  Parallel Threads();
  // Whether a device attends in decode steps, to the layers that it holds.
  bool device_attends() const { return offload_ && offload_->attends(); }

  // The error of logits of the model that are not finite.
  Expected<void> CheckFinite(std::span<const float> logits) const;

 private:
  class HookHost;
  struct Graph;  // a ggml context with a graph and its memory
  using Allocator = std::unique_ptr<ggml_gallocr, GallocrDeleter>;
  // Memory of the graphs of one shape, which are rebuilt for every block.
  struct Activations {
    Allocator allocator;
    int64_t bytes = 0;  // as the ledger has them
  };

  Compute() = default;
  Expected<void> Reserve();
  ggml_cgraph* NewBlockGraph();  // in block_context_; valid until the next one
  // A layer's graph over `hidden`; null memory only to reserve.
  ggml_cgraph* LayerGraph(HookSlot* slot, float* hidden, int64_t n, const int32_t* positions,
                          float* attn_out);
  // Attention alone, over host memory.
  ggml_cgraph* AttentionGraph(HookSlot* slot, const float* q, const float* k, const float* v, int64_t n,
                              float* out);
  ggml_cgraph* HeadGraph(const float* hidden, int64_t n, float* logits);
  ggml_cgraph* EmbedGraph(const int32_t* tokens, int64_t n, float* hidden);
  // Gives the graph's tensors their memory.
  Expected<void> Allocate(Activations& from, ggml_cgraph* graph, int64_t n);
  Expected<void> ReserveWork(ggml_cplan* plan, const ggml_cgraph* graph);
  Expected<void> Run(ggml_cgraph* graph, AttentionHook* hook = nullptr);
  Expected<std::unique_ptr<Graph>> MakeStep(int64_t n, bool head);
  Expected<Graph*> StepOf(int64_t n, bool head);
  Expected<const float*> RunStep(std::span<const int32_t> tokens, std::span<const int32_t> positions,
                                 DecodeHook& hook, bool head);
  // The same where layers lie on a device, run by run.
  Expected<const float*> RunStepAcross(std::span<const int32_t> tokens, std::span<const int32_t> positions,
                                       DecodeHook& hook, bool head);
  Expected<void> RunLayerHere(HookSlot& slot, float* hidden, std::span<const int32_t> positions,
                              float* attn_out);

  std::shared_ptr<const Model> model_;
  int n_threads_ = 1;
  int64_t block_tokens_ = 512;
  std::shared_ptr<Ledger> ledger_ = std::make_shared<Ledger>();
  std::unique_ptr<ggml_threadpool, ThreadpoolDeleter> pool_;
  bool broken_ = false;  // an exception came out of ggml: its threads may be anywhere
  Buffer<uint8_t> work_, block_meta_;
  int64_t block_nodes_ = 0;  // most nodes of a graph in block_context_
  std::unique_ptr<ggml_context, GgmlContextDeleter> block_context_;
  Activations embed_, layer_, observed_layer_, attention_, head_;
  // Decode graphs, one a batch size and kind, the one that was used last at the end. The activations of a
  // graph grow with its batch size, so only a few are kept.
  std::vector<std::unique_ptr<Graph>> steps_;
  std::unique_ptr<Offload> offload_;  // null: all layers run here
  std::vector<float> hidden_;         // of a step across
};

}  // namespace moend
