#include "moend/engine/device_order.h"

#include <ggml-backend.h>

#include <cstring>

namespace moend {
namespace {

// What ggml_backend_event of the pinned release is; `context` is a cudaEvent_t.
struct GgmlEvent {
  ggml_backend_dev_t device;
  void* context;
};

GgmlEvent Open(ggml_backend_event_t event) {
  GgmlEvent open;
  std::memcpy(&open, event, sizeof(open));
  return open;
}

}  // namespace

DeviceOrder::DeviceOrder(ggml_backend_t backend, cuda::Runtime& runtime)
    : backend_(backend), runtime_(runtime), to_kernels_(MakeEvent()), to_graphs_(MakeEvent()) {
  if (to_kernels_ && to_graphs_) {
    // Another release may put something else there.
    ggml_backend_event_record(to_kernels_, backend_);
    if (runtime_.Wait(Open(to_kernels_).context) && runtime_.Record(Open(to_graphs_).context) &&
        runtime_.Synchronize())
      return;
  }
  for (ggml_backend_event_t* const event : {&to_kernels_, &to_graphs_}) {
    if (*event) ggml_backend_event_free(*event);
    *event = nullptr;
  }
}

DeviceOrder::~DeviceOrder() {
  if (to_kernels_) ggml_backend_event_free(to_kernels_);
  if (to_graphs_) ggml_backend_event_free(to_graphs_);
}

ggml_backend_event_t DeviceOrder::MakeEvent() {
  const ggml_backend_dev_t device = ggml_backend_get_device(backend_);
  ggml_backend_event_t event = ggml_backend_event_new(device);
  if (!event) return nullptr;
  const GgmlEvent open = Open(event);
  if (open.device == device && open.context) return event;
  ggml_backend_event_free(event);
  return nullptr;
}

Expected<void> DeviceOrder::ToKernels() {
  if (!to_kernels_) {
    ggml_backend_synchronize(backend_);
    return {};
  }
  ggml_backend_event_record(to_kernels_, backend_);
  return runtime_.Wait(Open(to_kernels_).context);
}

Expected<void> DeviceOrder::ToGraphs() {
  if (!to_graphs_) return runtime_.Synchronize();
  MOEND_TRY(runtime_.Record(Open(to_graphs_).context));
  ggml_backend_event_wait(backend_, to_graphs_);
  return {};
}

}  // namespace moend
