#include "moend/engine/compute.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <limits>

#include "moend/base/caught.h"
#include "moend/model/ggml_guard.h"

namespace moend {
namespace {

constexpr int64_t kFixedNodes = 64;  // inputs, embedding, head, copies
// Batch sizes change by one when a context comes or goes; building a graph anew costs less than a step.
constexpr std::size_t kKeptSteps = 8;

constexpr uint32_t kPoll = 50;  // ggml's own default

// More than ggml's allocator takes for its tables, some of them without a look at what it gets.
constexpr int64_t kTableBytes = int64_t{64} << 10;

int64_t MetaBytes(int64_t nodes) {
  return static_cast<int64_t>(ggml_tensor_overhead() * static_cast<std::size_t>(nodes) +
                              ggml_graph_overhead_custom(static_cast<std::size_t>(nodes), false));
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
  std::atomic<bool> failed{false};
  std::exception_ptr thrown{};  // by the one that set `failed`
};

void RunJob(ggml_tensor*, int ith, int, void* userdata) noexcept {
  auto* job = static_cast<ParallelJob*>(userdata);
  for (int64_t i; (i = job->next.fetch_add(1, std::memory_order_relaxed)) < job->n;) {
    try {
      (*job->fn)(i, ith);
    } catch (...) {
      if (!job->failed.exchange(true)) job->thrown = std::current_exception();
      job->next.store(job->n, std::memory_order_relaxed);  // the rest is in vain
      return;
    }
  }
}

// Ends a graph early whose hook has failed: nothing that follows is of use.
bool InVain(void* hook) {
  return static_cast<const AttentionHook*>(hook)->failed();
}

Expected<std::unique_ptr<ggml_context, GgmlContextDeleter>> MetaContext(Buffer<uint8_t>& memory) {
  std::unique_ptr<ggml_context, GgmlContextDeleter> ctx;
  MOEND_TRY(GuardGgml(GgmlStage::kBuild, [&] {
    ctx.reset(ggml_init({static_cast<std::size_t>(memory.size()), memory.data(), /*no_alloc=*/true}));
  }));
  if (!ctx) return Fail(ErrorCode::kOutOfMemory, "ggml found no memory for a graph");
  return ctx;
}

Expected<std::unique_ptr<ggml_gallocr, GallocrDeleter>> MakeAllocator() {
  std::unique_ptr<ggml_gallocr, GallocrDeleter> made;
  if (HasMemoryFor(kTableBytes))
    MOEND_TRY(
        GuardGgml(GgmlStage::kBuild, [&] { made.reset(ggml_gallocr_new(ggml_backend_cpu_buffer_type())); }));
  if (!made) return Fail(ErrorCode::kOutOfMemory, "ggml found no memory for its tables");
  return made;
}

}  // namespace

struct Compute::Graph {
  Graph() = default;
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() {
    if (memory.bytes > 0) ledger->Remove(memory.bytes);
  }
  std::shared_ptr<Ledger> ledger;
  int64_t n = 0;
  bool head = true;  // ends with the logits; else with the hidden states
  Buffer<uint8_t> meta;
  std::unique_ptr<ggml_context, GgmlContextDeleter> ctx;
  Activations memory;
  ggml_cgraph* graph = nullptr;
  ggml_tensor *tokens = nullptr, *positions = nullptr, *out = nullptr;
  std::vector<HookSlot> slots;
};

Compute::~Compute() {
  // Threads that stay in a graph would be waited for without end.
  if (broken_) static_cast<void>(pool_.release());
}

Expected<std::unique_ptr<Compute>> Compute::Create(std::shared_ptr<const Model> model, int n_threads,
                                                   int64_t block_tokens) {
  std::unique_ptr<Compute> c(new Compute);
  c->model_ = std::move(model);
  c->n_threads_ = std::clamp(n_threads, 1, GGML_MAX_N_THREADS);
  c->block_tokens_ = std::max<int64_t>(1, block_tokens);
  MOEND_TRY(GuardGgml(GgmlStage::kBuild, [] { ggml_cpu_init(); }));
  ggml_threadpool_params params;
  ggml_threadpool_params_init(&params, c->n_threads_);
  // Idle threads sleep instead of spinning; but between the layers of a device they are wanted again at once.
  params.poll = c->model_->device() ? kPoll : 0;
  // The pool's tables are made without a look, too.
  if (HasMemoryFor(c->n_threads_ * int64_t{GGML_MAX_N_THREADS} * 2 + 4096))
    MOEND_TRY(GuardGgml(GgmlStage::kBuild, [&] { c->pool_.reset(ggml_threadpool_new(&params)); }));
  if (!c->pool_) return Fail(ErrorCode::kOutOfMemory, "a pool of {} threads does not start", c->n_threads_);
  c->block_nodes_ = NodesPerLayer(c->model_->hparams()) + kFixedNodes;
  MOEND_ASSIGN(c->block_meta_, Buffer<uint8_t>::Create(c->ledger_, MetaBytes(c->block_nodes_)));
  MOEND_ASSIGN(c->block_context_, MetaContext(c->block_meta_));
  for (Activations* a : {&c->embed_, &c->layer_, &c->observed_layer_, &c->attention_, &c->head_}) {
    MOEND_ASSIGN(a->allocator, MakeAllocator());
  }
  if (c->model_->device()) {
    MOEND_ASSIGN(c->offload_, Offload::Create(c->model_, c->block_tokens_, c->n_threads_));
  }
  MOEND_TRY(c->Reserve());
  return c;
}

// The memory of what every session computes, so that the first prompt finds it.
Expected<void> Compute::Reserve() {
  // Borrowed tensors only need an address here.
  float nothing = 0;
  int32_t none = 0;
  ggml_cplan plan{};
  HookSlot slot;
  ggml_cgraph* graph = EmbedGraph(&none, block_tokens_, &nothing);
  MOEND_TRY(Allocate(embed_, graph, block_tokens_));
  MOEND_TRY(ReserveWork(&plan, graph));
  // Layers may differ: some of them have experts.
  for (slot.layer = 0; slot.layer < model_->hparams().n_layers; ++slot.layer) {
    graph = LayerGraph(&slot, &nothing, block_tokens_, &none, nullptr);
    MOEND_TRY(Allocate(layer_, graph, block_tokens_));
    MOEND_TRY(ReserveWork(&plan, graph));
  }
  graph = HeadGraph(&nothing, 1, &nothing);
  MOEND_TRY(Allocate(head_, graph, 1));
  MOEND_TRY(ReserveWork(&plan, graph));
  if (offload_) return {};
  steps_.reserve(kKeptSteps + 1);
  MOEND_ASSIGN(const Graph* const step, StepOf(1, true));
  return ReserveWork(&plan, step->graph);
}

ggml_cgraph* Compute::NewBlockGraph() {
  ggml_reset(block_context_.get());
  return ggml_new_graph_custom(block_context_.get(), static_cast<std::size_t>(block_nodes_), false);
}

ggml_cgraph* Compute::EmbedGraph(const int32_t* tokens, int64_t n, float* hidden) {
  ggml_cgraph* graph = NewBlockGraph();
  ggml_context* ctx = block_context_.get();
  ggml_tensor* ids = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
  ids->data = const_cast<int32_t*>(tokens);
  ggml_tensor* out = Borrow(ctx, GGML_TYPE_F32, model_->hparams().n_embd, n, hidden);
  ggml_build_forward_expand(graph, ggml_cpy(ctx, BuildEmbedding(ctx, *model_, ids), out));
  return graph;
}

ggml_cgraph* Compute::LayerGraph(HookSlot* slot, float* hidden, int64_t n, const int32_t* positions,
                                 float* attn_out) {
  ggml_cgraph* graph = NewBlockGraph();
  ggml_context* ctx = block_context_.get();
  ggml_tensor* x = Borrow(ctx, GGML_TYPE_F32, model_->hparams().n_embd, n, hidden);
  ggml_tensor* pos = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
  pos->data = const_cast<int32_t*>(positions);
  ggml_tensor* attention = nullptr;
  ggml_tensor* y =
      BuildLayer(ctx, graph, *model_, slot->layer, x, pos, slot, attn_out ? &attention : nullptr);
  if (attention) {
    ggml_tensor* copy = Borrow(ctx, GGML_TYPE_F32, attention->ne[0], n, attn_out);
    ggml_build_forward_expand(graph, ggml_cpy(ctx, attention, copy));
  }
  ggml_build_forward_expand(graph, ggml_cpy(ctx, y, x));
  return graph;
}

ggml_cgraph* Compute::AttentionGraph(HookSlot* slot, const float* q, const float* k, const float* v,
                                     int64_t n, float* out) {
  const HyperParams& hp = model_->hparams();
  ggml_cgraph* graph = NewBlockGraph();
  ggml_context* ctx = block_context_.get();
  const auto rows = [&](const float* data, int64_t heads) {
    ggml_tensor* t = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, hp.head_size, heads, n);
    t->data = const_cast<float*>(data);
    return t;
  };
  ggml_tensor* attended =
      BuildAttention(ctx, slot, rows(q, hp.n_heads), rows(k, hp.n_kv_heads), rows(v, hp.n_kv_heads));
  attended->data = out;
  ggml_build_forward_expand(graph, attended);
  return graph;
}

ggml_cgraph* Compute::HeadGraph(const float* hidden, int64_t n, float* logits) {
  const HyperParams& hp = model_->hparams();
  ggml_cgraph* graph = NewBlockGraph();
  ggml_context* ctx = block_context_.get();
  ggml_tensor* x = Borrow(ctx, GGML_TYPE_F32, hp.n_embd, n, hidden);
  // Written where the caller wants them: a copy of so many logits would take as long as a tenth of the
  // product.
  ggml_tensor* out = BuildHead(ctx, hp, model_->weights().head, x);
  out->data = logits;
  ggml_build_forward_expand(graph, out);
  return graph;
}

Expected<void> Compute::Allocate(Activations& from, ggml_cgraph* graph, int64_t n) {
  bool done = false;
  if (!HasMemoryFor(kTableBytes)) return Fail(ErrorCode::kOutOfMemory, "no memory for a graph's tables");
  if (!from.allocator) {
    MOEND_ASSIGN(from.allocator, MakeAllocator());
  }
  const auto guarded =
      GuardGgml(GgmlStage::kBuild, [&] { done = ggml_gallocr_alloc_graph(from.allocator.get(), graph); });
  if (!guarded) static_cast<void>(from.allocator.release());  // half made
  if (!done) from.allocator.reset();                          // its tables know memory that is not there
  if (from.bytes > 0) ledger_->Remove(from.bytes);
  from.bytes =
      done ? static_cast<int64_t>(ggml_gallocr_get_buffer_size(from.allocator.get(), 0)) : int64_t{0};
  if (from.bytes > 0) ledger_->Add(from.bytes);
  if (!done) return Fail(ErrorCode::kOutOfMemory, "no memory for the activations of {} tokens", n);
  return {};
}

Expected<void> Compute::ReserveWork(ggml_cplan* plan, const ggml_cgraph* graph) {
  *plan = ggml_graph_plan(graph, n_threads_, pool_.get());
  if (const auto needed = static_cast<int64_t>(plan->work_size); needed > work_.size()) {
    work_ = {};
    MOEND_ASSIGN(work_, Buffer<uint8_t>::Create(ledger_, needed));
  }
  plan->work_data = work_.data();
  return {};
}

Expected<void> Compute::Run(ggml_cgraph* graph, AttentionHook* hook) {
  if (broken_)
    return Fail(ErrorCode::kInternal,
                "a computation broke off within ggml; the engine cannot be used further");
  ggml_cplan plan;
  MOEND_TRY(ReserveWork(&plan, graph));
  if (hook) {
    plan.abort_callback = InVain;
    plan.abort_callback_data = hook;
  }
  ggml_status status = GGML_STATUS_FAILED;
  try {
    MOEND_TRY(GuardGgml(GgmlStage::kStart, [&] { status = ggml_graph_compute(graph, &plan); }));
  } catch (...) {  // nothing of ours throws in there
    broken_ = true;
    return std::unexpected(ErrorOf(std::current_exception(), "computing"));
  }
  if (hook) MOEND_TRY(hook->TakeError());
  if (status == GGML_STATUS_SUCCESS) return {};
  return Fail(ErrorCode::kInternal, "ggml's graph ended with status {}", static_cast<int>(status));
}

Expected<void> Compute::Embed(std::span<const int32_t> tokens, float* hidden) {
  const HyperParams& hp = model_->hparams();
  for (const int32_t t : tokens)
    if (t < 0 || t >= hp.n_vocab)
      return Fail(ErrorCode::kInvalidArgument, "token {} is not in the vocabulary of {} tokens", t,
                  hp.n_vocab);
  for (std::size_t done = 0; done < tokens.size();) {
    const auto n = std::min(static_cast<int64_t>(tokens.size() - done), block_tokens_);
    ggml_cgraph* graph = EmbedGraph(tokens.data() + done, n, hidden + static_cast<int64_t>(done) * hp.n_embd);
    MOEND_TRY(Allocate(embed_, graph, n));
    MOEND_TRY(Run(graph));
    done += static_cast<std::size_t>(n);
  }
  return {};
}

// The host's part in a layer that lies on a device.
class Compute::HookHost : public Offload::Host {
 public:
  HookHost(Compute& compute, AttentionHook& hook) : compute_(compute), hook_(hook) {}
  HookHost(Compute& compute, DecodeHook& hook) : compute_(compute), hook_(hook), decode_(&hook) {}

  std::optional<AttentionHook::OwnTokens> SeesOnlyOwn(int64_t n) override { return hook_.SeesOnlyOwn(n); }

  Expected<void> Store(int64_t layer, const float* q, const float* k, const float* v, int64_t n) override {
    return Caught("storing keys and values", [&]() -> Expected<void> {
      Expected<void> done;
      hook_.StoreApart(layer, q, k, v, n, EachOnPool(done));
      MOEND_TRY(done);
      return hook_.TakeError();
    });
  }

  std::function<Expected<void>(const float*)> StoreLater(int64_t layer, int64_t n) override {
    return [&compute = compute_, &hook = hook_, layer, n](const float* qkv) {
      const HyperParams& hp = compute.model().hparams();
      const float* const k = qkv + n * hp.n_heads * hp.head_size;
      return HookHost(compute, hook).Store(layer, qkv, k, k + n * hp.n_kv_heads * hp.head_size, n);
    };
  }

  std::span<const DecodeContext> Contexts() override {
    return decode_ ? decode_->contexts() : std::span<const DecodeContext>();
  }

  Parallel Threads() override { return compute_.Threads(); }

  Expected<void> StoreStep(int64_t begin, int64_t end, const float* rows, int64_t stride,
                           int64_t n) override {
    return Caught("storing keys and values", [&]() -> Expected<void> {
      Expected<void> done;
      decode_->StoreStep(begin, end, rows, stride, n, EachOnPool(done));
      MOEND_TRY(done);
      return hook_.TakeError();
    });
  }

  Expected<void> Attend(int64_t layer, const float* q, const float* k, const float* v, float* out,
                        int64_t n) override {
    HookSlot slot{&hook_, layer, decode_ != nullptr};
    ggml_cgraph* graph = compute_.AttentionGraph(&slot, q, k, v, n, out);
    MOEND_TRY(compute_.Allocate(compute_.attention_, graph, n));
    return compute_.Run(graph, &hook_);
  }

 private:
  AttentionHook::Each EachOnPool(Expected<void>& done) {
    return [&](int64_t count, const std::function<void(int64_t)>& f) {
      done = compute_.ParallelFor(count, [&](int64_t i, int) { f(i); });
    };
  }

  Compute& compute_;
  AttentionHook& hook_;
  DecodeHook* decode_ = nullptr;  // if this is a decode step
};

Expected<void> Compute::Layer(int64_t layer, float* hidden, int64_t n, int64_t first, AttentionHook& hook,
                              float* attn_out) {
  if (n <= 0) return {};
  std::vector<int32_t> positions(static_cast<std::size_t>(n));
  for (int64_t i = 0; i < n; ++i) positions[static_cast<std::size_t>(i)] = static_cast<int32_t>(first + i);
  if (offload_ && offload_->holds(layer)) {
    HookHost host(*this, hook);
    return offload_->Run(layer, layer + 1, hidden, positions, host, nullptr, attn_out, false);
  }
  HookSlot slot{&hook, layer};
  const std::span<const float> rows(hidden, static_cast<std::size_t>(n * model_->hparams().n_embd));
  MOEND_TRY(Fetch(rows));
  MOEND_TRY(RunLayerHere(slot, hidden, positions, attn_out));
  if (offload_) offload_->Changed(rows);
  return {};
}

Compute::OnDevice::OnDevice(Compute& compute, std::span<float> hidden)
    : offload_(compute.offload_.get()), hidden_(hidden.data()) {
  if (offload_) offload_->Keep(hidden);
}

Compute::OnDevice::~OnDevice() {
  if (offload_) offload_->Forget(hidden_);
}

Expected<void> Compute::Fetch(std::span<const float> rows) {
  return offload_ ? offload_->Fetch(rows) : Expected<void>();
}

Expected<void> Compute::Mirror(const DecodeContext& context, int64_t layer) {
  if (!offload_) return {};
  return offload_->Mirror(context, layer, Threads());
}

Expected<void> Compute::Settle() {
  return offload_ ? offload_->Settle() : Expected<void>();
}

Parallel Compute::Threads() {
  return {n_threads_, [this](int64_t n, const auto& f) { return ParallelFor(n, f); }};
}

Expected<void> Compute::RunLayerHere(HookSlot& slot, float* hidden, std::span<const int32_t> positions,
                                     float* attn_out) {
  const auto n = std::ssize(positions);
  ggml_cgraph* graph = LayerGraph(&slot, hidden, n, positions.data(), attn_out);
  MOEND_TRY(Allocate(attn_out ? observed_layer_ : layer_, graph, n));
  return Run(graph, slot.hook);
}

Expected<void> Compute::Head(const float* hidden, int64_t n, float* logits) {
  const HyperParams& hp = model_->hparams();
  if (offload_) {
    MOEND_TRY(offload_->Head(hidden, n, logits));
    return CheckFinite({logits, static_cast<std::size_t>(n * hp.n_vocab)});
  }
  for (int64_t done = 0; done < n;) {
    const int64_t m = std::min(n - done, block_tokens_);
    ggml_cgraph* graph = HeadGraph(hidden + done * hp.n_embd, m, logits + done * hp.n_vocab);
    MOEND_TRY(Allocate(head_, graph, m));
    MOEND_TRY(Run(graph));
    MOEND_TRY(CheckFinite({logits + done * hp.n_vocab, static_cast<std::size_t>(m * hp.n_vocab)}));
    done += m;
  }
  return {};
}

Expected<void> Compute::CheckFinite(std::span<const float> logits) const {
  // Without their signs, what is not finite has the largest bits. So it takes a few instructions a vector.
  int32_t most = 0;
  for (const float x : logits) most = std::max(most, std::bit_cast<int32_t>(x) & INT32_MAX);
  if (most < std::bit_cast<int32_t>(std::numeric_limits<float>::infinity())) return {};
  return Fail(ErrorCode::kInternal,
              "the model's logits are not finite numbers; its file is damaged, or its weights overflow");
}

Expected<std::unique_ptr<Compute::Graph>> Compute::MakeStep(int64_t n, bool head) {
  const HyperParams& hp = model_->hparams();
  auto g = std::make_unique<Graph>();
  g->ledger = ledger_;
  g->n = n;
  g->head = head;
  const int64_t nodes = NodesPerLayer(hp) * hp.n_layers + kFixedNodes;
  g->slots.resize(static_cast<std::size_t>(hp.n_layers));
  MOEND_ASSIGN(g->meta, Buffer<uint8_t>::Create(ledger_, MetaBytes(nodes)));
  MOEND_ASSIGN(g->ctx, MetaContext(g->meta));
  ggml_context* ctx = g->ctx.get();
  g->graph = ggml_new_graph_custom(ctx, static_cast<std::size_t>(nodes), false);
  g->tokens = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
  g->positions = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
  ggml_set_input(g->tokens);
  ggml_set_input(g->positions);
  ggml_build_forward_expand(g->graph, g->positions);  // has memory even if no layer looks at positions
  ggml_tensor* x = BuildEmbedding(ctx, *model_, g->tokens);
  for (int64_t l = 0; l < hp.n_layers; ++l) {
    HookSlot& slot = g->slots[static_cast<std::size_t>(l)];
    slot.layer = l;
    slot.one_token_each = true;
    x = BuildLayer(ctx, g->graph, *model_, l, x, g->positions, &slot);
  }
  g->out = head ? BuildHead(ctx, hp, model_->weights().head, x) : x;
  ggml_set_output(g->out);
  ggml_build_forward_expand(g->graph, g->out);
  MOEND_TRY(Allocate(g->memory, g->graph, n));
  return g;
}

Expected<Compute::Graph*> Compute::StepOf(int64_t n, bool head) {
  auto it =
      std::find_if(steps_.begin(), steps_.end(), [&](const auto& g) { return g->n == n && g->head == head; });
  if (it == steps_.end()) {
    if (steps_.size() >= kKeptSteps) steps_.erase(steps_.begin());
    MOEND_ASSIGN(auto made, MakeStep(n, head));
    steps_.push_back(std::move(made));
  } else {
    std::rotate(it, it + 1, steps_.end());
  }
  return steps_.back().get();
}

Expected<const float*> Compute::Step(std::span<const int32_t> tokens, std::span<const int32_t> positions,
                                     DecodeHook& hook) {
  return RunStep(tokens, positions, hook, true);
}

Expected<const float*> Compute::StepHidden(std::span<const int32_t> tokens,
                                           std::span<const int32_t> positions, DecodeHook& hook) {
  return RunStep(tokens, positions, hook, false);
}

Expected<const float*> Compute::RunStep(std::span<const int32_t> tokens, std::span<const int32_t> positions,
                                        DecodeHook& hook, bool head) {
  for (const int32_t t : tokens)
    if (t < 0 || t >= model_->hparams().n_vocab)
      return Fail(ErrorCode::kInvalidArgument, "token {} is not in the vocabulary of {} tokens", t,
                  model_->hparams().n_vocab);
  if (offload_) return RunStepAcross(tokens, positions, hook, head);
  MOEND_ASSIGN(Graph* const g, StepOf(std::ssize(tokens), head));
  for (HookSlot& slot : g->slots) slot.hook = &hook;
  std::memcpy(g->tokens->data, tokens.data(), tokens.size_bytes());
  std::memcpy(g->positions->data, positions.data(), positions.size_bytes());
  MOEND_TRY(Run(g->graph, &hook));
  return static_cast<const float*>(g->out->data);
}

Expected<const float*> Compute::RunStepAcross(std::span<const int32_t> tokens,
                                              std::span<const int32_t> positions, DecodeHook& hook,
                                              bool head) {
  const HyperParams& hp = model_->hparams();
  hidden_.resize(tokens.size() * static_cast<std::size_t>(hp.n_embd));
  float* const logits = head ? offload_->StepLogits(std::ssize(tokens)) : nullptr;
  MOEND_TRY(Embed(tokens, hidden_.data()));
  HookHost host(*this, hook);
  bool done = false;  // with the logits
  for (int64_t l = 0; l < hp.n_layers;) {
    if (!offload_->holds(l)) {
      HookSlot slot{&hook, l, true};
      MOEND_TRY(RunLayerHere(slot, hidden_.data(), positions, nullptr));
      ++l;
      continue;
    }
    const int64_t begin = l;
    while (l < hp.n_layers && offload_->holds(l)) ++l;
    done = head && l == hp.n_layers;
    MOEND_TRY(
        offload_->Run(begin, l, hidden_.data(), positions, host, done ? logits : nullptr, nullptr, true));
  }
  if (!head) return hidden_.data();
  if (!done) MOEND_TRY(offload_->Head(hidden_.data(), std::ssize(tokens), logits));
  return logits;
}

Expected<void> Compute::ParallelFor(int64_t n, const std::function<void(int64_t, int)>& fn) {
  if (n <= 0) return {};
  ParallelJob job{&fn, n};
  if (n == 1 || n_threads_ == 1) {
    RunJob(nullptr, 0, 1, &job);
  } else {
    float nothing = 0;
    ggml_cgraph* graph = NewBlockGraph();
    ggml_tensor* node = ggml_custom_4d(block_context_.get(), GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0, RunJob,
                                       GGML_N_TASKS_MAX, &job);
    node->data = &nothing;
    ggml_build_forward_expand(graph, node);
    MOEND_TRY(Run(graph));
  }
  if (job.failed) return std::unexpected(ErrorOf(job.thrown));
  return {};
}

}  // namespace moend
