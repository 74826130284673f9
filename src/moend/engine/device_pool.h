// Memory of a device for what contexts remember: pages, which contexts that share them have in common, and
// blocks of any size. It comes in slabs of blocks of one size. Thread safe.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "moend/attention/cuda/runtime.h"

namespace moend {

class DevicePool {
 public:
  struct Block {
    uint8_t* data = nullptr;  // null: there was no memory
    int64_t bytes = 0;
  };
  struct Page {
    uint32_t id = 0;     // as cuda::Stream::pages has it, with base()
    bool fresh = false;  // nothing has been written to it yet
  };

  explicit DevicePool(std::unique_ptr<cuda::Runtime> runtime) : runtime_(std::move(runtime)) {}
  ~DevicePool();
  DevicePool(const DevicePool&) = delete;
  DevicePool& operator=(const DevicePool&) = delete;

  cuda::Runtime& runtime() { return *runtime_; }
  // What page ids count from. Stays.
  const uint8_t* base() const { return base_; }
  // The same as an address of the page.
  uint8_t* PageData(uint32_t id) const { return base_ + static_cast<int64_t>(id) * cuda::kPageUnit; }

  // A block of at least `bytes`.
  Block Take(int64_t bytes);
  void Give(Block block);

  // A reference to the page of this stamp (cache/layer_cache.h); nothing where there is no memory for it.
  std::optional<Page> TakePage(uint64_t stamp, int64_t bytes);
  void GivePage(uint64_t stamp);

  // Taken from the device.
  int64_t bytes() const;

 private:
  struct Slab {
    int64_t block_bytes = 0, n_blocks = 0, used = 0, unused_from = 0;
    std::vector<int64_t> free;  // given back, all below unused_from
  };
  struct SizeClass {
    std::vector<uint8_t*> with_room;  // slabs
    int64_t bytes = 0;                // of all slabs
  };
  struct SharedPage {
    uint32_t id = 0;
    int64_t references = 0;
    Block block;
  };

  using Slabs = std::map<uint8_t*, Slab>;  // by their address

  // All with mutex_ held.
  Block TakeLocked(int64_t bytes);
  void GiveLocked(const Block& block);
  Slabs::iterator FreeSlabLocked(Slabs::iterator slab);  // the next one
  bool FreeEmptyLocked();                                // whether there was any

  std::unique_ptr<cuda::Runtime> runtime_;
  mutable std::mutex mutex_;
  uint8_t* base_ = nullptr;
  int64_t bytes_ = 0;
  Slabs slabs_;
  std::unordered_map<int64_t, SizeClass> classes_;  // by the size of their blocks
  std::unordered_map<uint64_t, SharedPage> pages_;  // by stamp
};

}  // namespace moend
