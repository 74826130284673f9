// What the card's memory gives: the ceiling that bench/cuda_attention measures against.
#pragma once

#include <cstdint>

namespace moend::bench {

// Reads `bytes` (a multiple of 16) once on a cudaStream_t and adds them up, 16 bytes a thread and load;
// `sums`: device memory for one number a block. Returns a cudaError_t.
int ReadOnce(const void* data, int64_t bytes, uint32_t* sums, int blocks, void* stream);

}  // namespace moend::bench
