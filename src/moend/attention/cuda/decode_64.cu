#include "moend/attention/cuda/launch.cuh"

namespace moend::cuda {
MOEND_DECODE_KERNELS(64, 4, true)
}  // namespace moend::cuda
