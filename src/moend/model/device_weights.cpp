#include "moend/model/device_weights.h"

#include <fmt/format.h>
#include <ggml-alloc.h>

#include <algorithm>

namespace moend {
namespace {

// Left for activations and for one layer's K/V while a prompt is read.
int64_t Reserve(int64_t free) {
  return std::max(int64_t{512} << 20, free / 16);
}

int64_t LayerBytes(const GgufFile& file, int64_t layer) {
  const std::string prefix = fmt::format("blk.{}.", layer);
  int64_t bytes = 0;
  for (const GgufTensor& t : file.tensors())
    if (t.name.starts_with(prefix)) bytes += t.bytes;
  return bytes;
}

int64_t HeadBytes(const GgufFile& file) {
  const GgufTensor* output = file.FindTensor("output.weight");
  if (!output) output = file.FindTensor("token_embd.weight");
  return output ? output->bytes : 0;
}

class Copier {
 public:
  explicit Copier(ggml_context* context) : context_(context) {}

  ggml_tensor* Add(ggml_tensor* from) {
    if (!from) return nullptr;
    ggml_tensor* to = ggml_new_tensor_3d(context_, from->type, from->ne[0], from->ne[1], from->ne[2]);
    ggml_set_name(to, from->name);
    copies_.push_back({from, to});
    return to;
  }

  void Copy() const {
    for (const auto& [from, to] : copies_) ggml_backend_tensor_set(to, from->data, 0, ggml_nbytes(to));
  }

 private:
  struct Pair {
    ggml_tensor *from, *to;
  };
  ggml_context* context_;
  std::vector<Pair> copies_;
};

}  // namespace

Expected<int64_t> FirstDeviceLayer(const GgufFile& file, const HyperParams& h, const DeviceOptions& options,
                                   ggml_backend_dev_t device) {
  const int64_t none = h.n_layers + 1;
  if (!device || options.n_gpu_layers == 0) return none;
  std::size_t free = 0, total = 0;
  ggml_backend_dev_memory(device, &free, &total);
  const bool is_cpu = ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
  int64_t left = is_cpu ? INT64_MAX : static_cast<int64_t>(free) - Reserve(static_cast<int64_t>(free));
  int64_t first = none;
  for (int64_t bytes; first > 0; --first, left -= bytes) {
    bytes = first == none ? HeadBytes(file) : LayerBytes(file, first - 1);
    if (bytes > left) break;
  }
  if (options.n_gpu_layers == DeviceOptions::kAllThatFit) return first;
  const int64_t wanted = none - std::min(options.n_gpu_layers, none);
  if (wanted < first)
    return Fail(ErrorCode::kOutOfMemory,
                "{} has {} MiB of memory free, which is enough for {} of {}'s {} layers (-ngl {})",
                ggml_backend_dev_name(device), free >> 20, none - first, file.path(), none, none - first);
  return wanted;
}

Expected<std::unique_ptr<DeviceWeights>> CopyToDevice(const Weights& weights, const HyperParams& h,
                                                      ggml_backend_dev_t device, int64_t first_layer) {
  auto out = std::make_unique<DeviceWeights>();
  out->device = device;
  out->first_layer = first_layer;
  out->layers.resize(static_cast<std::size_t>(h.n_layers));
  const std::size_t most = (std::size(kLayerWeights) + 1) * static_cast<std::size_t>(h.n_layers) + 4;
  out->context.reset(ggml_init({ggml_tensor_overhead() * most, nullptr, /*no_alloc=*/true}));
  if (!out->context) return Fail(ErrorCode::kOutOfMemory, "no memory to describe a device's weights");
  Copier copier(out->context.get());
  out->head = {copier.Add(weights.head.norm), copier.Add(weights.head.output), copier.Add(weights.head.bias)};
  ggml_tensor* const freqs = copier.Add(weights.rope_freqs);
  for (auto l = static_cast<std::size_t>(first_layer); l < weights.layers.size(); ++l) {
    if (h.layers[l].holds_state()) continue;
    for (ggml_tensor* LayerWeights::*member : kLayerWeights)
      out->layers[l].*member = copier.Add(weights.layers[l].*member);
    out->layers[l].rope_freqs = freqs;
  }
  const ggml_backend_buffer_type_t type = ggml_backend_dev_buffer_type(device);
  out->buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(out->context.get(), type));
  if (!out->buffer)
    return Fail(ErrorCode::kOutOfMemory, "{} has no memory for the weights of {} layers; give a smaller -ngl",
                ggml_backend_dev_name(device), h.n_layers + 1 - first_layer);
  ggml_backend_buffer_set_usage(out->buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
  copier.Copy();
  out->bytes = static_cast<int64_t>(ggml_backend_buffer_get_size(out->buffer.get()));
  return out;
}

}  // namespace moend
