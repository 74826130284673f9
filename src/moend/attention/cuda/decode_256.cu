#include "moend/attention/cuda/launch.cuh"

namespace moend::cuda {
MOEND_DECODE_KERNELS(256, 16, true)
}  // namespace moend::cuda
