#include "moend/engine/offload.h"

#include <ggml-alloc.h>
#include <ggml-backend.h>

#include <algorithm>
#include <cstring>

#include "moend/model/ggml_guard.h"

namespace moend {
namespace {

// Batch sizes change by one when a context comes or goes.
constexpr std::size_t kKeptSteps = 8;
constexpr int64_t kLeastRows = 512;  // that fit at once, however small the blocks are
constexpr int64_t kFixedNodes = 64;  // views and copies of a segment

// The first rows of a tensor of rows.
ggml_tensor* First(ggml_context* ctx, ggml_tensor* t, int64_t n) {
  return ggml_view_2d(ctx, t, t->ne[0], n, t->nb[1], 0);
}

// Waits for the device unless all went well.
class QuietOnError {
 public:
  explicit QuietOnError(ggml_backend_t backend) : backend_(backend) {}
  ~QuietOnError() {
    if (!well) ggml_backend_synchronize(backend_);
  }
  QuietOnError(const QuietOnError&) = delete;
  QuietOnError& operator=(const QuietOnError&) = delete;
  bool well = false;

 private:
  ggml_backend_t backend_;
};

std::size_t FloatBytes(int64_t n) {
  return static_cast<std::size_t>(n) * sizeof(float);
}

}  // namespace

Offload::Offload(std::shared_ptr<const Model> model, int64_t most_rows)
    : model_(std::move(model)), h_(model_->hparams()), weights_(*model_->device()), most_rows_(most_rows) {}

Expected<std::unique_ptr<Offload>> Offload::Create(std::shared_ptr<const Model> model, int64_t block_tokens,
                                                   int n_threads) {
  std::unique_ptr<Offload> o(new Offload(std::move(model), std::max(block_tokens, kLeastRows)));
  const ggml_backend_dev_t device = o->weights_.device;
  o->backend_.reset(ggml_backend_dev_init(device, nullptr));
  if (!o->backend_)
    return Fail(ErrorCode::kUnsupported, "the device {} does not start; -ngl 0 runs the model on the CPU",
                ggml_backend_dev_name(device));
  const auto set_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(
      ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_set_n_threads"));
  if (set_threads) set_threads(o->backend_.get(), n_threads);
  MOEND_TRY(o->MakeRows());
  const ggml_backend_buffer_type_t type = ggml_backend_dev_buffer_type(device);
  for (ggml_gallocr_ptr* memory : {&o->block_memory_[0], &o->block_memory_[1], &o->head_memory_})
    memory->reset(ggml_gallocr_new(type));
  o->own_.Init(o->h_, device, o->most_rows_);
  MOEND_TRY(o->CheckSupport());
  o->MakeKernels();
  return o;
}

Expected<void> Offload::MakeRows() {
  const auto no_memory = [&](const char* whose) {
    return Fail(ErrorCode::kOutOfMemory, "no memory of {} for the rows of {} tokens; give a smaller -ngl",
                whose, most_rows_);
  };
  rows_context_ = DescribeTensors(8);
  if (!rows_context_) return no_memory("the host");
  const auto rows = [&](ggml_type type, int64_t width) {
    return ggml_new_tensor_2d(rows_context_.get(), type, width, most_rows_);
  };
  const int64_t attended = h_.n_heads * h_.head_size;
  rows_.x = rows(GGML_TYPE_F32, h_.n_embd);
  rows_.qkv = rows(GGML_TYPE_F32, QkvFloats());
  rows_.attended = rows(GGML_TYPE_F32, attended);
  rows_.gate = rows(GGML_TYPE_F32, std::ranges::any_of(h_.layers, &LayerParams::output_gate) ? attended : 1);
  rows_.positions = rows(GGML_TYPE_I32, 1);
  rows_.temperature = rows(GGML_TYPE_F32, 1);
  rows_buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(rows_context_.get(),
                                                              ggml_backend_dev_buffer_type(weights_.device)));
  if (!rows_buffer_) return no_memory(ggml_backend_dev_name(weights_.device));

  if (!host_rows_.Reserve(weights_.device, most_rows_ * (h_.n_embd + 2 * QkvFloats() + attended)))
    return no_memory("the host");
  host_x_ = host_rows_.data();
  host_qkv_ = host_x_ + most_rows_ * h_.n_embd;
  host_attended_ = host_qkv_ + 2 * most_rows_ * QkvFloats();
  return {};
}

bool Offload::HostFloats::Reserve(ggml_backend_dev_t device, int64_t floats) {
  if (floats <= size_) return true;
  buffer_.reset();
  plain_ = {};
  data_ = nullptr;
  size_ = 0;
  if (const ggml_backend_buffer_type_t type = ggml_backend_dev_host_buffer_type(device)) {
    buffer_.reset(ggml_backend_buft_alloc_buffer(type, FloatBytes(floats)));
    if (buffer_) data_ = static_cast<float*>(ggml_backend_buffer_get_base(buffer_.get()));
  }
  if (!data_) {
    plain_.resize(static_cast<std::size_t>(floats));
    data_ = plain_.data();
  }
  size_ = floats;
  return true;
}

float* Offload::StepLogits(int64_t n) {
  return host_logits_.Reserve(weights_.device, n * h_.n_vocab) ? host_logits_.data() : nullptr;
}

std::unique_ptr<cuda::Runtime> Offload::MakeRuntime() const {
  ggml_backend_dev_props props;
  ggml_backend_dev_get_props(weights_.device, &props);
  if (props.type == GGML_BACKEND_DEVICE_TYPE_CPU) return cuda::MakeHostRuntime();
  if (!props.device_id ||
      std::string_view(ggml_backend_reg_name(ggml_backend_dev_backend_reg(weights_.device))) != "CUDA")
    return nullptr;
  auto made = cuda::MakeCudaRuntime(props.device_id);
  return made ? std::move(*made) : nullptr;
}

void Offload::MakeKernels() {
  fetcher_ = MakeRuntime();
  if (!fetcher_) return;
  fetch_order_ = std::make_unique<DeviceOrder>(backend_.get(), *fetcher_);
  auto runtime = MakeRuntime();
  if (!runtime) return;
  auto caches = DeviceCaches::Create(model_, std::move(runtime));
  if (!caches) return;
  caches_ = std::move(*caches);
  order_ = std::make_unique<DeviceOrder>(backend_.get(), caches_->runtime());
}

Expected<void> Offload::AttendThere(int64_t layer, float* rows) {
  const ggml_tensor* const sinks = weights_.layers[static_cast<std::size_t>(layer)].sinks;
  MOEND_TRY(order_->ToKernels());
  MOEND_TRY(caches_->Attend(layer, static_cast<const float*>(rows_.qkv->data),
                            sinks ? static_cast<const float*>(sinks->data) : nullptr,
                            static_cast<float*>(rows_.attended->data), rows));
  return order_->ToGraphs();
}

Expected<void> Offload::Mirror(const DecodeContext& context, int64_t layer, const Parallel& parallel) {
  if (!caches_ || !holds(layer)) return {};
  // If there is no memory now, it will be asked for when it is needed.
  auto there = caches_->Prepare({&context, 1}, layer, layer + 1, parallel);
  return there ? Expected<void>() : Forward(there);
}

Expected<void> Offload::CheckSupport() {
  for (int64_t l = weights_.first_layer; l <= h_.n_layers; ++l) {
    if (l < h_.n_layers && !holds(l)) continue;
    for (const int64_t n : {int64_t{1}, most_rows_}) {
      std::vector<Segment> segments;
      if (l == h_.n_layers) {
        MOEND_ASSIGN(Segment head, MakeSegment(l, l, l, n, true, nullptr, rows_.x, 0));
        segments.push_back(std::move(head));
      }
      for (int64_t part = 0; l < h_.n_layers && part < 2; ++part) {
        MOEND_ASSIGN(Segment made, MakeSegment(l + part, l, l + 1, n, false, nullptr, rows_.x, 0));
        segments.push_back(std::move(made));
      }
      for (const Segment& s : segments)
        for (int i = 0; i < ggml_graph_n_nodes(s.graph); ++i)
          if (const ggml_tensor* node = ggml_graph_node(s.graph, i);
              !ggml_backend_dev_supports_op(weights_.device, node))
            return Fail(ErrorCode::kUnsupported,
                        "{} cannot compute {} with {}, {}, which {} needs; -ngl {} leaves it to the CPU",
                        ggml_backend_dev_name(weights_.device), ggml_op_desc(node),
                        node->src[0] ? node->src[0]->name : "nothing",
                        node->src[0] ? ggml_type_name(node->src[0]->type) : "no type",
                        l == h_.n_layers ? std::string("the output") : fmt::format("layer {}", l),
                        h_.n_layers - l);
    }
  }
  return {};
}

Expected<Offload::Segment> Offload::MakeSegment(int64_t l, int64_t begin, int64_t end, int64_t n, bool head,
                                                const OwnAttention::Block* own, ggml_tensor* hidden,
                                                int64_t first_row) {
  const int64_t nodes = 2 * NodesPerLayer(h_) + kFixedNodes;
  Segment s;
  s.ctx.reset(ggml_init({ggml_tensor_overhead() * static_cast<std::size_t>(nodes) +
                             ggml_graph_overhead_custom(static_cast<std::size_t>(nodes), false),
                         nullptr, /*no_alloc=*/true}));
  if (!s.ctx) return Fail(ErrorCode::kOutOfMemory, "no memory for a graph");
  ggml_context* ctx = s.ctx.get();
  s.graph = ggml_new_graph_custom(ctx, static_cast<std::size_t>(nodes), false);
  const int64_t q_width = h_.n_heads * h_.head_size, kv_width = h_.n_kv_heads * h_.head_size;
  // q, k and v lie behind one another, so that they reach the host in one copy.
  const auto part = [&](int64_t first, int64_t heads) {
    return ggml_view_3d(ctx, rows_.qkv, h_.head_size, heads, n, FloatBytes(h_.head_size),
                        FloatBytes(h_.head_size * heads), FloatBytes(first));
  };
  ggml_tensor* const q = part(0, h_.n_heads);
  ggml_tensor* const k = part(n * q_width, h_.n_kv_heads);
  ggml_tensor* const v = part(n * (q_width + kv_width), h_.n_kv_heads);
  ggml_tensor* const in = ggml_view_2d(ctx, hidden, h_.n_embd, n, hidden->nb[1],
                                       static_cast<std::size_t>(first_row) * hidden->nb[1]);
  ggml_tensor* x = in;
  if (l > begin) {
    const LayerParams& p = h_.layers[static_cast<std::size_t>(l - 1)];
    const LayerWeights& w = weights_.layers[static_cast<std::size_t>(l - 1)];
    ggml_tensor* attended =
        own ? own_.Build(ctx, s.graph, p, w, *own, q, k, v) : First(ctx, rows_.attended, n);
    if (own) ggml_build_forward_expand(s.graph, ggml_cpy(ctx, attended, First(ctx, rows_.attended, n)));
    x = BuildAfterAttention(ctx, s.graph, h_, p, w, x, attended,
                            p.output_gate ? First(ctx, rows_.gate, n) : nullptr);
    ggml_build_forward_expand(s.graph, x);
  }
  if (l < end) {
    const LayerParams& p = h_.layers[static_cast<std::size_t>(l)];
    ggml_tensor* temperature = h_.query_temperature.scale == 0
                                   ? nullptr
                                   : ggml_reshape_3d(ctx, First(ctx, rows_.temperature, n), 1, 1, n);
    const AttentionInputs made =
        BuildAttentionInputs(ctx, h_, p, weights_.layers[static_cast<std::size_t>(l)], x,
                             ggml_view_1d(ctx, rows_.positions, n, 0), temperature);
    for (const auto& [from, to] : {std::pair(made.q, q), std::pair(made.k, k), std::pair(made.v, v)})
      ggml_build_forward_expand(s.graph, ggml_cpy(ctx, from, to));
    if (made.gate) ggml_build_forward_expand(s.graph, ggml_cpy(ctx, made.gate, First(ctx, rows_.gate, n)));
  } else if (head) {
    s.logits = BuildHead(ctx, h_, weights_.head, x);
    ggml_set_output(s.logits);
    ggml_build_forward_expand(s.graph, s.logits);
    return s;
  }
  if (x != in) ggml_build_forward_expand(s.graph, ggml_cpy(ctx, x, in));
  return s;
}

Expected<Offload::Steps*> Offload::StepsOf(int64_t begin, int64_t end, int64_t n, bool head) {
  auto it = std::ranges::find_if(steps_, [&](const auto& s) {
    return s->n == n && s->begin == begin && s->end == end && s->head == head;
  });
  if (it != steps_.end()) {
    std::rotate(it, it + 1, steps_.end());
    return steps_.back().get();
  }
  if (steps_.size() >= kKeptSteps) steps_.erase(steps_.begin());
  auto made = std::make_unique<Steps>();
  made->n = n, made->begin = begin, made->end = end, made->head = head;
  made->memory.reset(ggml_gallocr_new(ggml_backend_dev_buffer_type(weights_.device)));
  for (int64_t l = begin; l <= end; ++l) {
    MOEND_ASSIGN(Segment s, MakeSegment(l, begin, end, n, head, nullptr, rows_.x, 0));
    made->segments.push_back(std::move(s));
  }
  // They run one after the other in the same memory: the largest makes it, so that none moves it later.
  for (const Segment& s : made->segments)
    if (!ggml_gallocr_reserve(made->memory.get(), s.graph))
      return Fail(ErrorCode::kOutOfMemory, "{} has no memory for a step of {} tokens",
                  ggml_backend_dev_name(weights_.device), n);
  for (const Segment& s : made->segments) MOEND_TRY(Allocate(made->memory.get(), s.graph));
  steps_.push_back(std::move(made));
  return steps_.back().get();
}

Expected<void> Offload::Allocate(ggml_gallocr* memory, ggml_cgraph* graph) {
  bool done = false;
  MOEND_TRY(GuardGgml(GgmlStage::kBuild, [&] { done = ggml_gallocr_alloc_graph(memory, graph); }));
  if (done) return {};
  return Fail(ErrorCode::kOutOfMemory, "{} has no memory for activations; give a smaller -ngl",
              ggml_backend_dev_name(weights_.device));
}

Expected<void> Offload::Start(ggml_cgraph* graph) {
  const ggml_status status = ggml_backend_graph_compute_async(backend_.get(), graph);
  if (status == GGML_STATUS_SUCCESS) return {};
  return Fail(status == GGML_STATUS_ALLOC_FAILED ? ErrorCode::kOutOfMemory : ErrorCode::kInternal,
              "a graph on {} ended with status {}", ggml_backend_dev_name(weights_.device),
              static_cast<int>(status));
}

void Offload::Send(ggml_tensor* to, const void* from, std::size_t bytes) {
  ggml_backend_tensor_set_async(backend_.get(), to, from, 0, bytes);
}

Expected<void> Offload::Run(int64_t begin, int64_t end, float* hidden, std::span<const int32_t> positions,
                            Host& host, float* logits, float* attn_out, bool keep) {
  const auto n = std::ssize(positions);
  if (n > most_rows_)
    return Fail(ErrorCode::kInvalidArgument, "{} tokens in one step; {} are possible", n, most_rows_);
  const int64_t q_floats = n * h_.n_heads * h_.head_size, kv_floats = n * h_.n_kv_heads * h_.head_size;
  const std::size_t x_bytes = FloatBytes(n * h_.n_embd);
  if (pending_ && (keep || pending_->layer != begin)) MOEND_TRY(Settle());
  QuietOnError quiet(backend_.get());
  int64_t first_row = 0;
  Kept* const kept = keep ? nullptr : KeptOf(hidden, &first_row);
  ggml_tensor* const x = kept ? kept->x : rows_.x;
  const auto row = [&](int64_t i) { return static_cast<std::size_t>(first_row + i); };
  if (!kept || !kept->there[row(0)]) {
    std::memcpy(host_x_, hidden, x_bytes);
    ggml_backend_tensor_set_async(backend_.get(), x, host_x_, row(0) * x->nb[1], x_bytes);
  }
  Send(rows_.positions, positions.data(), positions.size_bytes());
  std::vector<float> temperature;
  if (h_.query_temperature.scale != 0) {
    for (const int32_t at : positions) temperature.push_back(h_.query_temperature.factor(at));
    Send(rows_.temperature, temperature.data(), FloatBytes(n));
  }
  Steps* steps = nullptr;
  // q, k and v of all layers, there and here, if the device attends to them by itself.
  float *rows = nullptr, *host_rows = nullptr;
  const int64_t row_floats = (end - begin) * n * QkvFloats();
  if (keep) {
    MOEND_ASSIGN(steps, StepsOf(begin, end, n, logits != nullptr));
    if (const auto contexts = host.Contexts(); caches_ && std::ssize(contexts) == n) {
      MOEND_ASSIGN(const bool attends, caches_->Prepare(contexts, begin, end, host.Threads()));
      host_rows = attends ? caches_->HostRows(row_floats) : nullptr;
      rows = host_rows ? caches_->Rows(row_floats) : nullptr;
    }
  }
  Segment made;
  std::optional<OwnAttention::Block> own;  // of the layer before
  ggml_tensor* result = nullptr;
  for (int64_t l = begin; l <= end; ++l) {
    const Segment* segment = nullptr;
    if (steps) {
      segment = &steps->segments[static_cast<std::size_t>(l - begin)];
    } else {
      MOEND_ASSIGN(made,
                   MakeSegment(l, begin, end, n, logits != nullptr, own ? &*own : nullptr, x, first_row));
      MOEND_TRY(Allocate(block_memory_[l == begin ? 0 : 1].get(), made.graph));
      segment = &made;
    }
    MOEND_TRY(Start(segment->graph));
    result = segment->logits;
    if (own) {
      // Beside the device's attention: what follows of the layer before is on its way.
      if (fetcher_) {
        MOEND_TRY(fetch_order_->ToGraphs());  // the next q, k and v take the place of these
        auto before = std::exchange(pending_, Pending{l - 1, n, next_qkv_, host.StoreLater(l - 1, n)});
        next_qkv_ = 1 - next_qkv_;
        if (before) MOEND_TRY(before->store(HostQkv(before->buffer)));
        if (!kept) MOEND_TRY(Settle());
      } else {
        MOEND_TRY(host.Store(l - 1, host_qkv_, host_qkv_ + q_floats, host_qkv_ + q_floats + kv_floats, n));
      }
      own.reset();
    }
    if (l == end) break;
    const int64_t waiting = pending_ ? pending_->n : 0;  // tokens that the host does not know of yet
    if (auto seen = fetcher_ && !steps ? host.SeesOnlyOwn(waiting + n) : std::nullopt) {
      seen->before += waiting;
      own = own_.Prepare(h_.layers[static_cast<std::size_t>(l)], *seen, n);
      if (own) {
        // Beside what follows, which only reads. What was fetched before is there then, too.
        MOEND_TRY(fetcher_->Synchronize());
        const int64_t skipped = seen->queries ? 0 : q_floats;
        MOEND_TRY(fetch_order_->ToKernels());
        MOEND_TRY(fetcher_->Fetch(HostQkv(next_qkv_) + skipped,
                                  static_cast<const float*>(rows_.qkv->data) + skipped,
                                  FloatBytes(q_floats + 2 * kv_floats - skipped)));
        continue;
      }
    }
    if (rows) {
      MOEND_TRY(AttendThere(l, rows + (l - begin) * n * QkvFloats()));
      continue;
    }
    MOEND_TRY(Settle());
    ggml_backend_tensor_get_async(backend_.get(), rows_.qkv, host_qkv_, 0,
                                  FloatBytes(q_floats + 2 * kv_floats));
    ggml_backend_synchronize(backend_.get());
    if (!steps && !fetcher_) {
      if (const auto seen = host.SeesOnlyOwn(n))
        own = own_.Prepare(h_.layers[static_cast<std::size_t>(l)], *seen, n);
    }
    if (own) continue;
    MOEND_TRY(
        host.Attend(l, host_qkv_, host_qkv_ + q_floats, host_qkv_ + q_floats + kv_floats, host_attended_, n));
    Send(rows_.attended, host_attended_, FloatBytes(q_floats));
  }
  if (rows) MOEND_TRY(caches_->runtime().Fetch(host_rows, rows, FloatBytes(row_floats)));
  if (logits)
    ggml_backend_tensor_get_async(backend_.get(), result, logits, 0, FloatBytes(n * h_.n_vocab));
  else if (!kept)
    ggml_backend_tensor_get_async(backend_.get(), rows_.x, host_x_, 0, x_bytes);
  if (attn_out)
    ggml_backend_tensor_get_async(backend_.get(), rows_.attended, attn_out, 0, FloatBytes(q_floats));
  quiet.well = true;
  for (int64_t i = 0; kept && i < n; ++i) kept->here[row(i)] = false, kept->there[row(i)] = true;
  if (kept && !attn_out) return {};  // what comes next is ordered behind it
  ggml_backend_synchronize(backend_.get());
  if (!logits && !kept) std::memcpy(hidden, host_x_, x_bytes);
  if (!rows) return {};
  MOEND_TRY(caches_->runtime().Synchronize());  // errors of what ran
  return host.StoreStep(begin, end, host_rows, n * QkvFloats(), n);
}

Expected<void> Offload::Settle() {
  if (!pending_) return {};
  MOEND_TRY(fetcher_->Synchronize());
  const auto last = std::exchange(pending_, std::nullopt);
  return last->store(HostQkv(last->buffer));
}

void Offload::Keep(std::span<float> hidden) {
  auto kept = std::make_unique<Kept>();
  kept->host = hidden.data();
  kept->rows = std::ssize(hidden) / h_.n_embd;
  kept->ctx = DescribeTensors(1);
  if (!kept->ctx || kept->rows == 0) return;
  kept->x = ggml_new_tensor_2d(kept->ctx.get(), GGML_TYPE_F32, h_.n_embd, kept->rows);
  kept->buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(kept->ctx.get(),
                                                              ggml_backend_dev_buffer_type(weights_.device)));
  if (!kept->buffer) return;
  kept->here.assign(static_cast<std::size_t>(kept->rows), true);
  kept->there.assign(static_cast<std::size_t>(kept->rows), false);
  kept_.push_back(std::move(kept));
}

void Offload::Forget(const float* hidden) {
  ggml_backend_synchronize(backend_.get());
  if (pending_) static_cast<void>(fetcher_->Synchronize());
  pending_.reset();  // of a prompt that was given up
  std::erase_if(kept_, [&](const auto& k) { return k->host == hidden; });
}

void Offload::Changed(std::span<const float> rows) {
  int64_t first = 0;
  Kept* const kept = KeptOf(rows.data(), &first);
  for (int64_t i = 0; kept && i < std::ssize(rows) / h_.n_embd; ++i)
    kept->there[static_cast<std::size_t>(first + i)] = false;
}

Offload::Kept* Offload::KeptOf(const float* rows, int64_t* first) {
  for (const auto& k : kept_) {
    if (rows < k->host || rows >= k->host + k->rows * h_.n_embd) continue;
    *first = (rows - k->host) / h_.n_embd;
    return k.get();
  }
  return nullptr;
}

Expected<void> Offload::Fetch(std::span<const float> rows) {
  int64_t first = 0;
  Kept* const kept = KeptOf(rows.data(), &first);
  if (!kept) return {};
  const int64_t end = first + std::ssize(rows) / h_.n_embd;
  for (int64_t i = first; i < end;) {
    int64_t n = 0;  // stale ones in a row
    while (i + n < end && n < most_rows_ && !kept->here[static_cast<std::size_t>(i + n)]) ++n;
    if (n == 0) {
      ++i;
      continue;
    }
    const std::size_t bytes = FloatBytes(n * h_.n_embd);
    ggml_backend_tensor_get_async(backend_.get(), kept->x, host_x_, FloatBytes(i * h_.n_embd), bytes);
    ggml_backend_synchronize(backend_.get());
    std::memcpy(kept->host + i * h_.n_embd, host_x_, bytes);
    for (const int64_t stop = i + n; i < stop; ++i) kept->here[static_cast<std::size_t>(i)] = true;
  }
  return {};
}

Expected<void> Offload::Head(const float* hidden, int64_t n, float* logits) {
  for (int64_t done = 0; done < n; done += most_rows_) {
    const int64_t m = std::min(most_rows_, n - done);
    MOEND_ASSIGN(Segment s, MakeSegment(h_.n_layers, h_.n_layers, h_.n_layers, m, true, nullptr, rows_.x, 0));
    MOEND_TRY(Allocate(head_memory_.get(), s.graph));
    Send(rows_.x, hidden + done * h_.n_embd, FloatBytes(m * h_.n_embd));
    MOEND_TRY(Start(s.graph));
    ggml_backend_tensor_get_async(backend_.get(), s.logits, logits + done * h_.n_vocab, 0,
                                  FloatBytes(m * h_.n_vocab));
    ggml_backend_synchronize(backend_.get());
  }
  return {};
}

}  // namespace moend
