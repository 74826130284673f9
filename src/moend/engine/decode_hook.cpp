#include "moend/engine/decode_hook.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace moend {
namespace {

// Below this many pages a head is not worth splitting: merging costs about as much as attending a few pages.
constexpr int64_t kMinPagesPerShare = 8;

// Time of a stream's pages, in bytes: those that are read, and as many as pass by while a page of any codec
// is scored and summed (16 bit pages take 1.8 times as long as 2 bit ones).
int64_t Cost(const StreamView& kv) {
  return kv.n_pages * (kv.layout.bytes + kPageTokens * kv.layout.head_size * 4);
}

}  // namespace

DecodeHook::DecodeHook(std::shared_ptr<const Model> model)
    : model_(std::move(model)),
      shape_{model_->hparams().n_kv_heads, model_->hparams().head_size},
      n_heads_(model_->hparams().n_heads),
      group_(n_heads_ / shape_.n_kv_heads),
      last_layer_(model_->hparams().n_layers - 1) {
  while (last_layer_ > 0 && model_->hparams().layers[static_cast<std::size_t>(last_layer_)].holds_state())
    --last_layer_;
}

Expected<std::unique_ptr<DecodeHook>> DecodeHook::Create(std::shared_ptr<const Model> model, int n_threads) {
  const HyperParams& hp = model->hparams();
  std::unique_ptr<DecodeHook> hook(new DecodeHook(model));
  hook->n_threads_ = n_threads;
  for (int i = 0; i < n_threads; ++i) {
    MOEND_ASSIGN(auto ws, Buffer<float>::Create(nullptr, WorkspaceFloats(hp.head_size, hook->group_)));
    hook->workspaces_.push_back(std::move(ws));
  }
  return hook;
}

void DecodeHook::Store(int64_t layer, const float* q, const float* k, const float* v, int64_t n) {
  const int64_t d = shape_.head_size, q_row = n_heads_ * d;
  style_ = model_->Style(layer);
  queries_.resize(static_cast<std::size_t>(n * q_row));
  for (int64_t i = 0; i < n * q_row; ++i) queries_[static_cast<std::size_t>(i)] = q[i] * style_.scale;
  for (int64_t i = 0; i < n * shape_.n_kv_heads; ++i)
    StoreHead(i / shape_.n_kv_heads, layer, i % shape_.n_kv_heads, q + i * group_ * d, k + i * d, v + i * d);
  NoteStored(layer);
  PlanItems(layer);
  next_.store(0, std::memory_order_relaxed);
}

void DecodeHook::StoreHead(int64_t context, int64_t layer, int64_t head, const float* q, const float* k,
                           const float* v) {
  auto appended = Cache(context, layer, head).Append(k, v, 1);
  if (!appended) NoteError(std::move(appended.error()));
  QueryRing* const ring = contexts_[static_cast<std::size_t>(context)].ring;
  if (!ring) return;
  const int64_t floats = group_ * shape_.head_size;
  float* const to =
      ring->queries.data() +
      ((layer * shape_.n_kv_heads + head) * ring->window + ring->filled % ring->window) * floats;
  const float scale = model_->Style(layer).scale;
  for (int64_t i = 0; i < floats; ++i) to[i] = q[i] * scale;
}

void DecodeHook::NoteStored(int64_t layer) {
  if (layer != last_layer_) return;
  for (const DecodeContext& context : contexts_)
    if (context.ring) ++context.ring->filled;
}

void DecodeHook::StoreStep(int64_t begin, int64_t end, const float* rows, int64_t stride, int64_t n,
                           const Each& each) {
  const int64_t d = shape_.head_size, heads = n * shape_.n_kv_heads;
  each((end - begin) * heads, [&](int64_t item) {
    const int64_t layer = begin + item / heads, i = item % heads;
    const float* const q = rows + item / heads * stride;
    const float* const k = q + n * n_heads_ * d;
    StoreHead(i / shape_.n_kv_heads, layer, i % shape_.n_kv_heads, q + i * group_ * d, k + i * d,
              k + (heads + i) * d);
  });
  for (int64_t l = begin; l < end; ++l) NoteStored(l);
}

void DecodeHook::LoadStates(int64_t layer, float* states, int64_t contexts) {
  const auto li = static_cast<std::size_t>(layer);
  const int64_t n = model_->hparams().layers[li].delta_net.state_floats();
  for (int64_t b = 0; b < contexts; ++b)
    std::copy_n(contexts_[static_cast<std::size_t>(b)].states[li].data(), n, states + b * n);
}

void DecodeHook::StoreStates(int64_t layer, const float* states, int64_t contexts) {
  const auto li = static_cast<std::size_t>(layer);
  const int64_t n = model_->hparams().layers[li].delta_net.state_floats();
  for (int64_t b = 0; b < contexts; ++b)
    std::copy_n(states + b * n, n, contexts_[static_cast<std::size_t>(b)].states[li].data());
}

QueryRows DecodeHook::Rows(int64_t context, int64_t head) const {
  return style_.Rows(queries_.data() + (context * n_heads_ + head * group_) * shape_.head_size, group_,
                     group_, head);
}

LayerCache& DecodeHook::Cache(int64_t context, int64_t layer, int64_t head) {
  return contexts_[static_cast<std::size_t>(context)]
      .caches[static_cast<std::size_t>(layer * shape_.n_kv_heads + head)];
}

void DecodeHook::PlanItems(int64_t layer) {
  items_.clear();
  first_item_.clear();
  // Heads may remember different numbers of tokens in different numbers of bits: they are cut by what they
  // cost, so that each thread gets about four items of like size.
  int64_t total = 0;
  for (int64_t b = 0; b < std::ssize(contexts_); ++b)
    for (int64_t h = 0; h < shape_.n_kv_heads; ++h) total += Cost(Cache(b, layer, h).view(0));
  const int64_t item = std::max<int64_t>(1, total / (4 * n_threads_));
  for (int64_t b = 0; b < std::ssize(contexts_); ++b) {
    for (int64_t h = 0; h < shape_.n_kv_heads; ++h) {
      first_item_.push_back(static_cast<int64_t>(items_.size()));
      const StreamView kv = Cache(b, layer, h).view(0);
      const int64_t most = n_threads_ == 1 ? 1 : std::max<int64_t>(1, kv.n_pages / kMinPagesPerShare);
      const int64_t shares = std::clamp<int64_t>((Cost(kv) + item - 1) / item, 1, most);
      for (int64_t s = 0; s < shares; ++s)
        items_.push_back({static_cast<int32_t>(b), static_cast<int32_t>(h), static_cast<int32_t>(s),
                          kv.n_pages * s / shares, kv.n_pages * (s + 1) / shares});
    }
  }
  first_item_.push_back(static_cast<int64_t>(items_.size()));
  const auto floats = static_cast<std::size_t>(group_ * (shape_.head_size + 2)) * items_.size();
  if (states_.size() < floats) states_.resize(floats);
}

SoftmaxState DecodeHook::State(int64_t item) {
  float* base = states_.data() + item * group_ * (shape_.head_size + 2);
  return {base + 2 * group_, base, base + group_};
}

void DecodeHook::Attend(int64_t layer, const float*, int64_t, int thread, int) {
  const int64_t d = shape_.head_size;
  float* workspace = workspaces_[static_cast<std::size_t>(thread)].data();
  for (int64_t i;
       (i = next_.fetch_add(1, std::memory_order_relaxed)) < static_cast<int64_t>(items_.size());) {
    const Item& item = items_[static_cast<std::size_t>(i)];
    QueryRows rows = Rows(item.context, item.head);
    if (item.share != 0) rows.sinks = nullptr;  // seen once
    const SoftmaxState state = State(i);
    InitState(state, rows, d);
    simd::AttendStream(Cache(item.context, layer, item.head).view(0), item.page_begin, item.page_end,
                       item.share == 0, rows, state, workspace);
  }
}

void DecodeHook::Combine(int64_t layer, float* out, int64_t n, int thread, int n_threads) {
  const int64_t d = shape_.head_size, streams = n * shape_.n_kv_heads;
  for (int64_t s = streams * thread / n_threads; s < streams * (thread + 1) / n_threads; ++s) {
    const int64_t first = first_item_[static_cast<std::size_t>(s)],
                  last = first_item_[static_cast<std::size_t>(s + 1)];
    const SoftmaxState state = State(first);
    for (int64_t i = first + 1; i < last; ++i) simd::MergeStates(state, State(i), group_, d);
    const int64_t b = s / shape_.n_kv_heads, h = s % shape_.n_kv_heads;
    LayerCache& cache = Cache(b, layer, h);
    if (float* scores = cache.scores(0)) {
      simd::ColumnSumsStream(cache.view(0), Rows(b, h), state.max, state.sum, scores,
                             workspaces_[static_cast<std::size_t>(thread)].data());
    }
    simd::Finish(state, group_, d);
    std::memcpy(out + (b * n_heads_ + h * group_) * d, state.out,
                static_cast<std::size_t>(group_ * d) * sizeof(float));
  }
}

}  // namespace moend
