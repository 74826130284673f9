// Byte accounting: every byte of K/V cache comes from a Ledger, so that what we report is what was allocated.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "moend/base/error.h"

namespace moend {

inline constexpr int64_t kCacheLine = 64;

constexpr int64_t RoundUp(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Counts live and peak bytes of the allocations made through it. Thread safe. Must outlive them all, which is
// why the owners keep it in a shared_ptr.
class Ledger {
 public:
  Ledger() = default;
  Ledger(const Ledger&) = delete;
  Ledger& operator=(const Ledger&) = delete;
  virtual ~Ledger() = default;

  int64_t live() const { return live_.load(std::memory_order_relaxed); }
  int64_t peak() const { return peak_.load(std::memory_order_relaxed); }
  int64_t allocations() const { return allocations_.load(std::memory_order_relaxed); }  // live ones
  void ResetPeak() { peak_.store(live(), std::memory_order_relaxed); }

  // 64-byte aligned; the size is rounded up to whole cache lines and counted so. nullptr when the system
  // refuses.
  void* Allocate(int64_t bytes);
  void Free(void* p, int64_t bytes);  // `bytes` as given to Allocate

  // For containers that allocate by themselves (LedgerVector).
  void Add(int64_t bytes);
  void Remove(int64_t bytes);

 protected:
  // Where the bytes come from, a multiple of kCacheLine, and go back to.
  virtual void* Take(int64_t bytes);
  virtual void Give(void* p, int64_t bytes);

 private:
  std::atomic<int64_t> live_{0}, peak_{0}, allocations_{0};
};

namespace internal {

// Why there is no Buffer.
std::unexpected<Error> ImpossibleBuffer(int64_t elements);
std::unexpected<Error> RefusedBuffer(int64_t bytes);

}  // namespace internal

// A fixed block of T (trivial types), uninitialized, owned, counted. Move only.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& o) noexcept { *this = std::move(o); }
  Buffer& operator=(Buffer&& o) noexcept {
    Reset();
    ledger_ = std::move(o.ledger_);
    data_ = std::exchange(o.data_, nullptr);
    size_ = std::exchange(o.size_, 0);
    return *this;
  }
  ~Buffer() { Reset(); }

  // A ledger of nullptr allocates without counting (work space that is no K/V).
  static Expected<Buffer> Create(std::shared_ptr<Ledger> ledger, int64_t size) {
    static_assert(std::is_trivially_copyable_v<T>);
    Buffer b;
    if (size < 0 || size > (INT64_MAX / 2) / static_cast<int64_t>(sizeof(T)))
      return internal::ImpossibleBuffer(size);
    if (size == 0) return b;
    const int64_t bytes = size * static_cast<int64_t>(sizeof(T));
    b.ledger_ = ledger ? std::move(ledger) : std::make_shared<Ledger>();
    b.data_ = static_cast<T*>(b.ledger_->Allocate(bytes));
    if (!b.data_) return internal::RefusedBuffer(bytes);
    b.size_ = size;
    return b;
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  void Reset() {
    if (data_) ledger_->Free(data_, size_ * static_cast<int64_t>(sizeof(T)));
    data_ = nullptr;
    size_ = 0;
  }
  std::shared_ptr<Ledger> ledger_;
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// std allocator over a Ledger, for the cache's page tables and bitmaps.
template <class T>
struct LedgerAllocator {
  using value_type = T;
  std::shared_ptr<Ledger> ledger;
  explicit LedgerAllocator(std::shared_ptr<Ledger> l) : ledger(std::move(l)) {}
  template <class U>
  LedgerAllocator(const LedgerAllocator<U>& o) : ledger(o.ledger) {}
  T* allocate(std::size_t n) {
    T* p = std::allocator<T>().allocate(n);
    if (ledger) ledger->Add(static_cast<int64_t>(n * sizeof(T)));
    return p;
  }
  void deallocate(T* p, std::size_t n) {
    if (ledger) ledger->Remove(static_cast<int64_t>(n * sizeof(T)));
    std::allocator<T>().deallocate(p, n);
  }
  template <class U>
  bool operator==(const LedgerAllocator<U>& o) const {
    return ledger == o.ledger;
  }
};
template <class T>
using LedgerVector = std::vector<T, LedgerAllocator<T>>;

}  // namespace moend
