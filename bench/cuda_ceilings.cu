#include "bench/cuda_ceilings.h"

#include <cuda_runtime.h>

namespace moend::bench {
namespace {

constexpr int kThreads = 512, kAhead = 8;

__global__ void __launch_bounds__(kThreads) Read(const uint4* data, int64_t n, uint32_t* sums) {
  uint32_t sum = 0;
  const int64_t step = int64_t{kThreads} * kAhead;
  for (int64_t at = blockIdx.x * step + threadIdx.x; at < n; at += gridDim.x * step) {
    uint4 x[kAhead] = {};
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (at + j * kThreads < n) x[j] = __ldg(data + at + j * kThreads);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) sum += x[j].x ^ x[j].y ^ x[j].z ^ x[j].w;
  }
  // Never so, but the compiler does not know.
  if (sum == 0x12345678u) sums[blockIdx.x] = sum;
}

}  // namespace

int ReadOnce(const void* data, int64_t bytes, uint32_t* sums, int blocks, void* stream) {
  Read<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const uint4*>(data),
                                                                   bytes / 16, sums);
  return cudaGetLastError();
}

}  // namespace moend::bench
