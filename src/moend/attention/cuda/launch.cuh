// Launches of one head size; included by a file for each, so that they compile side by side.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "moend/attention/cuda/block.cuh"
#include "moend/attention/cuda/launch.h"

namespace moend::cuda {

template <class C>
SharedLayout LayoutFor(int head_size, int rows) {
  const int groups = head_size % 64 == 0 ? head_size / 64 : 1;
  return {head_size, (rows + C::kWarpRows - 1) / C::kWarpRows * C::kWarpRows, C::kWarps, C::kWarpRows,
          groups};
}

template <class C>
int Query(int head_size, int rows, KernelInfo* info) {
  const int bytes = LayoutFor<C>(head_size, rows).Bytes();
  cudaFuncAttributes attributes{};
  int device = 0, processors = 0, blocks = 0, most_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (!error) error = cudaFuncGetAttributes(&attributes, DecodeKernel<C>);
  if (!error && bytes > most_bytes) {
    *info = {0, C::kMaxRows, attributes.numRegs, static_cast<int>(attributes.localSizeBytes), bytes};
    return cudaSuccess;
  }
  if (!error)
    error = cudaFuncSetAttribute(DecodeKernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (!error)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, DecodeKernel<C>, C::kThreads, bytes);
  if (error) return error;
  *info = {blocks * processors, C::kMaxRows, attributes.numRegs, static_cast<int>(attributes.localSizeBytes),
           bytes};
  return cudaSuccess;
}

template <class C>
int Launch(const Batch& batch, cudaStream_t stream) {
  // Once for each device, as a call costs as much as a launch.
  constexpr int kDevices = 64;
  static std::atomic<int> allowed[kDevices] = {};
  const int bytes = LayoutFor<C>(batch.head_size, batch.slot_rows).Bytes();
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error) return error;
  if (device >= kDevices || bytes > allowed[device].load(std::memory_order_relaxed)) {
    error = cudaFuncSetAttribute(DecodeKernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error) return error;
    if (device < kDevices) allowed[device].store(bytes, std::memory_order_relaxed);
  }
  DecodeKernel<C><<<batch.n_bins, C::kThreads, bytes, stream>>>(batch);
  return cudaGetLastError();
}

// With few rows more warps fit a multiprocessor; with many, codes are unpacked once for two query tiles.
// Warps and blocks are those whose registers do not spill and whose shared memory fits.
template <int kSteps, bool kExact>
struct Kernels {
  using Few = Config<Shape<kSteps, kExact, 1>, 6, kSteps <= 8 ? 2 : 1, 8>;
  using Many =
      Config<Shape<kSteps, kExact, kSteps <= 8 ? 2 : 1>, kSteps <= 8 ? 8 : 4, 1, kSteps <= 8 ? 64 : 32>;

  static int Query(int head_size, int rows, KernelInfo* info) {
    return rows <= 8 ? cuda::Query<Few>(head_size, rows, info) : cuda::Query<Many>(head_size, rows, info);
  }
  static int Launch(const Batch& batch, cudaStream_t stream) {
    return batch.slot_rows <= 8 ? cuda::Launch<Few>(batch, stream) : cuda::Launch<Many>(batch, stream);
  }
};

#define MOEND_DECODE_KERNELS(name, steps, exact)                \
  int Query##name(int head_size, int rows, KernelInfo* info) {  \
    return Kernels<steps, exact>::Query(head_size, rows, info); \
  }                                                             \
  int Launch##name(const Batch& batch, cudaStream_t stream) {   \
    return Kernels<steps, exact>::Launch(batch, stream);        \
  }

}  // namespace moend::cuda
