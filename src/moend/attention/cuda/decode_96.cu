#include "moend/attention/cuda/launch.cuh"

namespace moend::cuda {
MOEND_DECODE_KERNELS(96, 6, true)
}  // namespace moend::cuda
