// Keeps the kernels of a cuda::Runtime in order with the graphs that ggml runs on the same device, without
// the host waiting for either.
#pragma once

#include <ggml-cpp.h>

#include "moend/attention/cuda/runtime.h"
#include "moend/base/error.h"

namespace moend {

class DeviceOrder {
 public:
  // Both are borrowed. Where ggml's events are not what we take them for, the host waits instead.
  DeviceOrder(ggml_backend_t backend, cuda::Runtime& runtime);
  ~DeviceOrder();
  DeviceOrder(const DeviceOrder&) = delete;
  DeviceOrder& operator=(const DeviceOrder&) = delete;

  // What the runtime is given from here on comes after what ggml was given.
  Expected<void> ToKernels();
  // What ggml is given from here on comes after what the runtime was given.
  Expected<void> ToGraphs();

 private:
  // Of an event that both sides use; null: there is none.
  ggml_backend_event_t MakeEvent();

  ggml_backend_t backend_;
  cuda::Runtime& runtime_;
  ggml_backend_event_t to_kernels_ = nullptr, to_graphs_ = nullptr;
};

}  // namespace moend
