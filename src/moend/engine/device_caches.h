// K/V caches on a device, for decode attention there (attention/cuda): copies of what the host has packed.
// The host's caches stay what is true: they pack, evict, fork and are saved as ever; the device gets what has
// changed since it last looked, pages by their stamps, and appends the raw tokens of a step by itself.
//
//     Prepare(): what has changed ─► device     then, a layer at a time:  Attend(): tokens appended, attended
//
// Where the device has no memory, or a cache is of a kind that only the host attends to, Prepare() says so
// and the host attends; nothing is lost by that.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "moend/attention/cuda/work.h"
#include "moend/base/error.h"
#include "moend/cache/value_refit.h"
#include "moend/engine/decode_hook.h"
#include "moend/engine/device_pool.h"
#include "moend/model/model.h"

namespace moend {

class DeviceCaches;

// A context's caches on the device. Whoever owns the context keeps it, and may let go at any time: of a
// thread's own step, that is after it.
class ContextMirror {
 public:
  ~ContextMirror();
  // Of the device; a page that contexts share counts in each.
  int64_t bytes() const;
  ContextMirror(const ContextMirror&) = delete;
  ContextMirror& operator=(const ContextMirror&) = delete;

 private:
  friend class DeviceCaches;
  struct Head {
    uint64_t version = 0, pages_version = 0;  // of the LayerCache; 0: nothing is there
    int64_t n_raw = 0;                        // tokens there
    int64_t page_bytes = 0;
    std::vector<uint64_t> stamps;  // of the pages there
    std::vector<uint32_t> ids;
    DevicePool::Block table;  // u64 live [capacity], then u32 ids [capacity]
    DevicePool::Block raw;    // K, then V, as StreamView has them, of `raw_capacity` tokens
    int64_t table_capacity = 0, raw_capacity = 0;
    cuda::Stream stream;   // counts and addresses
    uint64_t changed = 0;  // differs when `stream` does
  };
  // All contexts that have something on a device, so that those who are not at work make room.
  struct Registry {
    std::mutex mutex;
    std::list<ContextMirror*> mirrors;
  };

  ContextMirror(std::shared_ptr<DevicePool> pool, std::shared_ptr<Registry> registry, int64_t n_heads);
  void Clear();

  std::shared_ptr<DevicePool> pool_;
  std::shared_ptr<Registry> registry_;
  std::vector<Head> heads_;  // [layer][KV head]
};

class DeviceCaches {
 public:
  // kUnsupported where there is no kernel for the model's heads.
  static Expected<std::unique_ptr<DeviceCaches>> Create(std::shared_ptr<const Model> model,
                                                        std::unique_ptr<cuda::Runtime> runtime);
  ~DeviceCaches();

  // What contexts remember of the layers [begin, end), of which none holds a state. False: the host has to
  // attend to them. DecodeContext::mirror is made where it is missing.
  Expected<bool> Prepare(std::span<const DecodeContext> contexts, int64_t begin, int64_t end,
                         const Parallel& parallel);

  // One token each of the contexts that were prepared. Addresses of the device: q, out f32
  // [contexts][n_heads][head_size], k, v f32 [contexts][n_kv_heads][head_size], q not yet scaled, the three
  // behind one another. `sinks`: of the layer, or null. `copy`: of the device, too, which
  // gets q, k and v. Returns at once; runtime() keeps the order.
  Expected<void> Attend(int64_t layer, const float* qkv, const float* sinks, float* out, float* copy);

  // Memory of the device for what Attend() copies, and of the host for where it then goes; valid until the
  // next call. Null: none.
  float* Rows(int64_t floats);
  float* HostRows(int64_t floats);

  cuda::Runtime& runtime() { return pool_->runtime(); }

 private:
  using Head = ContextMirror::Head;
  // Who does what in a layer, until a context comes or goes or a cache changes.
  struct LayerPlan {
    std::vector<uint64_t> changes;  // Head::changed, [context][KV head]
    std::vector<Head*> heads;       // of the same
    int64_t grown = 0;              // tokens that were appended since
    DevicePool::Block block;        // streams, items, bins, outputs
    cuda::Batch batch;
  };
  struct Inverse {
    const float* host = nullptr;
    DevicePool::Block block;
  };

  DeviceCaches(std::shared_ptr<const Model> model, std::shared_ptr<DevicePool> pool);
  // True when all is there.
  Expected<bool> SyncLayer(std::span<const DecodeContext> contexts, int64_t layer);
  Expected<bool> SyncHead(Head& head, const LayerCache& cache, int64_t layer, int64_t h);
  Expected<bool> SyncPages(Head& head, const LayerCache& cache, const StreamView& view);
  Expected<bool> SyncRaw(Head& head, const StreamView& view);
  Expected<const float*> InverseOf(const StreamView& view, int64_t layer, int64_t h);
  Expected<bool> PlanLayer(LayerPlan& plan, int64_t layer, int64_t n_contexts);
  // Room for `bytes` that `block` begins; what it held is lost. False: no memory.
  bool Reserve(DevicePool::Block& block, int64_t bytes);
  // Where `bytes` may be written that are on their way to the device, until the next call of any of these.
  Expected<uint8_t*> Stage(uint8_t* to, int64_t bytes);
  // Bytes of the host, which stay as they are until Flush(); and others.
  Expected<void> StageLater(uint8_t* to, const void* from, int64_t bytes);
  Expected<void> StageCopy(uint8_t* to, const void* from, int64_t bytes);
  Expected<void> Flush();
  // Takes memory from contexts that are not among these. False if there are none.
  bool DropOthers(std::span<const DecodeContext> contexts);

  std::shared_ptr<const Model> model_;
  std::shared_ptr<DevicePool> pool_;
  std::shared_ptr<ContextMirror::Registry> registry_;
  KvShape shape_;
  int64_t group_;
  cuda::KernelInfo kernel_;
  uint64_t changes_ = 0;
  std::vector<LayerPlan> plans_;   // [layer]
  std::vector<Inverse> inverses_;  // [layer][KV head]
  DevicePool::Block partial_, done_;
  DevicePool::Block rows_;
  float* host_rows_ = nullptr;
  int64_t n_host_rows_ = 0;     // floats
  uint8_t* staging_ = nullptr;  // pieces, then what they copy
  int64_t n_pieces_ = 0, staged_ = 0;
  struct Later {
    uint8_t* to;
    const uint8_t* from;
    int64_t bytes;
  };
  std::vector<Later> later_;            // what is to be copied to where it is staged
  const Parallel* parallel_ = nullptr;  // of Prepare()
  bool flying_ = false;                 // the device may still read what is staged
};

}  // namespace moend
