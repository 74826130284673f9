#include "tests/fuzz/memory.h"

#include <malloc.h>

#include <atomic>
#include <cstdlib>
#include <new>

namespace {

std::atomic<int64_t> in_use{0}, most{0};

}  // namespace

namespace moend::fuzz {

int64_t StartCounting() {
  most = in_use.load();
  return most;
}

int64_t MostCounted() {
  return most;
}

}  // namespace moend::fuzz

// A sanitizer has its own, which find more.
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define MOEND_SANITIZED 1
#endif
#endif
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(MOEND_SANITIZED)

namespace {

void Add(int64_t bytes) {
  const int64_t now = in_use += bytes;
  int64_t seen = most;
  while (now > seen && !most.compare_exchange_weak(seen, now)) {
  }
}

}  // namespace

void* operator new(std::size_t bytes) {
  void* memory = std::malloc(bytes);
  if (!memory) throw std::bad_alloc();
  Add(static_cast<int64_t>(malloc_usable_size(memory)));
  return memory;
}
void* operator new[](std::size_t bytes) {
  return operator new(bytes);
}
void operator delete(void* memory) noexcept {
  if (memory) Add(-static_cast<int64_t>(malloc_usable_size(memory)));
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  operator delete(memory);
}
void operator delete[](void* memory) noexcept {
  operator delete(memory);
}
void operator delete[](void* memory, std::size_t) noexcept {
  operator delete(memory);
}

#endif
