// Copies of layers' weights in the memory of a device.
#pragma once

#include <ggml-cpp.h>

#include <cstdint>
#include <vector>

#include "moend/base/error.h"
#include "moend/model/gguf.h"
#include "moend/model/model.h"

namespace moend {

// What lies on the device: the layers from `first_layer` on that hold K/V, and what makes logits. Layers that
// hold states stay with the CPU (model/delta_net.h).
struct DeviceWeights {
  ggml_backend_dev_t device = nullptr;
  ggml_context_ptr context;
  ggml_backend_buffer_ptr buffer;
  int64_t first_layer = 0;  // [0, n_layers]
  int64_t bytes = 0;
  std::vector<LayerWeights> layers;  // [n_layers]; without weights where they are not there
  HeadWeights head;
  bool holds(int64_t layer) const { return layers[static_cast<std::size_t>(layer)].attn_norm != nullptr; }
};

// The first layer that the options put on a device, n_layers + 1 where they put none: -ngl counts from the
// model's end, the output first. kOutOfMemory says how many fit where more are asked for.
Expected<int64_t> FirstDeviceLayer(const GgufFile& file, const HyperParams& h, const DeviceOptions& options,
                                   ggml_backend_dev_t device);

// Copies; the weights' data is that of the file, not repacked.
Expected<std::unique_ptr<DeviceWeights>> CopyToDevice(const Weights& weights, const HyperParams& h,
                                                      ggml_backend_dev_t device, int64_t first_layer);

}  // namespace moend
