#ifdef MOEND_HAVE_CUDA
#include "moend/attention/cuda/check.h"
#endif

#include "moend/attention/cuda/attention.h"
#include "moend/attention/cuda/runtime.h"

namespace moend::cuda {

#ifdef MOEND_HAVE_CUDA

namespace {

class CudaRuntime : public Runtime {
 public:
  CudaRuntime(int device, cudaStream_t stream) : device_(device), stream_(stream) {}
  ~CudaRuntime() override {
    Use();
    cudaStreamDestroy(stream_);
  }

  uint8_t* Allocate(int64_t bytes) override {
    void* memory = nullptr;
    if (!Use() || cudaMalloc(&memory, static_cast<std::size_t>(bytes)) == cudaSuccess)
      return static_cast<uint8_t*>(memory);
    cudaGetLastError();  // or a later launch would report it
    return nullptr;
  }
  void Free(uint8_t* memory) override {
    if (Use()) cudaFree(memory);
  }
  int64_t FreeBytes() override {
    std::size_t free = 0, total = 0;
    return Use() && cudaMemGetInfo(&free, &total) == cudaSuccess ? static_cast<int64_t>(free) : 0;
  }
  uint8_t* AllocateHost(int64_t bytes) override {
    void* memory = nullptr;
    if (!Use() || cudaHostAlloc(&memory, static_cast<std::size_t>(bytes),
                                cudaHostAllocPortable | cudaHostAllocMapped) == cudaSuccess)
      return static_cast<uint8_t*>(memory);
    cudaGetLastError();
    return nullptr;
  }
  void FreeHost(uint8_t* memory) override {
    if (Use()) cudaFreeHost(memory);
  }

  Expected<KernelInfo> Describe(int64_t head_size, int64_t rows) override {
    Use();
    return DescribeKernel(head_size, rows);
  }
  Expected<void> Copy(const Piece* pieces, int64_t n) override {
    Use();
    return n < 1 ? Expected<void>() : Check(LaunchCopy(pieces, n, stream_), "copying to the GPU");
  }
  Expected<void> Clear(uint8_t* memory, int64_t bytes) override {
    Use();
    return Check(cudaMemsetAsync(memory, 0, static_cast<std::size_t>(bytes), stream_), "clearing memory");
  }
  Expected<void> Fetch(void* to, const void* from, int64_t bytes) override {
    Use();
    return Check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToHost, stream_),
                 "copying from the GPU");
  }
  Expected<void> Attend(const Batch& batch) override {
    Use();
    return cuda::Attend(batch, stream_);
  }
  Expected<void> Wait(void* event) override {
    Use();
    return Check(cudaStreamWaitEvent(stream_, static_cast<cudaEvent_t>(event), 0), "waiting for ggml");
  }
  Expected<void> Record(void* event) override {
    Use();
    return Check(cudaEventRecord(static_cast<cudaEvent_t>(event), stream_), "noting what is done");
  }
  Expected<void> Synchronize() override {
    Use();
    return Check(cudaStreamSynchronize(stream_), "attention on the GPU");
  }

 private:
  // The calling thread's device is this one from here on.
  bool Use() const { return cudaSetDevice(device_) == cudaSuccess; }

  int device_;
  cudaStream_t stream_;
};

}  // namespace

Expected<std::unique_ptr<Runtime>> MakeCudaRuntime(const std::string& pci_bus_id) {
  int device = 0, major = 0;
  MOEND_TRY(Check(cudaDeviceGetByPCIBusId(&device, pci_bus_id.c_str()), "looking for the GPU"));
  MOEND_TRY(Check(cudaSetDevice(device), "taking the GPU"));
  MOEND_TRY(
      Check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking the GPU"));
  if (major < 8)
    return Fail(ErrorCode::kUnsupported,
                "the GPU at {} has compute capability {}; the attention kernels want 8.0", pci_bus_id, major);
  cudaStream_t stream = nullptr;
  MOEND_TRY(Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "starting a queue"));
  return std::make_unique<CudaRuntime>(device, stream);
}

#else

Expected<std::unique_ptr<Runtime>> MakeCudaRuntime(const std::string& pci_bus_id) {
  return Fail(ErrorCode::kUnsupported, "this build has no CUDA kernels for the GPU at {}", pci_bus_id);
}

#endif

}  // namespace moend::cuda
