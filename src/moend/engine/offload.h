// Layers that run on a device of ggml's, a GPU: their weights lie there, the K/V cache stays with the host.
// A layer is two graphs on the device, before and behind attention. Between them the device attends by
// itself, in a decode step over its copy of the caches (engine/device_caches.h), while a prompt is read for
// the first time (AttentionHook::SeesOnlyOwn) over 16 bit K/V of that one layer; or attention is asked for
// here, on the host.
#pragma once

#include <ggml-cpp.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "moend/base/error.h"
#include "moend/engine/device_caches.h"
#include "moend/engine/device_order.h"
#include "moend/engine/own_attention.h"
#include "moend/model/device_weights.h"
#include "moend/model/graph.h"
#include "moend/model/model.h"

namespace moend {

class Offload {
 public:
  // How the host takes part in a layer. Pointers are the host's, valid during the call, rows as AttentionHook
  // has them.
  struct Host {
    virtual ~Host() = default;
    virtual std::optional<AttentionHook::OwnTokens> SeesOnlyOwn(int64_t n) = 0;
    virtual Expected<void> Store(int64_t layer, const float* q, const float* k, const float* v,
                                 int64_t n) = 0;
    // Store, done when the function is called with q, k and v behind one another: that outlives the Host.
    virtual std::function<Expected<void>(const float* qkv)> StoreLater(int64_t layer, int64_t n) = 0;
    // Store and then attention.
    virtual Expected<void> Attend(int64_t layer, const float* q, const float* k, const float* v, float* out,
                                  int64_t n) = 0;
    // Of a decode step: the contexts of its tokens. The device may then attend by itself, and leaves the rest
    // to StoreStep (DecodeHook) at the end.
    virtual std::span<const DecodeContext> Contexts() { return {}; }
    virtual Parallel Threads() = 0;
    virtual Expected<void> StoreStep(int64_t begin, int64_t end, const float* rows, int64_t stride,
                                     int64_t n) = 0;
  };

  // For model->device(), which is not null. kUnsupported names an operation that the device does not have.
  static Expected<std::unique_ptr<Offload>> Create(std::shared_ptr<const Model> model, int64_t block_tokens,
                                                   int n_threads);

  // Hidden states that go through many layers block by block stay on the device meanwhile: rows of `hidden`
  // that Run() changes are stale on the host until Fetch(). Ends with Forget(). Does nothing where the device
  // has no memory for them.
  void Keep(std::span<float> hidden);
  void Forget(const float* hidden);
  // While hidden states are kept, the host may get a block's k and v while the next one is on its way: before
  // it looks at what it has of a layer, it calls this.
  Expected<void> Settle();
  Expected<void> Fetch(std::span<const float> rows);
  void Changed(std::span<const float> rows);  // by the host, after Fetch()

  // Whether the device attends in decode steps; else the host does.
  bool attends() const { return caches_ != nullptr; }
  bool holds(int64_t layer) const { return weights_.holds(layer); }
  // Rows that the functions below take at once.
  int64_t most_rows() const { return most_rows_; }

  // The layers [begin, end), all held, over n rows at `positions`; then, if `logits` is not null, the logits
  // f32 [n][n_vocab]. hidden: f32 [n][n_embd], updated in place unless there are logits. attn_out, if not
  // null: the last layer's attention before its projection, f32 [n][n_heads * head_size].
  // `keep`: these rows come again and again (decode steps); their graphs are kept.
  Expected<void> Run(int64_t begin, int64_t end, float* hidden, std::span<const int32_t> positions,
                     Host& host, float* logits, float* attn_out, bool keep);
  Expected<void> Head(const float* hidden, int64_t n, float* logits);

  // What a context has just got of a layer goes to the device while others are read.
  Expected<void> Mirror(const DecodeContext& context, int64_t layer, const Parallel& parallel);

  // Memory of the host for the logits of a step of n rows, which the device reaches by itself where possible;
  // valid until the next call. Null: none.
  float* StepLogits(int64_t n);

 private:
  // Floats of the host, where possible in memory that the device reaches by itself.
  class HostFloats {
   public:
    // What it held is lost when it grows. False: no memory.
    bool Reserve(ggml_backend_dev_t device, int64_t floats);
    float* data() const { return data_; }

   private:
    ggml_backend_buffer_ptr buffer_;
    std::vector<float> plain_;
    float* data_ = nullptr;
    int64_t size_ = 0;
  };
  // A ggml context with a graph, whose inputs and results are rows_.
  struct Segment {
    ggml_context_ptr ctx;
    ggml_cgraph* graph = nullptr;
    ggml_tensor* logits = nullptr;
  };
  struct Steps {
    int64_t n = 0, begin = 0, end = 0;
    bool head = false;
    ggml_gallocr_ptr memory;
    std::vector<Segment> segments;
  };
  // What passes from graph to graph, in the device's memory.
  struct Rows {
    ggml_tensor *x = nullptr, *qkv = nullptr, *gate = nullptr, *attended = nullptr, *positions = nullptr,
                *temperature = nullptr;
  };

  // Hidden states of a whole prompt, on the device and here.
  struct Kept {
    float* host = nullptr;
    int64_t rows = 0;
    ggml_context_ptr ctx;
    ggml_backend_buffer_ptr buffer;
    ggml_tensor* x = nullptr;       // f32 [n_embd, rows]
    std::vector<bool> here, there;  // which rows are up to date where
  };

  // A block that was attended to, whose k and v the host has not stored yet.
  struct Pending {
    int64_t layer = 0, n = 0;
    int buffer = 0;  // HostQkv()
    std::function<Expected<void>(const float* qkv)> store;
  };

  Offload(std::shared_ptr<const Model> model, int64_t most_rows);
  // Whose rows [first, ...) these are; null: nobody's.
  Kept* KeptOf(const float* rows, int64_t* first);
  Expected<void> MakeRows();
  // What of ours runs on the device beside ggml's graphs, if it has kernels for that.
  void MakeKernels();
  std::unique_ptr<cuda::Runtime> MakeRuntime() const;  // null: there are none
  // The device's part of a step's attention, which ggml's graphs wait for.
  Expected<void> AttendThere(int64_t layer, float* rows);
  Expected<void> CheckSupport();
  // The graph behind attention of layer `l - 1` (unless l == begin), then that in front of attention of layer
  // l, or the head, or nothing (l == end).
  // x: f32 [n_embd, at least n], where hidden states come from and go to.
  Expected<Segment> MakeSegment(int64_t l, int64_t begin, int64_t end, int64_t n, bool head,
                                const OwnAttention::Block* own, ggml_tensor* x, int64_t first_row);
  Expected<Steps*> StepsOf(int64_t begin, int64_t end, int64_t n, bool head);
  Expected<void> Allocate(ggml_gallocr* memory, ggml_cgraph* graph);
  Expected<void> Start(ggml_cgraph* graph);
  void Send(ggml_tensor* to, const void* from, std::size_t bytes);
  float* HostQkv(int buffer) const { return host_qkv_ + buffer * most_rows_ * QkvFloats(); }
  int64_t QkvFloats() const { return (h_.n_heads + 2 * h_.n_kv_heads) * h_.head_size; }

  std::shared_ptr<const Model> model_;
  const HyperParams& h_;
  const DeviceWeights& weights_;
  int64_t most_rows_;
  ggml_backend_ptr backend_;
  ggml_context_ptr rows_context_;
  ggml_backend_buffer_ptr rows_buffer_;
  Rows rows_;
  HostFloats host_rows_, host_logits_;
  float *host_x_ = nullptr, *host_qkv_ = nullptr, *host_attended_ = nullptr;  // in host_rows_
  ggml_gallocr_ptr block_memory_[2], head_memory_;
  std::vector<std::unique_ptr<Steps>> steps_;  // the one that was used last at the end
  std::vector<std::unique_ptr<Kept>> kept_;
  OwnAttention own_;
  std::unique_ptr<DeviceCaches> caches_;  // null: the host attends in decode steps
  std::unique_ptr<DeviceOrder> order_;
  // Brings k and v of a prompt to the host beside what runs; null: the host waits for them.
  std::unique_ptr<cuda::Runtime> fetcher_;
  std::unique_ptr<DeviceOrder> fetch_order_;
  std::optional<Pending> pending_;
  int next_qkv_ = 0;  // HostQkv() that is free
};

}  // namespace moend
