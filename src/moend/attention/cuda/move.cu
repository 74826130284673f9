// Kernels that move K/V: what the host brings up to date, and raw tokens of a decode step.
#include <cuda_fp16.h>
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

__device__ __forceinline__ uint16_t FiniteHalf(float x) {
  const float clamped = x != x ? 0.0f : fminf(fmaxf(x, -65504.0f), 65504.0f);
  return __half_as_ushort(__float2half_rn(clamped));
}

// A block a stream and token, a thread a channel.
__global__ void AppendKernel(const NewTokens tokens) {
  const int c = static_cast<int>(threadIdx.x), head_size = tokens.head_size;
  const Stream& stream = tokens.streams[blockIdx.x];
  const int64_t at = stream.n_raw + tokens.grown + blockIdx.y;
  const int64_t from = static_cast<int64_t>(blockIdx.x) * head_size + blockIdx.y * tokens.token_stride + c;
  stream.raw_k[at / kRawUnitTokens * kRawUnitTokens * head_size + c * kRawUnitTokens + at % kRawUnitTokens] =
      FiniteHalf(tokens.k[from]);
  stream.raw_v[at * head_size + c] = FiniteHalf(tokens.v[from]);
}

}  // namespace

int LaunchCopy(const Piece* pieces, int64_t n, void* stream) {
  const auto blocks = static_cast<unsigned>(n < kMostCopyBlocks ? n : kMostCopyBlocks);
  CopyKernel<<<blocks, kCopyThreads, 0, static_cast<cudaStream_t>(stream)>>>(pieces, n);
  return cudaGetLastError();
}

int LaunchAppend(const NewTokens& tokens, void* stream) {
  const dim3 blocks(static_cast<unsigned>(tokens.n_streams), static_cast<unsigned>(tokens.n_tokens));
  AppendKernel<<<blocks, static_cast<unsigned>(tokens.head_size), 0, static_cast<cudaStream_t>(stream)>>>(
      tokens);
  return cudaGetLastError();
}

}  // namespace moend::cuda
