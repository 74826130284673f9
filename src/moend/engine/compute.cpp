#include "moend/engine/compute.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace moend {
namespace {

constexpr int64_t kFixedNodes = 64;  // inputs, embedding, head, copies

std::size_t MetaBytes(int64_t nodes) {
  return ggml_tensor_overhead() * static_cast<std::size_t>(nodes) +
         ggml_graph_overhead_custom(static_cast<std::size_t>(nodes), false);
}

// A tensor over memory that is not ggml's; the allocator leaves tensors alone that have data.
ggml_tensor* Borrow(ggml_context* ctx, ggml_type type, int64_t ne0, int64_t ne1, const void* data) {
  ggml_tensor* t = ggml_new_tensor_2d(ctx, type, ne0, ne1);
  t->data = const_cast<void*>(data);
  return t;
}

struct ParallelJob {
  const std::function<void(int64_t, int)>* fn;
  int64_t n;
  std::atomic<int64_t> next{0};
};

void RunJob(ggml_tensor*, int ith, int, void* userdata) {
  auto* job = static_cast<ParallelJob*>(userdata);
  for (int64_t i; (i = job->next.fetch_add(1, std::memory_order_relaxed)) < job->n;) (*job->fn)(i, ith);
}

}  // namespace

struct Compute::Graph {
  int64_t n = 0;
  bool head = true;  // ends with the logits; else with the hidden states
  std::unique_ptr<ggml_context, GgmlContextDeleter> ctx;
  std::unique_ptr<ggml_gallocr, GallocrDeleter> alloc;
  ggml_cgraph* graph = nullptr;
  ggml_tensor *tokens = nullptr, *positions = nullptr, *out = nullptr;
  std::vector<HookSlot> slots;
};

Compute::~Compute() = default;

Expected<std::unique_ptr<Compute>> Compute::Create(std::shared_ptr<const Model> model, int n_threads,
                                                   int64_t block_tokens) {
  std::unique_ptr<Compute> c(new Compute);
  c->model_ = std::move(model);
  c->n_threads_ = std::clamp(n_threads, 1, GGML_MAX_N_THREADS);
  c->block_tokens_ = std::max<int64_t>(1, block_tokens);
  c->backend_.reset(ggml_backend_cpu_init());
  if (!c->backend_) return Fail(ErrorCode::kInternal, "ggml's CPU back end does not start");
  ggml_threadpool_params params;
  ggml_threadpool_params_init(&params, c->n_threads_);
  params.poll = 0;  // idle threads sleep instead of spinning
  c->pool_.reset(ggml_threadpool_new(&params));
  if (!c->pool_) return Fail(ErrorCode::kInternal, "a pool of {} threads does not start", c->n_threads_);
  ggml_backend_cpu_set_n_threads(c->backend_.get(), c->n_threads_);
  ggml_backend_cpu_set_threadpool(c->backend_.get(), c->pool_.get());
  c->block_alloc_.reset(ggml_gallocr_new(ggml_backend_cpu_buffer_type()));
  c->block_nodes_ = NodesPerLayer(c->model_->hparams()) + kFixedNodes;
  c->block_meta_.resize(MetaBytes(c->block_nodes_));
  return c;
}

Expected<void> Compute::Run(ggml_cgraph* graph) {
  const ggml_status status = ggml_backend_graph_compute(backend_.get(), graph);
  if (status == GGML_STATUS_SUCCESS) return {};
  if (status == GGML_STATUS_ALLOC_FAILED)
    return Fail(ErrorCode::kOutOfMemory, "ggml found no memory for its work buffer");
  return Fail(ErrorCode::kInternal, "ggml's graph ended with status {}", static_cast<int>(status));
}

// Builds and runs a graph whose nodes live until the next call; `build` returns the last node.
#define MOEND_BLOCK_GRAPH(ctx, graph)                                                        \
  const ggml_init_params init = {block_meta_.size(), block_meta_.data(), /*no_alloc=*/true}; \
  const std::unique_ptr<ggml_context, GgmlContextDeleter> owner(ggml_init(init));            \
  if (!owner) return Fail(ErrorCode::kOutOfMemory, "ggml found no memory for a graph");      \
  ggml_context* ctx = owner.get();                                                           \
  ggml_cgraph* graph = ggml_new_graph_custom(ctx, static_cast<std::size_t>(block_nodes_), false)

Expected<void> Compute::Embed(std::span<const int32_t> tokens, float* hidden) {
  const HyperParams& hp = model_->hparams();
  for (const int32_t t : tokens)
    if (t < 0 || t >= hp.n_vocab)
      return Fail(ErrorCode::kInvalidArgument, "token {} is not in the vocabulary of {} tokens", t,
                  hp.n_vocab);
  for (std::size_t done = 0; done < tokens.size();) {
    const auto n = std::min(static_cast<int64_t>(tokens.size() - done), block_tokens_);
    MOEND_BLOCK_GRAPH(ctx, graph);
    ggml_tensor* ids = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
    ids->data = const_cast<int32_t*>(tokens.data() + done);
    ggml_tensor* out =
        Borrow(ctx, GGML_TYPE_F32, hp.n_embd, n, hidden + static_cast<int64_t>(done) * hp.n_embd);
    ggml_build_forward_expand(graph, ggml_cpy(ctx, BuildEmbedding(ctx, *model_, ids), out));
    if (!ggml_gallocr_alloc_graph(block_alloc_.get(), graph))
      return Fail(ErrorCode::kOutOfMemory, "no memory for the activations of {} tokens", n);
    MOEND_TRY(Run(graph));
    done += static_cast<std::size_t>(n);
  }
  return {};
}

Expected<void> Compute::Layer(int64_t layer, float* hidden, int64_t n, int64_t first, AttentionHook& hook,
                              float* attn_out) {
  const HyperParams& hp = model_->hparams();
  if (n <= 0) return {};
  std::vector<int32_t> positions(static_cast<std::size_t>(n));
  for (int64_t i = 0; i < n; ++i) positions[static_cast<std::size_t>(i)] = static_cast<int32_t>(first + i);
  HookSlot slot{&hook, layer};
  MOEND_BLOCK_GRAPH(ctx, graph);
  ggml_tensor* x = Borrow(ctx, GGML_TYPE_F32, hp.n_embd, n, hidden);
  ggml_tensor* pos = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
  pos->data = positions.data();
  ggml_tensor* attention = nullptr;
  ggml_tensor* y = BuildLayer(ctx, graph, *model_, layer, x, pos, &slot, attn_out ? &attention : nullptr);
  if (attention) {
    ggml_tensor* copy = Borrow(ctx, GGML_TYPE_F32, attention->ne[0], n, attn_out);
    ggml_build_forward_expand(graph, ggml_cpy(ctx, attention, copy));
  }
  ggml_build_forward_expand(graph, ggml_cpy(ctx, y, x));
  if (!ggml_gallocr_alloc_graph(block_alloc_.get(), graph))
    return Fail(ErrorCode::kOutOfMemory, "no memory for the activations of {} tokens", n);
  return Run(graph);
}

Expected<void> Compute::Head(const float* hidden, int64_t n, float* logits) {
  const HyperParams& hp = model_->hparams();
  for (int64_t done = 0; done < n;) {
    const int64_t m = std::min(n - done, block_tokens_);
    MOEND_BLOCK_GRAPH(ctx, graph);
    ggml_tensor* x = Borrow(ctx, GGML_TYPE_F32, hp.n_embd, m, hidden + done * hp.n_embd);
    // Written where the caller wants them: a copy of so many logits would take as long as a tenth of the
    // product.
    ggml_tensor* out = BuildHead(ctx, *model_, x);
    out->data = logits + done * hp.n_vocab;
    ggml_build_forward_expand(graph, out);
    if (!ggml_gallocr_alloc_graph(block_alloc_.get(), graph))
      return Fail(ErrorCode::kOutOfMemory, "no memory for the logits of {} tokens", m);
    MOEND_TRY(Run(graph));
    done += m;
  }
  return {};
}

Expected<std::unique_ptr<Compute::Graph>> Compute::MakeStep(int64_t n, bool head) {
  const HyperParams& hp = model_->hparams();
  auto g = std::make_unique<Graph>();
  g->n = n;
  g->head = head;
  const int64_t nodes = NodesPerLayer(hp) * hp.n_layers + kFixedNodes;
  g->ctx.reset(ggml_init({MetaBytes(nodes), nullptr, /*no_alloc=*/true}));
  if (!g->ctx) return Fail(ErrorCode::kOutOfMemory, "ggml found no memory for a graph");
  ggml_context* ctx = g->ctx.get();
  g->graph = ggml_new_graph_custom(ctx, static_cast<std::size_t>(nodes), false);
  g->slots.resize(static_cast<std::size_t>(hp.n_layers));
  g->tokens = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
  g->positions = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
  ggml_set_input(g->tokens);
  ggml_set_input(g->positions);
  ggml_build_forward_expand(g->graph, g->positions);  // has memory even if no layer looks at positions
  ggml_tensor* x = BuildEmbedding(ctx, *model_, g->tokens);
  for (int64_t l = 0; l < hp.n_layers; ++l) {
    HookSlot& slot = g->slots[static_cast<std::size_t>(l)];
    slot.layer = l;
    x = BuildLayer(ctx, g->graph, *model_, l, x, g->positions, &slot);
  }
  g->out = head ? BuildHead(ctx, *model_, x) : x;
  ggml_set_output(g->out);
  ggml_build_forward_expand(g->graph, g->out);
  g->alloc.reset(ggml_gallocr_new(ggml_backend_cpu_buffer_type()));
  if (!ggml_gallocr_alloc_graph(g->alloc.get(), g->graph))
    return Fail(ErrorCode::kOutOfMemory, "no memory for the activations of {} contexts", n);
  return g;
}

Expected<const float*> Compute::Step(std::span<const int32_t> tokens, std::span<const int32_t> positions,
                                     AttentionHook& hook) {
  return RunStep(tokens, positions, hook, true);
}

Expected<const float*> Compute::StepHidden(std::span<const int32_t> tokens,
                                           std::span<const int32_t> positions, AttentionHook& hook) {
  return RunStep(tokens, positions, hook, false);
}

Expected<const float*> Compute::RunStep(std::span<const int32_t> tokens, std::span<const int32_t> positions,
                                        AttentionHook& hook, bool head) {
  const auto n = static_cast<int64_t>(tokens.size());
  for (const int32_t t : tokens)
    if (t < 0 || t >= model_->hparams().n_vocab)
      return Fail(ErrorCode::kInvalidArgument, "token {} is not in the vocabulary of {} tokens", t,
                  model_->hparams().n_vocab);
  auto it =
      std::find_if(steps_.begin(), steps_.end(), [&](const auto& g) { return g->n == n && g->head == head; });
  if (it == steps_.end()) {
    MOEND_ASSIGN(auto made, MakeStep(n, head));
    steps_.push_back(std::move(made));
    it = steps_.end() - 1;
  }
  Graph& g = **it;
  for (HookSlot& slot : g.slots) slot.hook = &hook;
  std::memcpy(g.tokens->data, tokens.data(), tokens.size_bytes());
  std::memcpy(g.positions->data, positions.data(), positions.size_bytes());
  MOEND_TRY(Run(g.graph));
  return static_cast<const float*>(g.out->data);
}

Expected<void> Compute::ParallelFor(int64_t n, const std::function<void(int64_t, int)>& fn) {
  if (n <= 0) return {};
  if (n == 1 || n_threads_ == 1) {
    for (int64_t i = 0; i < n; ++i) fn(i, 0);
    return {};
  }
  ParallelJob job{&fn, n};
  float nothing = 0;
  MOEND_BLOCK_GRAPH(ctx, graph);
  ggml_tensor* node =
      ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0, RunJob, GGML_N_TASKS_MAX, &job);
  node->data = &nothing;
  ggml_build_forward_expand(graph, node);
  return Run(graph);
}

}  // namespace moend
