// Errors of CUDA's run-time library as ours. For files of this folder, in builds with CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include "moend/base/error.h"

namespace moend::cuda {

inline Expected<void> Check(int error, const char* what) {
  if (error == cudaSuccess) return {};
  return Fail(error == cudaErrorMemoryAllocation ? ErrorCode::kOutOfMemory : ErrorCode::kInternal,
              "{}: CUDA says '{}'", what, cudaGetErrorString(static_cast<cudaError_t>(error)));
}

}  // namespace moend::cuda
