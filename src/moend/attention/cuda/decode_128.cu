#include "moend/attention/cuda/launch.cuh"

namespace moend::cuda {
MOEND_DECODE_KERNELS(128, 8, true)
}  // namespace moend::cuda
