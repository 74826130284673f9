// What the host brings up to date.
#include <cuda_runtime.h>

#include "moend/attention/cuda/launch.h"

namespace moend::cuda {
namespace {

constexpr int kCopyThreads = 256;
constexpr int kMostCopyBlocks = 1024;

// Reads go over the bus to the host: many at once.
__global__ void __launch_bounds__(kCopyThreads) CopyKernel(const Piece* pieces, int64_t n) {
  for (int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    const Piece piece = pieces[i];
    const uint4* from = reinterpret_cast<const uint4*>(piece.from);
    uint4* to = reinterpret_cast<uint4*>(piece.to);
    const int64_t cells = piece.bytes / 16;
    for (int64_t at = threadIdx.x; at < cells; at += 4 * kCopyThreads) {
      uint4 x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (at + j * kCopyThreads < cells) x[j] = __ldcs(from + at + j * kCopyThreads);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (at + j * kCopyThreads < cells) to[at + j * kCopyThreads] = x[j];
    }
  }
}

}  // namespace

int LaunchCopy(const Piece* pieces, int64_t n, void* stream) {
  const auto blocks = static_cast<unsigned>(n < kMostCopyBlocks ? n : kMostCopyBlocks);
  CopyKernel<<<blocks, kCopyThreads, 0, static_cast<cudaStream_t>(stream)>>>(pieces, n);
  return cudaGetLastError();
}

}  // namespace moend::cuda
