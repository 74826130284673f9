// Head sizes that have no kernel of their own.
#include "moend/attention/cuda/launch.cuh"

namespace moend::cuda {
MOEND_DECODE_KERNELS(Any, 16, false)
}  // namespace moend::cuda
