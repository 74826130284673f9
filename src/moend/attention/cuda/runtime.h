// A device as the decode kernels use it: memory, copies, and launches that it does in the order in which they
// are given. A second one is made of host memory and the reference kernels: the definition of what the first
// one computes, and what tests run where there is no GPU.
//
// Functions return at once; errors of what runs come with a later call, Synchronize() at the latest. Memory
// belongs to whoever asked for it. Allocate() and Free() from any thread, the rest from one at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "moend/attention/cuda/launch.h"
#include "moend/attention/cuda/work.h"
#include "moend/base/error.h"

namespace moend::cuda {

class Runtime {
 public:
  virtual ~Runtime() = default;

  // Memory of the device, aligned to 256 bytes; null where there is none.
  virtual uint8_t* Allocate(int64_t bytes) = 0;
  virtual void Free(uint8_t* memory) = 0;
  // Bytes that others, too, could still allocate.
  virtual int64_t FreeBytes() = 0;
  // Memory of the host that the device can read and write by itself; null where there is none.
  virtual uint8_t* AllocateHost(int64_t bytes) = 0;
  virtual void FreeHost(uint8_t* memory) = 0;

  // As in attention.h.
  virtual Expected<KernelInfo> Describe(int64_t head_size, int64_t rows) = 0;

  // `pieces` and what they read: of AllocateHost(), unchanged until the device is done.
  virtual Expected<void> Copy(const Piece* pieces, int64_t n) = 0;
  virtual Expected<void> Clear(uint8_t* memory, int64_t bytes) = 0;  // zeros
  // Bytes of the device to the host, at once only to memory of AllocateHost() or of ggml's host buffers.
  virtual Expected<void> Fetch(void* to, const void* from, int64_t bytes) = 0;
  virtual Expected<void> Attend(const Batch& batch) = 0;

  // Order between this queue and another one of the same device: cudaEvent_t, which the other side waits for
  // and records by means of its own.
  virtual Expected<void> Wait(void* event) = 0;
  virtual Expected<void> Record(void* event) = 0;
  virtual Expected<void> Synchronize() = 0;
};

// On the host, by the reference kernels. Everything has happened when a function returns.
std::unique_ptr<Runtime> MakeHostRuntime();

// Of the NVIDIA GPU at a PCI bus id ("0000:3b:00.0"). kUnsupported where this build has no kernels, or the
// GPU is too old for them.
Expected<std::unique_ptr<Runtime>> MakeCudaRuntime(const std::string& pci_bus_id);

}  // namespace moend::cuda
