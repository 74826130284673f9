#include <cuda_runtime.h>

#include "moend/attention/cuda/launch.h"

namespace moend::cuda {

#define MOEND_DECLARE_KERNELS(name)                           \
  int Query##name(int head_size, int rows, KernelInfo* info); \
  int Launch##name(const Batch& batch, cudaStream_t stream);
MOEND_DECLARE_KERNELS(64)
MOEND_DECLARE_KERNELS(80)
MOEND_DECLARE_KERNELS(96)
MOEND_DECLARE_KERNELS(128)
MOEND_DECLARE_KERNELS(256)
MOEND_DECLARE_KERNELS(Any)
#undef MOEND_DECLARE_KERNELS

int QueryKernel(int head_size, int rows, KernelInfo* info) {
  switch (head_size) {
    case 64:
      return Query64(head_size, rows, info);
    case 80:
      return Query80(head_size, rows, info);
    case 96:
      return Query96(head_size, rows, info);
    case 128:
      return Query128(head_size, rows, info);
    case 256:
      return Query256(head_size, rows, info);
    default:
      return QueryAny(head_size, rows, info);
  }
}

int LaunchDecode(const Batch& batch, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (batch.head_size) {
    case 64:
      return Launch64(batch, s);
    case 80:
      return Launch80(batch, s);
    case 96:
      return Launch96(batch, s);
    case 128:
      return Launch128(batch, s);
    case 256:
      return Launch256(batch, s);
    default:
      return LaunchAny(batch, s);
  }
}

}  // namespace moend::cuda
