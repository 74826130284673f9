#include "moend/engine/device_pool.h"

#include <algorithm>
#include <bit>

#include "moend/attention/cuda/plan.h"
#include "moend/base/ledger.h"

namespace moend {
namespace {

constexpr int64_t kLeastSlab = int64_t{1} << 20, kMostSlab = int64_t{64} << 20;
// Left to ggml, whose activations grow with what is read at once.
constexpr int64_t kReserve = int64_t{1} << 30;
// Half of what ids reach, so that slabs may lie on either side of the first.
constexpr int64_t kReach = (int64_t{UINT32_MAX} + 1) * cuda::kPageUnit / 2;

// At most a quarter of a block is lost.
int64_t ClassOf(int64_t bytes) {
  const auto floor = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(std::max<int64_t>(bytes, 1))));
  return RoundUp(bytes, std::max<int64_t>(floor / 4, 256));
}

}  // namespace

DevicePool::~DevicePool() {
  for (const auto& [memory, slab] : slabs_) runtime_->Free(memory);
}

DevicePool::Block DevicePool::TakeLocked(int64_t bytes) {
  SizeClass& of = classes_[bytes];  // stays where it is
  if (of.with_room.empty()) {
    const int64_t n = std::max<int64_t>(1, std::clamp(of.bytes, kLeastSlab, kMostSlab) / bytes);
    const auto allocate = [&] {
      return runtime_->FreeBytes() - n * bytes < kReserve ? nullptr : runtime_->Allocate(n * bytes);
    };
    uint8_t* memory = allocate();
    if (!memory && FreeEmptyLocked()) memory = allocate();
    if (!memory) return {};
    slabs_[memory] = {bytes, n, 0, 0, {}};
    of.with_room.push_back(memory);
    of.bytes += n * bytes;
    bytes_ += n * bytes;
  }
  uint8_t* const memory = of.with_room.back();
  Slab& slab = slabs_[memory];
  int64_t index = slab.unused_from;
  if (slab.free.empty()) {
    ++slab.unused_from;
  } else {
    index = slab.free.back();
    slab.free.pop_back();
  }
  if (++slab.used == slab.n_blocks) of.with_room.pop_back();
  return {memory + index * bytes, bytes};
}

void DevicePool::GiveLocked(const Block& block) {
  const auto at = std::prev(slabs_.upper_bound(block.data));
  Slab& slab = at->second;
  SizeClass& of = classes_[slab.block_bytes];
  if (slab.used == slab.n_blocks) of.with_room.push_back(at->first);
  slab.free.push_back((block.data - at->first) / slab.block_bytes);
  --slab.used;
  // One slab stays: blocks that come and go would allocate each time.
  if (slab.used == 0 && of.bytes > slab.n_blocks * slab.block_bytes) FreeSlabLocked(at);
}

DevicePool::Slabs::iterator DevicePool::FreeSlabLocked(Slabs::iterator at) {
  SizeClass& of = classes_[at->second.block_bytes];
  const int64_t bytes = at->second.n_blocks * at->second.block_bytes;
  std::erase(of.with_room, at->first);
  of.bytes -= bytes;
  bytes_ -= bytes;
  runtime_->Free(at->first);
  return slabs_.erase(at);
}

bool DevicePool::FreeEmptyLocked() {
  const std::size_t before = slabs_.size();
  for (auto at = slabs_.begin(); at != slabs_.end();)
    at = at->second.used == 0 ? FreeSlabLocked(at) : std::next(at);
  return slabs_.size() < before;
}

DevicePool::Block DevicePool::Take(int64_t bytes) {
  const std::lock_guard lock(mutex_);
  return TakeLocked(ClassOf(bytes));
}

void DevicePool::Give(Block block) {
  if (!block.data) return;
  const std::lock_guard lock(mutex_);
  GiveLocked(block);
}

std::optional<DevicePool::Page> DevicePool::TakePage(uint64_t stamp, int64_t bytes) {
  const std::lock_guard lock(mutex_);
  if (const auto it = pages_.find(stamp); it != pages_.end()) {
    ++it->second.references;
    return Page{it->second.id, false};
  }
  const Block block = TakeLocked(bytes);
  if (!block.data) return std::nullopt;
  if (!base_) {
    const auto address = reinterpret_cast<uintptr_t>(block.data);
    base_ = block.data -
            static_cast<int64_t>(std::min<uintptr_t>(address, kReach)) / cuda::kPageUnit * cuda::kPageUnit;
  }
  const auto id = cuda::PageId(block.data - base_);
  if (!id) {
    GiveLocked(block);
    return std::nullopt;
  }
  pages_[stamp] = {*id, 1, block};
  return Page{*id, true};
}

void DevicePool::GivePage(uint64_t stamp) {
  const std::lock_guard lock(mutex_);
  const auto it = pages_.find(stamp);
  if (it == pages_.end() || --it->second.references > 0) return;
  GiveLocked(it->second.block);
  pages_.erase(it);
}

int64_t DevicePool::bytes() const {
  const std::lock_guard lock(mutex_);
  return bytes_;
}

}  // namespace moend
