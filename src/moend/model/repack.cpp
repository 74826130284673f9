#include "moend/model/repack.h"

#include <ggml-backend.h>
#include <ggml.h>

#include <utility>

namespace moend {
namespace {

std::size_t RoundUpTo(std::size_t n, std::size_t unit) {
  return (n + unit - 1) / unit * unit;
}

// Whether the device multiplies such a matrix, or picks of such matrices, when they lie in a buffer of this
// type.
bool Multiplies(ggml_backend_dev_t device, ggml_backend_buffer_t buffer, bool experts, ggml_type type,
                int64_t ne0, int64_t ne1, int64_t ne2) {
  constexpr std::size_t kTensors = 4;
  constexpr int64_t kTokens = 512;
  const ggml_context_ptr ctx(ggml_init({ggml_tensor_overhead() * kTensors, nullptr, /*no_alloc=*/true}));
  if (!ctx) return false;
  ggml_tensor* weight = ggml_new_tensor_3d(ctx.get(), type, ne0, ne1, ne2);
  ggml_tensor* product = nullptr;
  if (experts) {
    ggml_tensor* x = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, ne0, 1, kTokens);
    product = ggml_mul_mat_id(ctx.get(), weight, x, ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 1, kTokens));
  } else {
    product = ggml_mul_mat(ctx.get(), weight, ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, ne0, kTokens));
  }
  weight->buffer = buffer;
  return ggml_backend_dev_supports_op(device, product);
}

}  // namespace

Repacker::Repacker(int64_t most) {
  context_.reset(
      ggml_init({ggml_tensor_overhead() * static_cast<std::size_t>(most), nullptr, /*no_alloc=*/true}));
  device_ = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  if (!context_ || !device_) return;
  const auto extra_types =
      reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(
          ggml_backend_dev_backend_reg(device_), "ggml_backend_dev_get_extra_bufts"));
  if (!extra_types) return;
  for (ggml_backend_buffer_type_t* type = extra_types(device_); type && *type; ++type) {
    ggml_backend_buffer_ptr empty(ggml_backend_buft_alloc_buffer(*type, 0));
    if (empty) layouts_.push_back({*type, std::move(empty), {}});
  }
}

ggml_tensor* Repacker::Add(ggml_type type, int64_t ne0, int64_t ne1, const void* data, const char* name) {
  return Place(false, type, ne0, ne1, 1, data, name);
}

ggml_tensor* Repacker::AddExperts(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, const void* data,
                                  const char* name) {
  return Place(true, type, ne0, ne1, ne2, data, name);
}

ggml_tensor* Repacker::Place(bool experts, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2,
                             const void* data, const char* name) {
  for (Layout& layout : layouts_) {
    if (!Multiplies(device_, layout.empty.get(), experts, type, ne0, ne1, ne2)) continue;
    ggml_tensor* tensor = ggml_new_tensor_3d(context_.get(), type, ne0, ne1, ne2);
    if (!tensor) return nullptr;
    ggml_set_name(tensor, name);
    layout.copies.push_back({tensor, data});
    return tensor;
  }
  return nullptr;
}

Expected<RepackedWeights> Repacker::Finish() {
  RepackedWeights out;
  for (Layout& layout : layouts_) {
    if (layout.copies.empty()) continue;
    const std::size_t unit = ggml_backend_buft_get_alignment(layout.type);
    std::size_t bytes = unit;  // the buffer's own start need not be aligned
    for (const Copy& c : layout.copies)
      bytes += RoundUpTo(ggml_backend_buft_get_alloc_size(layout.type, c.tensor), unit);
    ggml_backend_buffer_ptr buffer(ggml_backend_buft_alloc_buffer(layout.type, bytes));
    if (!buffer) return Fail(ErrorCode::kOutOfMemory, "no memory for {} bytes of repacked weights", bytes);
    ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    auto at = reinterpret_cast<std::uintptr_t>(ggml_backend_buffer_get_base(buffer.get()));
    at = RoundUpTo(at, unit);
    for (const Copy& c : layout.copies) {
      const std::size_t size = ggml_backend_buft_get_alloc_size(layout.type, c.tensor);
      if (ggml_backend_tensor_alloc(buffer.get(), c.tensor, reinterpret_cast<void*>(at)) !=
          GGML_STATUS_SUCCESS)
        return Fail(ErrorCode::kInternal, "ggml does not repack the tensor {}", c.tensor->name);
      ggml_backend_tensor_set(c.tensor, c.from, 0, ggml_nbytes(c.tensor));
      at += RoundUpTo(size, unit);
    }
    out.bytes += static_cast<int64_t>(bytes);
    out.buffers.push_back(std::move(buffer));
  }
  out.context = std::move(context_);
  return out;
}

}  // namespace moend
