#include "tests/support/plain_runner.h"

#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml-cpu.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace moend::test {

namespace {

float Half(float x) {
  return ggml_fp16_to_fp32(ggml_fp32_to_fp16(x));
}

}  // namespace

DenseHook::DenseHook(const Model& model)
    : model_(model), h_(model.hparams()), layers_(static_cast<std::size_t>(model.hparams().n_layers)) {}

int64_t DenseHook::stored(int64_t layer) const {
  return static_cast<int64_t>(layers_[static_cast<std::size_t>(layer)].k.size()) /
         (h_.n_kv_heads * h_.head_size);
}

void DenseHook::Store(int64_t layer, const float*, const float* k, const float* v, int64_t n) {
  Layer& kv = layers_[static_cast<std::size_t>(layer)];
  for (int64_t i = 0; i < n * h_.n_kv_heads * h_.head_size; ++i) {
    kv.k.push_back(Half(k[i]));
    kv.v.push_back(Half(v[i]));
  }
  out_.assign(static_cast<std::size_t>(n * h_.n_heads * h_.head_size), NAN);
}

void DenseHook::Attend(int64_t layer, const float* q, int64_t n, int thread, int n_threads) {
  const Layer& kv = layers_[static_cast<std::size_t>(layer)];
  const int64_t size = h_.head_size, group = h_.n_heads / h_.n_kv_heads, first = stored(layer) - n;
  const LayerParams& params = h_.layers[static_cast<std::size_t>(layer)];
  const ggml_tensor* sinks = model_.weights().layers[static_cast<std::size_t>(layer)].sinks;
  std::vector<float> p;
  for (int64_t row = thread; row < n * h_.n_heads; row += n_threads) {
    const int64_t token = row / h_.n_heads, kv_head = row % h_.n_heads / group;
    const int64_t seen = first + token + 1;
    p.resize(static_cast<std::size_t>(seen));
    const float* sink = sinks ? static_cast<const float*>(sinks->data) + row % h_.n_heads : nullptr;
    float top = sink ? *sink : -INFINITY;
    const int64_t oldest = params.window > 0 ? std::max<int64_t>(0, seen - params.window) : 0;
    for (int64_t t = 0; t < seen; ++t) {
      if (t < oldest) {
        p[static_cast<std::size_t>(t)] = -INFINITY;
        continue;
      }
      const float* k = kv.k.data() + (t * h_.n_kv_heads + kv_head) * size;
      float sums[16] = {};  // head_size is a multiple of 16
      for (int64_t c = 0; c < size; c += 16)
        for (int64_t i = 0; i < 16; ++i) sums[i] += q[row * size + c + i] * k[c + i];
      float score = std::accumulate(sums, sums + 16, 0.0f) * h_.softmax_scale;
      if (params.soft_cap > 0) score = params.soft_cap * std::tanh(score / params.soft_cap);
      p[static_cast<std::size_t>(t)] = score;
      top = std::max(top, score);
    }
    double total = sink ? std::exp(*sink - top) : 0;
    for (float& x : p) {
      x = std::exp(x - top);
      total += x;
    }
    float* out = out_.data() + row * size;
    std::fill_n(out, size, 0.0f);
    for (int64_t t = 0; t < seen; ++t) {
      const float* v = kv.v.data() + (t * h_.n_kv_heads + kv_head) * size;
      const auto weight = static_cast<float>(p[static_cast<std::size_t>(t)] / total);
      for (int64_t c = 0; c < size; ++c) out[c] += weight * v[c];
    }
  }
}

void DenseHook::Combine(int64_t, float* out, int64_t n, int thread, int n_threads) {
  const int64_t row = h_.n_heads * h_.head_size;
  for (int64_t i = thread; i < n; i += n_threads) std::copy_n(out_.data() + i * row, row, out + i * row);
}

void DenseHook::LoadStates(int64_t layer, float* states, int64_t contexts) {
  const std::vector<float>& state = layers_[static_cast<std::size_t>(layer)].state;
  const int64_t n = contexts * h_.layers[static_cast<std::size_t>(layer)].delta_net.state_floats();
  if (state.empty())
    std::fill_n(states, n, 0.0f);
  else
    std::copy_n(state.data(), n, states);
}

void DenseHook::StoreStates(int64_t layer, const float* states, int64_t contexts) {
  const int64_t n = contexts * h_.layers[static_cast<std::size_t>(layer)].delta_net.state_floats();
  layers_[static_cast<std::size_t>(layer)].state.assign(states, states + n);
}

std::vector<std::vector<float>> PlainLogits(const Model& model, std::span<const int32_t> tokens,
                                            int64_t block, int n_threads) {
  const HyperParams& h = model.hparams();
  DenseHook hook(model);
  std::vector<HookSlot> slots;
  for (int64_t l = 0; l < h.n_layers; ++l) slots.push_back({&hook, l});
  const ggml_backend_ptr backend(ggml_backend_cpu_init());
  ggml_backend_cpu_set_n_threads(backend.get(), n_threads);
  const ggml_gallocr_ptr allocator(ggml_gallocr_new(ggml_backend_cpu_buffer_type()));
  const auto nodes = static_cast<std::size_t>((h.n_layers + 1) * NodesPerLayer(h));

  std::vector<std::vector<float>> rows;
  for (std::size_t begin = 0; begin < tokens.size(); begin += static_cast<std::size_t>(block)) {
    const std::size_t n = std::min(tokens.size() - begin, static_cast<std::size_t>(block));
    const ggml_context_ptr context(ggml_init(
        {ggml_tensor_overhead() * nodes + ggml_graph_overhead_custom(nodes, false), nullptr, true}));
    ggml_context* ctx = context.get();
    ggml_cgraph* graph = ggml_new_graph_custom(ctx, nodes, false);
    ggml_tensor* ids = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, static_cast<int64_t>(n));
    ggml_tensor* positions = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, static_cast<int64_t>(n));
    ggml_set_input(ids);
    ggml_set_input(positions);
    ggml_build_forward_expand(graph, positions);  // models without RoPE do not look at them
    ggml_tensor* x = BuildEmbedding(ctx, model, ids);
    for (int64_t l = 0; l < h.n_layers; ++l)
      x = BuildLayer(ctx, graph, model, l, x, positions, &slots[static_cast<std::size_t>(l)]);
    ggml_tensor* logits = BuildHead(ctx, model.hparams(), model.weights().head, x);
    ggml_set_output(logits);
    ggml_build_forward_expand(graph, logits);
    if (!ggml_gallocr_alloc_graph(allocator.get(), graph)) return {};

    std::vector<int32_t> where(n);
    for (std::size_t i = 0; i < n; ++i) where[i] = static_cast<int32_t>(begin + i);
    ggml_backend_tensor_set(ids, tokens.data() + begin, 0, n * sizeof(int32_t));
    ggml_backend_tensor_set(positions, where.data(), 0, n * sizeof(int32_t));
    if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) return {};
    const auto* data = static_cast<const float*>(logits->data);
    for (std::size_t i = 0; i < n; ++i)
      rows.emplace_back(data + static_cast<int64_t>(i) * h.n_vocab,
                        data + static_cast<int64_t>(i + 1) * h.n_vocab);
  }
  return rows;
}

}  // namespace moend::test
