#include "moend/attention/cuda/attention.h"

#ifdef MOEND_HAVE_CUDA
#include "moend/attention/cuda/check.h"
#endif

namespace moend::cuda {
namespace {

Expected<void> CheckShape(int64_t head_size, int64_t rows) {
  if (head_size < 16 || head_size > 256 || head_size % 16 != 0)
    return Fail(ErrorCode::kInvalidArgument,
                "head size {} is not supported; it must be a multiple of 16 from 16 to 256", head_size);
  if (rows < 1) return Fail(ErrorCode::kInvalidArgument, "{} query rows; 1 or more are possible", rows);
  return {};
}

}  // namespace

#ifdef MOEND_HAVE_CUDA

bool Compiled() {
  return true;
}

int ToolkitVersion() {
  return CUDART_VERSION;
}

int DriverVersion() {
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess) return version;
  cudaGetLastError();
  return 0;
}

bool Available() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
    cudaGetLastError();  // or the next call would report it
    return false;
  }
  return major >= 8;
}

Expected<KernelInfo> DescribeKernel(int64_t head_size, int64_t rows) {
  MOEND_TRY(CheckShape(head_size, rows));
  KernelInfo info;
  // How many rows an item may have does not depend on how many there are, beyond few or many.
  MOEND_TRY(Check(QueryKernel(static_cast<int>(head_size), rows > 8 ? 9 : 8, &info), "decode kernel"));
  if (rows > info.rows) rows = info.rows;
  MOEND_TRY(Check(QueryKernel(static_cast<int>(head_size), static_cast<int>(rows), &info), "decode kernel"));
  if (info.blocks < 1)
    return Fail(ErrorCode::kUnsupported,
                "the device has too little shared memory for head size {} and {} rows", head_size, rows);
  return info;
}

Expected<void> Attend(const Batch& batch, void* stream) {
  MOEND_TRY(CheckShape(batch.head_size, batch.slot_rows));
  if (batch.n_bins < 1) return Fail(ErrorCode::kInvalidArgument, "{} blocks cannot run", batch.n_bins);
  return Check(LaunchDecode(batch, stream), "decode attention");
}

#else

bool Compiled() {
  return false;
}

int ToolkitVersion() {
  return 0;
}

int DriverVersion() {
  return 0;
}

bool Available() {
  return false;
}

Expected<KernelInfo> DescribeKernel(int64_t head_size, int64_t rows) {
  MOEND_TRY(CheckShape(head_size, rows));
  return Fail(ErrorCode::kUnsupported, "this build has no CUDA kernels");
}

Expected<void> Attend(const Batch& batch, void* /*stream*/) {
  MOEND_TRY(CheckShape(batch.head_size, batch.slot_rows));
  return Fail(ErrorCode::kUnsupported, "this build has no CUDA kernels");
}

#endif

}  // namespace moend::cuda
