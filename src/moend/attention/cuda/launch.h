// The border between the host's C++ and CUDA: numbers and pointers only, since nvcc may know less C++ than we
// use. Use attention.h.
#pragma once

#include "moend/attention/cuda/work.h"

namespace moend::cuda {

// What a kernel for this head size and these rows can do.
struct KernelInfo {
  int blocks = 0;         // that the device runs at once
  int rows = 0;           // most rows of an item
  int registers = 0;      // a thread
  int spilled_bytes = 0;  // a thread
  int shared_bytes = 0;   // a block
};

// They return 0 or a cudaError_t. `rows`: most rows of an item.
int QueryKernel(int head_size, int rows, KernelInfo* info);
int LaunchDecode(const Batch& batch, void* stream);

// n >= 1 pieces; the array, too, is memory that the device can read.
int LaunchCopy(const Piece* pieces, int64_t n, void* stream);

}  // namespace moend::cuda
