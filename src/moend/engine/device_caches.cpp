#include "moend/engine/device_caches.h"

#include <algorithm>
#include <cstring>

#include "moend/attention/cuda/plan.h"

namespace moend {
namespace {

constexpr int64_t kRawRoom = 64;   // tokens that can be appended before memory moves
constexpr int64_t kPlanRoom = 32;  // and before work is cut anew
constexpr int64_t kPageRoom = 32;
constexpr int64_t kAlign = 16;     // of what is copied
constexpr int64_t kTableUnit = 4;  // entries of a table whose addresses are so

constexpr int64_t kMostPieces = 32768;
constexpr int64_t kMostPiece = 32 << 10;  // so that many copy at once
constexpr int64_t kStagingBytes = int64_t{64} << 20;
constexpr int64_t kMostLater = int64_t{1} << 20;  // of a thread at a time
constexpr int64_t kFewCopies = 16;                // not worth waking the threads
constexpr int64_t kPieceBytes = kMostPieces * static_cast<int64_t>(sizeof(cuda::Piece));

template <class T>
int64_t BytesOf(const std::vector<T>& v) {
  return RoundUp(std::ssize(v) * static_cast<int64_t>(sizeof(T)), kAlign);
}

}  // namespace

ContextMirror::ContextMirror(std::shared_ptr<DevicePool> pool, std::shared_ptr<Registry> registry,
                             int64_t n_heads)
    : pool_(std::move(pool)), registry_(std::move(registry)), heads_(static_cast<std::size_t>(n_heads)) {
  const std::lock_guard lock(registry_->mutex);
  registry_->mirrors.push_back(this);
}

ContextMirror::~ContextMirror() {
  const std::lock_guard lock(registry_->mutex);
  registry_->mirrors.remove(this);
  Clear();
}

int64_t ContextMirror::bytes() const {
  const std::lock_guard lock(registry_->mutex);
  int64_t bytes = 0;
  for (const Head& head : heads_)
    bytes += std::ssize(head.stamps) * head.page_bytes + head.table.bytes + head.raw.bytes;
  return bytes;
}

void ContextMirror::Clear() {
  for (Head& head : heads_) {
    for (const uint64_t stamp : head.stamps) pool_->GivePage(stamp);
    pool_->Give(head.table);
    pool_->Give(head.raw);
    head = {};
  }
}

DeviceCaches::DeviceCaches(std::shared_ptr<const Model> model, std::shared_ptr<DevicePool> pool)
    : model_(std::move(model)),
      pool_(std::move(pool)),
      registry_(std::make_shared<ContextMirror::Registry>()),
      shape_{model_->hparams().n_kv_heads, model_->hparams().head_size},
      group_(model_->hparams().n_heads / shape_.n_kv_heads),
      plans_(static_cast<std::size_t>(model_->hparams().n_layers)),
      inverses_(plans_.size() * static_cast<std::size_t>(shape_.n_kv_heads)) {}

Expected<std::unique_ptr<DeviceCaches>> DeviceCaches::Create(std::shared_ptr<const Model> model,
                                                             std::unique_ptr<cuda::Runtime> runtime) {
  auto pool = std::make_shared<DevicePool>(std::move(runtime));
  std::unique_ptr<DeviceCaches> c(new DeviceCaches(std::move(model), std::move(pool)));
  MOEND_ASSIGN(c->kernel_, c->runtime().Describe(c->shape_.head_size, c->group_));
  c->staging_ = c->runtime().AllocateHost(kPieceBytes + kStagingBytes);
  if (!c->staging_) return Fail(ErrorCode::kOutOfMemory, "no memory of the host for what goes to the device");
  return c;
}

DeviceCaches::~DeviceCaches() {
  static_cast<void>(runtime().Synchronize());
  if (staging_) runtime().FreeHost(staging_);
  if (host_rows_) runtime().FreeHost(reinterpret_cast<uint8_t*>(host_rows_));
}

float* DeviceCaches::Rows(int64_t floats) {
  const int64_t bytes = floats * static_cast<int64_t>(sizeof(float));
  return Reserve(rows_, bytes) ? reinterpret_cast<float*>(rows_.data) : nullptr;
}

float* DeviceCaches::HostRows(int64_t floats) {
  if (floats <= n_host_rows_) return host_rows_;
  if (host_rows_) runtime().FreeHost(reinterpret_cast<uint8_t*>(host_rows_));
  host_rows_ = reinterpret_cast<float*>(runtime().AllocateHost(floats * static_cast<int64_t>(sizeof(float))));
  n_host_rows_ = host_rows_ ? floats : 0;
  return host_rows_;
}

bool DeviceCaches::Reserve(DevicePool::Block& block, int64_t bytes) {
  if (block.bytes >= bytes) return true;
  pool_->Give(block);
  block = pool_->Take(bytes);
  return block.data != nullptr;
}

Expected<uint8_t*> DeviceCaches::Stage(uint8_t* to, int64_t bytes) {
  const int64_t pieces = (bytes + kMostPiece - 1) / kMostPiece;
  if (flying_ || n_pieces_ + pieces > kMostPieces || staged_ + bytes > kStagingBytes) {
    MOEND_TRY(Flush());
    MOEND_TRY(runtime().Synchronize());
    flying_ = false;
  }
  uint8_t* const from = staging_ + kPieceBytes + staged_;
  auto* const list = reinterpret_cast<cuda::Piece*>(staging_);
  for (int64_t at = 0; at < bytes; at += kMostPiece)
    list[n_pieces_++] = {to + at, from + at, std::min(kMostPiece, bytes - at)};
  staged_ += bytes;
  return from;
}

Expected<void> DeviceCaches::StageLater(uint8_t* to, const void* from, int64_t bytes) {
  const auto* source = static_cast<const uint8_t*>(from);
  for (int64_t at = 0; at < bytes; at += kMostLater) {
    const int64_t n = std::min(kMostLater, bytes - at);
    MOEND_ASSIGN(uint8_t* const staged, Stage(to + at, RoundUp(n, kAlign)));
    later_.push_back({staged, source + at, n});
  }
  return {};
}

Expected<void> DeviceCaches::StageCopy(uint8_t* to, const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kMostLater) {
    const int64_t n = std::min(kMostLater, bytes - at);
    MOEND_ASSIGN(uint8_t* const staged, Stage(to + at, RoundUp(n, kAlign)));
    std::memcpy(staged, static_cast<const uint8_t*>(from) + at, static_cast<std::size_t>(n));
  }
  return {};
}

Expected<void> DeviceCaches::Flush() {
  if (n_pieces_ == 0) return {};
  const auto copy = [&](int64_t i, int) {
    const Later& l = later_[static_cast<std::size_t>(i)];
    std::memcpy(l.to, l.from, static_cast<std::size_t>(l.bytes));
  };
  const auto n = std::ssize(later_);
  if (n > kFewCopies)
    MOEND_TRY(parallel_->run(n, copy));
  else
    for (int64_t i = 0; i < n; ++i) copy(i, 0);
  later_.clear();
  MOEND_TRY(runtime().Copy(reinterpret_cast<const cuda::Piece*>(staging_), n_pieces_));
  n_pieces_ = staged_ = 0;
  flying_ = true;
  return {};
}

bool DeviceCaches::DropOthers(std::span<const DecodeContext> contexts) {
  const std::lock_guard lock(registry_->mutex);
  bool dropped = false;
  for (ContextMirror* const mirror : registry_->mirrors) {
    const bool at_work = std::ranges::any_of(
        contexts, [&](const DecodeContext& c) { return c.mirror && c.mirror->get() == mirror; });
    const bool holds = std::ranges::any_of(
        mirror->heads_, [](const Head& h) { return !h.stamps.empty() || h.table.data || h.raw.data; });
    if (at_work || !holds) continue;
    mirror->Clear();
    dropped = true;
  }
  return dropped;
}

Expected<bool> DeviceCaches::Prepare(std::span<const DecodeContext> contexts, int64_t begin, int64_t end,
                                     const Parallel& parallel) {
  const auto n_heads = std::ssize(inverses_);
  parallel_ = &parallel;
  for (const DecodeContext& context : contexts) {
    if (!context.mirror) return false;
    for (LayerCache& cache :
         context.caches.subspan(static_cast<std::size_t>(begin * shape_.n_kv_heads),
                                static_cast<std::size_t>((end - begin) * shape_.n_kv_heads)))
      if (cache.scores(0)) return false;  // they grow with every step, which the kernels do not do
    if (!*context.mirror) context.mirror->reset(new ContextMirror(pool_, registry_, n_heads));
  }
  bool ready = true;
  for (int64_t l = begin; l < end && ready; ++l) {
    MOEND_ASSIGN(ready, SyncLayer(contexts, l));
    if (ready || !DropOthers(contexts)) continue;
    MOEND_ASSIGN(ready, SyncLayer(contexts, l));
  }
  // What is noted as being there must be there, whoever attends.
  MOEND_TRY(Flush());
  return ready;
}

Expected<bool> DeviceCaches::SyncLayer(std::span<const DecodeContext> contexts, int64_t layer) {
  LayerPlan& plan = plans_[static_cast<std::size_t>(layer)];
  plan.heads.clear();
  for (const DecodeContext& context : contexts) {
    for (int64_t h = 0; h < shape_.n_kv_heads; ++h) {
      const auto at = static_cast<std::size_t>(layer * shape_.n_kv_heads + h);
      Head& head = (*context.mirror)->heads_[at];
      MOEND_ASSIGN(const bool there, SyncHead(head, context.caches[at], layer, h));
      if (!there) return false;
      plan.heads.push_back(&head);
    }
  }
  const bool same = plan.grown < kPlanRoom && std::ranges::equal(plan.heads, plan.changes, {},
                                                                 [](const Head* h) { return h->changed; });
  return same ? Expected<bool>(true) : PlanLayer(plan, layer, std::ssize(contexts));
}

Expected<bool> DeviceCaches::SyncHead(Head& head, const LayerCache& cache, int64_t layer, int64_t h) {
  const StreamView view = cache.view(0);
  const uint64_t version = cache.version();
  const bool same = head.version == version;
  if (same && head.n_raw == view.n_raw && view.n_raw < head.raw_capacity) return true;
  head.version = 0;
  if (!same) {
    MOEND_ASSIGN(const bool there, SyncPages(head, cache, view));
    if (!there) return false;
  }
  MOEND_ASSIGN(const bool there, SyncRaw(head, view));
  if (!there) return false;
  cuda::Stream& s = head.stream;
  const auto* live = reinterpret_cast<const uint64_t*>(head.table.data);
  s = cuda::StreamOf(view.layout);
  s.n_pages = view.n_pages;
  s.n_raw = view.n_raw;
  s.live = live;
  s.pages = reinterpret_cast<const uint32_t*>(live + head.table_capacity);
  s.raw_k = reinterpret_cast<uint16_t*>(head.raw.data);
  s.raw_v = s.raw_k + head.raw_capacity * shape_.head_size;
  MOEND_ASSIGN(s.key_inverse, InverseOf(view, layer, h));
  if (view.rotation && !s.key_inverse) return false;
  head.version = version;
  head.changed = ++changes_;
  return true;
}

Expected<bool> DeviceCaches::SyncPages(Head& head, const LayerCache& cache, const StreamView& view) {
  const int64_t n = view.n_pages;
  // Pages before this one are what they were.
  const int64_t first = head.pages_version == cache.pages_version()
                            ? std::clamp<int64_t>(std::ssize(head.stamps) - 1, 0, n)
                            : 0;
  head.pages_version = 0;
  head.page_bytes = view.layout.bytes;
  const std::vector<uint64_t> old(head.stamps.begin() + first, head.stamps.end());
  head.stamps.resize(static_cast<std::size_t>(first));
  head.ids.resize(static_cast<std::size_t>(first));
  // New references first: a page that moved up keeps its memory.
  bool there = true;
  for (int64_t i = first; i < n; ++i) {
    const uint8_t* const page = view.pages[i];
    const uint64_t stamp = PageStamp(view.layout, page);
    const auto got = pool_->TakePage(stamp, view.layout.bytes);
    if (!(there = got.has_value())) break;
    head.stamps.push_back(stamp);
    head.ids.push_back(got->id);
    if (got->fresh) MOEND_TRY(StageLater(pool_->PageData(got->id), page, view.layout.refs));
  }
  for (const uint64_t stamp : old) pool_->GivePage(stamp);
  if (!there) return false;
  int64_t begin = first / kTableUnit * kTableUnit;
  if (n > head.table_capacity || !head.table.data) {
    head.table_capacity = RoundUp(n + n / 4 + kPageRoom, kPageRoom);
    if (!Reserve(head.table, head.table_capacity * 12)) return false;
    begin = 0;
  }
  MOEND_TRY(StageLater(head.table.data + begin * 8, view.live + begin, (n - begin) * 8));
  MOEND_TRY(StageLater(head.table.data + head.table_capacity * 8 + begin * 4, head.ids.data() + begin,
                       (n - begin) * 4));
  head.pages_version = cache.pages_version();
  return true;
}

Expected<bool> DeviceCaches::SyncRaw(Head& head, const StreamView& view) {
  const int64_t hs = shape_.head_size, n = view.n_raw, whole = n / kRawBlockTokens * kRawBlockTokens;
  if (n + kPlanRoom > head.raw_capacity) {
    head.raw_capacity = RoundUp(n + n / 8 + kRawRoom, kRawBlockTokens);
    if (!Reserve(head.raw, 4 * head.raw_capacity * hs)) {
      head.raw_capacity = 0;
      return false;
    }
  }
  const bool tail_is_whole = view.raw_tail == kRawBlockTokens || n == whole;
  const int64_t as_they_are = tail_is_whole ? RoundUp(n, kRawBlockTokens) : whole;
  MOEND_TRY(StageLater(head.raw.data, view.raw_k, as_they_are * hs * 2));
  if (!tail_is_whole) {
    MOEND_ASSIGN(uint8_t* const staged, Stage(head.raw.data + whole * hs * 2, kRawBlockTokens * hs * 2));
    auto* const to = reinterpret_cast<uint16_t*>(staged);
    std::fill_n(to, kRawBlockTokens * hs, uint16_t{0});
    for (int64_t c = 0; c < hs; ++c)
      std::copy_n(view.raw_k + whole * hs + c * view.raw_tail, n - whole, to + c * kRawBlockTokens);
  }
  MOEND_TRY(StageLater(head.raw.data + head.raw_capacity * hs * 2, view.raw_v, n * hs * 2));
  head.n_raw = n;
  return true;
}

Expected<const float*> DeviceCaches::InverseOf(const StreamView& view, int64_t layer, int64_t h) {
  if (!view.rotation) return nullptr;
  Inverse& inverse = inverses_[static_cast<std::size_t>(layer * shape_.n_kv_heads + h)];
  const int64_t bytes = shape_.head_size * static_cast<int64_t>(sizeof(float));
  if (inverse.host != view.rotation->inverse) {
    if (!Reserve(inverse.block, bytes)) return nullptr;
    MOEND_TRY(StageLater(inverse.block.data, view.rotation->inverse, bytes));
    inverse.host = view.rotation->inverse;
  }
  return reinterpret_cast<const float*>(inverse.block.data);
}

Expected<bool> DeviceCaches::PlanLayer(LayerPlan& plan, int64_t layer, int64_t n_contexts) {
  const AttentionStyle style = model_->Style(layer);
  const int64_t hs = shape_.head_size, n_heads = shape_.n_kv_heads * group_;
  std::vector<cuda::Stream> streams, longest;
  for (int64_t b = 0; b < n_contexts; ++b) {
    for (int64_t h = 0; h < shape_.n_kv_heads; ++h) {
      Head& head = *plan.heads[static_cast<std::size_t>(b * shape_.n_kv_heads + h)];
      cuda::Stream s = head.stream;
      s.n_raw = head.n_raw;
      if (style.window > 0) s.first_raw = static_cast<int32_t>(s.n_raw - style.window);
      s.rows = s.group = static_cast<int32_t>(group_);
      s.head = static_cast<int32_t>(h * group_);
      s.q = s.out = (b * n_heads + h * group_) * hs;
      s.q_stride = s.out_stride = n_contexts * n_heads * hs;
      streams.push_back(s);
      s.n_raw += kPlanRoom;
      longest.push_back(s);
    }
  }
  MOEND_ASSIGN(const cuda::WorkPlan work, cuda::MakeWorkPlan(longest, hs, kernel_.blocks, kernel_.rows));
  plan.changes.clear();
  const int64_t at_items = BytesOf(streams), at_bins = at_items + BytesOf(work.items),
                at_outputs = at_bins + BytesOf(work.bins), bytes = at_outputs + BytesOf(work.outputs);
  const int64_t done_bytes = RoundUp(std::ssize(work.outputs) * 4, kAlign);
  if (!Reserve(plan.block, bytes) || !Reserve(partial_, work.partial_floats * 4)) return false;
  if (done_bytes > done_.bytes) {
    if (!Reserve(done_, done_bytes)) return false;
    MOEND_TRY(runtime().Clear(done_.data, done_.bytes));
  }
  uint8_t* const base = plan.block.data;
  MOEND_TRY(StageCopy(base, streams.data(), std::ssize(streams) * static_cast<int64_t>(sizeof(streams[0]))));
  MOEND_TRY(StageCopy(base + at_items, work.items.data(),
                      std::ssize(work.items) * static_cast<int64_t>(sizeof(work.items[0]))));
  MOEND_TRY(StageCopy(base + at_bins, work.bins.data(), std::ssize(work.bins) * 4));
  MOEND_TRY(StageCopy(base + at_outputs, work.outputs.data(),
                      std::ssize(work.outputs) * static_cast<int64_t>(sizeof(work.outputs[0]))));
  cuda::Batch& batch = plan.batch;
  batch = {};
  batch.pool = pool_->base();
  batch.streams = reinterpret_cast<const cuda::Stream*>(base);
  batch.items = reinterpret_cast<const cuda::Item*>(base + at_items);
  batch.bins = reinterpret_cast<const int32_t*>(base + at_bins);
  batch.outputs = reinterpret_cast<const cuda::Output*>(base + at_outputs);
  batch.soft_cap = style.soft_cap;
  batch.q_scale = style.scale;
  batch.n_bins = static_cast<int32_t>(std::ssize(work.bins) - 1);
  batch.head_size = static_cast<int32_t>(hs);
  batch.slot_rows = work.slot_rows;
  plan.grown = 0;
  for (const Head* head : plan.heads) plan.changes.push_back(head->changed);
  return true;
}

Expected<void> DeviceCaches::Attend(int64_t layer, const float* qkv, const float* sinks, float* out,
                                    float* copy) {
  LayerPlan& plan = plans_[static_cast<std::size_t>(layer)];
  const auto kv_floats = std::ssize(plan.heads) * shape_.head_size;
  const float *const k = qkv + kv_floats * group_, *const v = k + kv_floats;
  ++plan.grown;
  for (Head* head : plan.heads) ++head->n_raw;
  plan.batch.grown = static_cast<int32_t>(plan.grown);
  plan.batch.n_new = 1;
  plan.batch.new_k = k;
  plan.batch.new_v = v;
  plan.batch.copied = qkv;
  plan.batch.copy = copy;
  plan.batch.n_copied = copy ? kv_floats * (group_ + 2) : 0;
  plan.batch.q = qkv;
  plan.batch.out = out;
  plan.batch.sinks = sinks;
  // The largest of all layers: they may have moved since the plan was made.
  plan.batch.partial = reinterpret_cast<float*>(partial_.data);
  plan.batch.done = reinterpret_cast<uint32_t*>(done_.data);
  return runtime().Attend(plan.batch);
}

}  // namespace moend
