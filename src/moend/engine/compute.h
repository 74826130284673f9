// The machine room of the engine: ggml's CPU back end with one thread pool, and the three kinds of graphs
// that it runs. Hidden states live outside of ggml, f32 [n][n_embd], because a prefill passes all of a
// prompt's through one layer before the next layer starts.
#pragma once

#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "moend/base/error.h"
#include "moend/base/ledger.h"
#include "moend/model/graph.h"
#include "moend/model/model.h"

namespace moend {

struct GgmlContextDeleter {
  void operator()(ggml_context* p) const { ggml_free(p); }
};
struct GallocrDeleter {
  void operator()(ggml_gallocr* p) const { ggml_gallocr_free(p); }
};
struct BackendDeleter {
  void operator()(ggml_backend* p) const { ggml_backend_free(p); }
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

  // hidden: f32 [tokens.size()][n_embd]. Token ids must be below n_vocab (checked).
  Expected<void> Embed(std::span<const int32_t> tokens, float* hidden);

  // One layer over one block of n <= block_tokens tokens at positions first .. first + n - 1; `hidden` is
  // updated in place. attn_out, if not null, receives the attention output before its projection, [n][n_heads
  // * head_size].
  Expected<void> Layer(int64_t layer, float* hidden, int64_t n, int64_t first, AttentionHook& hook,
                       float* attn_out = nullptr);

  // logits: f32 [n][n_vocab], of all rows as one product
  Expected<void> Head(const float* hidden, int64_t n, float* logits);

  // One token each of tokens.size() contexts through the whole model in one graph; the hook tells contexts
  // apart by row. logits: f32 [n][n_vocab], valid until the next call.
  Expected<const float*> Step(std::span<const int32_t> tokens, std::span<const int32_t> positions,
                              AttentionHook& hook);
  // The same without the logits: the hidden states that Head takes, f32 [n][n_embd], valid until the next
  // call.
  Expected<const float*> StepHidden(std::span<const int32_t> tokens, std::span<const int32_t> positions,
                                    AttentionHook& hook);

  // Calls fn(i, thread) for 0 <= i < n on the pool's threads, in any order.
  Expected<void> ParallelFor(int64_t n, const std::function<void(int64_t, int)>& fn);

 private:
  Compute() = default;
  struct Graph;  // a ggml context with a graph and its memory
  Expected<void> Run(ggml_cgraph* graph);
  Expected<std::unique_ptr<Graph>> MakeStep(int64_t n, bool head);
  Expected<const float*> RunStep(std::span<const int32_t> tokens, std::span<const int32_t> positions,
                                 AttentionHook& hook, bool head);

  std::shared_ptr<const Model> model_;
  int n_threads_ = 1;
  int64_t block_tokens_ = 512;
  std::unique_ptr<ggml_backend, BackendDeleter> backend_;
  std::unique_ptr<ggml_threadpool, ThreadpoolDeleter> pool_;
  std::unique_ptr<ggml_gallocr, GallocrDeleter> block_alloc_;  // graphs of one block, rebuilt for each
  std::vector<uint8_t> block_meta_;
  int64_t block_nodes_ = 0;                    // most nodes of such a graph
  std::vector<std::unique_ptr<Graph>> steps_;  // decode graphs, kept, one a batch size and kind
};

}  // namespace moend
