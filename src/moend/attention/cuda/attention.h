// Decode attention on an NVIDIA GPU (compute capability 8.0 or newer): all contexts, KV heads and page ranges
// of a layer in one launch, straight over pages in the format of plan/layout.h. The meaning is that of
// InitState(), AttendStream() and Finish() (attention/attention.h), window, soft cap and sinks of QueryRows
// included; beyond it, rows may be several tokens of which each sees its own past only (Stream::own).
//
//     streams of the layer ─► MakeWorkPlan() ─► items, bins, outputs ─► device memory ─► Attend()
//
// Products are of half floats with float32 sums; query times scale of K is split into two half floats, so
// that what is left of an error is the rounding of probabilities to half floats (measured: at most 6.4e-4 of
// a stream's result, whatever the logits). A block wants up to 225 KiB of shared memory: devices with less
// have no kernel for large heads or many rows (DescribeKernel() says so).
#pragma once

#include "moend/attention/cuda/launch.h"
#include "moend/attention/cuda/work.h"
#include "moend/base/error.h"

namespace moend::cuda {

// Whether this build has kernels; and whether there is a device that can run them.
bool Compiled();
bool Available();
// Of CUDA, as 13000 for 13.0: what this build was made with, and what the driver here can run; 0: none.
int ToolkitVersion();
int DriverVersion();

// What the current device can do with this head size and `rows` query rows a stream: `blocks` and `rows` are
// what MakeWorkPlan() wants.
Expected<KernelInfo> DescribeKernel(int64_t head_size, int64_t rows);

// Puts the work on a cudaStream_t (null: the default one) and returns at once. Everything that the batch
// points to is in device memory. kInvalidArgument for numbers no kernel has, kInternal for an error of CUDA.
Expected<void> Attend(const Batch& batch, void* stream);

}  // namespace moend::cuda
