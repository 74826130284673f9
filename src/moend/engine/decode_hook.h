// Attention of a decode step: one token each of several contexts.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "moend/attention/attention.h"
#include "moend/base/error.h"
#include "moend/cache/layer_cache.h"
#include "moend/model/graph.h"

namespace moend {

// The newest queries of a context, kept over the last decode steps before an eviction for scorers that
// observe queries.
struct QueryRing {
  int64_t window = 0;     // tokens; 0: the scorer does not observe
  int64_t filled = 0;     // tokens stored so far, at most `window`
  Buffer<float> queries;  // [layer][KV head][window * group][head_size], scaled
};

class ContextMirror;

struct DecodeContext {
  std::span<LayerCache> caches;     // [layer][KV head]
  std::span<Buffer<float>> states;  // [layer], of those that hold one; empty where none does
  QueryRing* ring = nullptr;        // null: this step is not observed
  // What a device has of the caches (engine/device_caches.h); null: it is to have nothing.
  std::unique_ptr<ContextMirror>* mirror = nullptr;
};

class DecodeHook : public AttentionHook {
 public:
  static Expected<std::unique_ptr<DecodeHook>> Create(std::shared_ptr<const Model> model, int n_threads);

  void Begin(std::span<const DecodeContext> contexts) { contexts_ = contexts; }
  std::span<const DecodeContext> contexts() const { return contexts_; }

  // A step of the layers [begin, end) that a device has attended to: all of a step that is left to the host.
  // rows: q, k and v of a layer behind one another, as Store() has them, layers `stride` floats apart.
  void StoreStep(int64_t begin, int64_t end, const float* rows, int64_t stride, int64_t n, const Each& each);

  void Store(int64_t layer, const float* q, const float* k, const float* v, int64_t n) override;
  void Attend(int64_t layer, const float* q, int64_t n, int thread, int n_threads) override;
  void Combine(int64_t layer, float* out, int64_t n, int thread, int n_threads) override;
  void LoadStates(int64_t layer, float* states, int64_t contexts) override;
  void StoreStates(int64_t layer, const float* states, int64_t contexts) override;

 private:
  // A share of one KV head's pages of one context; share 0 takes the raw tokens too.
  struct Item {
    int32_t context, head, share;
    int64_t page_begin, page_end;
  };
  LayerCache& Cache(int64_t context, int64_t layer, int64_t head);
  // A token of a context's KV head; q: of its group, not yet scaled.
  void StoreHead(int64_t context, int64_t layer, int64_t head, const float* q, const float* k,
                 const float* v);
  void NoteStored(int64_t layer);  // by all heads of all contexts
  void PlanItems(int64_t layer);
  SoftmaxState State(int64_t item);

  explicit DecodeHook(std::shared_ptr<const Model> model);
  // The queries of a context's KV head in the layer at hand.
  QueryRows Rows(int64_t context, int64_t head) const;
  std::shared_ptr<const Model> model_;
  KvShape shape_;
  int64_t n_heads_, group_, last_layer_;  // the last that attends
  AttentionStyle style_;                  // of the layer at hand
  int n_threads_ = 1;
  std::span<const DecodeContext> contexts_;
  std::vector<Item> items_;
  std::vector<int64_t> first_item_;  // of (context, head); ends with items_.size()
  std::vector<float> queries_;       // [contexts][n_heads][head_size], scaled
  std::vector<float> states_;        // [items][group * (head_size + 2)]
  std::vector<Buffer<float>> workspaces_;
  std::atomic<int64_t> next_{0};
};

}  // namespace moend
