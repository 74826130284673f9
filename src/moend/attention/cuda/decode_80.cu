#include "moend/attention/cuda/launch.cuh"

namespace moend::cuda {
MOEND_DECODE_KERNELS(80, 5, true)
}  // namespace moend::cuda
