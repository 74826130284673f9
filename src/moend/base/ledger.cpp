#include "moend/base/ledger.h"

namespace moend {

std::unexpected<Error> internal::ImpossibleBuffer(int64_t elements) {
  return Fail(ErrorCode::kOutOfMemory, "an allocation of {} elements is impossible", elements);
}

std::unexpected<Error> internal::RefusedBuffer(int64_t bytes) {
  return Fail(ErrorCode::kOutOfMemory, "the system refused {} bytes of memory", bytes);
}

void Ledger::Add(int64_t bytes) {
  allocations_.fetch_add(1, std::memory_order_relaxed);
  const int64_t now = live_.fetch_add(bytes, std::memory_order_relaxed) + bytes;
  int64_t peak = peak_.load(std::memory_order_relaxed);
  while (now > peak && !peak_.compare_exchange_weak(peak, now, std::memory_order_relaxed)) {
  }
}

void Ledger::Remove(int64_t bytes) {
  allocations_.fetch_sub(1, std::memory_order_relaxed);
  live_.fetch_sub(bytes, std::memory_order_relaxed);
}

void* Ledger::Take(int64_t bytes) {
  return ::operator new (static_cast<std::size_t>(bytes), std::align_val_t{kCacheLine}, std::nothrow);
}

void Ledger::Give(void* p, int64_t) {
  ::operator delete (p, std::align_val_t{kCacheLine});
}

void* Ledger::Allocate(int64_t bytes) {
  const int64_t rounded = RoundUp(bytes, kCacheLine);
  void* p = Take(rounded);
  if (p) Add(rounded);
  return p;
}

void Ledger::Free(void* p, int64_t bytes) {
  if (!p) return;
  const int64_t rounded = RoundUp(bytes, kCacheLine);
  Give(p, rounded);
  Remove(rounded);
}

}  // namespace moend
