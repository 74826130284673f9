// Brings a warp's units (pages, raw tokens) to shared memory while others are worked on: slots, filled in
// turns with the chunks of K and of V by asynchronous copies. A chunk is under way from the moment its slot
// is free until it is needed, that is at least while the chunk before it is worked on. Nothing is waited for
// but one's own copies: warps never wait for each other.
#pragma once

#include "moend/attention/cuda/fragments.cuh"
#include "moend/attention/cuda/work.h"

namespace moend::cuda {

inline constexpr int kSlots = 2;  // a third gained nothing

// What a block works on; in shared memory.
struct Task {
  Part parts[4];  // K and V of pages, K and V of raw tokens
  Stream stream;
  Item item;
  Output output;
};

// Units of a warp, raw ones before pages: tokens raw + i * kRawUnitTokens * stride, pages page + i * stride,
// up to the ends of the item.
struct Units {
  int raw, page, stride;
};

template <class S>
class Feed {
 public:
  // `shared`: the slots, then two headers (what stands before K's codes in a page); a multiple of 128.
  __device__ __forceinline__ Feed(const S& shape, const Batch& batch, const Task& task, const Units& units,
                                  uint8_t* shared, int header_bytes, int lane)
      : shape_(shape),
        batch_(batch),
        task_(task),
        shared_(shared),
        header_bytes_(header_bytes),
        lane_(lane),
        units_(units) {
    next_id_ = units.page < task.item.page_end ? __ldg(task.stream.pages + units.page) : 0;
    Enter();
#pragma unroll 1
    for (int i = 0; i < kSlots; ++i) {
      Issue();
      NextSlot();
    }
  }

  // Waits for the next chunk and says where it is.
  __device__ __forceinline__ const uint8_t* Acquire() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kSlots - 1) : "memory");
    __syncwarp();
    return shared_ + slot_ * SlotBytes(shape_.Steps());
  }
  // The acquired chunk has been read.
  __device__ __forceinline__ void Release() {
    __syncwarp();
    Issue();
    NextSlot();
  }
  // A page's chunks go by unread.
  __device__ __forceinline__ void SkipPage() {
#pragma unroll 1
    for (int i = task_.parts[0].chunks + task_.parts[1].chunks; i > 0; --i) {
      Acquire();
      Release();
    }
    NextHeader();
  }
  // Header of the page whose chunks are acquired; NextHeader() when they all have been.
  __device__ __forceinline__ uint8_t* header() const {
    return shared_ + kSlots * SlotBytes(shape_.Steps()) + (headers_ & 1) * header_bytes_;
  }
  __device__ __forceinline__ void NextHeader() {
    headers_ ^= 1;
  }

 private:
  __device__ __forceinline__ void NextSlot() {
    slot_ = slot_ + 1 == kSlots ? 0 : slot_ + 1;
  }
  __device__ __forceinline__ bool InRaw() const {
    return units_.raw < task_.item.raw_end;
  }
  __device__ __forceinline__ bool InPages() const {
    return units_.page < task_.item.page_end;
  }

  // To the unit that units_ points to.
  __device__ __forceinline__ void Enter() {
    chunk_ = 0;
    if (InRaw() || !InPages()) return;
    page_ = batch_.pool + static_cast<int64_t>(next_id_) * kPageUnit + lane_ * 16;
    const int next = units_.page + units_.stride;
    if (next < task_.item.page_end) next_id_ = __ldg(task_.stream.pages + next);
  }

  __device__ __forceinline__ static uint32_t Shared(const uint8_t* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
  }

  // Row i of a chunk to the slot.
  template <int kRow>
  __device__ __forceinline__ static uint32_t Cell(uint32_t to, const Part& part) {
    uint32_t flip = 0;
#pragma unroll
    for (int bit = 0; bit < 3; ++bit)
      if (kRow >> bit & 1) flip ^= part.far[bit];
    return (to ^ flip) + kRow * 512;
  }

  __device__ __forceinline__ uint32_t Target(const Part& part) const {
    const uint32_t near = (static_cast<uint32_t>(lane_) >> (part.near & 255) & part.near >> 8) * 2;
    return Shared(shared_ + slot_ * SlotBytes(shape_.Steps())) + (lane_ ^ near) * 16;
  }

  __device__ __forceinline__ void CopyChunk(const Part& part, const uint8_t* from, int bytes) const {
    const uint32_t to = Target(part);
    CopyRows<0>(part, to, from, bytes);
    if (S::kSteps > 4 && bytes > 2048) CopyRows<4>(part, to, from, bytes);
    if (S::kSteps > 8 && bytes > 4096) {
      CopyRows<8>(part, to, from, bytes);
      CopyRows<12>(part, to, from, bytes);
    }
  }
  template <int kFirst>
  __device__ __forceinline__ void CopyRows(const Part& part, uint32_t to, const uint8_t* from,
                                           int bytes) const {
    bytes -= lane_ * 16;
    CopyAsync(Cell<kFirst>(to, part), from + kFirst * 512, kFirst * 512 < bytes);
    CopyAsync(Cell<kFirst + 1>(to, part), from + (kFirst + 1) * 512, (kFirst + 1) * 512 < bytes);
    CopyAsync(Cell<kFirst + 2>(to, part), from + (kFirst + 2) * 512, (kFirst + 2) * 512 < bytes);
    CopyAsync(Cell<kFirst + 3>(to, part), from + (kFirst + 3) * 512, (kFirst + 3) * 512 < bytes);
  }

  // A block of tokens is two chunks. Of K it is always whole (what is behind the last token is not looked
  // at), of V the tokens behind the last one become 0, for they are multiplied by 0.
  __device__ __forceinline__ void IssueRaw() const {
    const bool is_k = chunk_ == 0;
    const Part part = task_.parts[is_k ? 2 : 3];
    const int head_size = shape_.Steps() * 16, bytes = shape_.Steps() * 512;
    const uint8_t* from = lane_ * 16 + (is_k ? RawKeyChunk(task_.stream.raw_k, units_.raw, head_size)
                                             : RawValueChunk(task_.stream.raw_v, units_.raw, head_size));
    const int valid = is_k ? bytes : min(task_.item.raw_end - units_.raw, kRawUnitTokens) * head_size * 2;
    const uint32_t to = Target(part);
#pragma unroll 2
    for (int i = 0; i * 512 + lane_ * 16 < bytes; ++i) {
      const uint32_t flip = (i & 1 ? part.far[0] : 0) ^ (i & 2 ? part.far[1] : 0) ^ (i & 4 ? part.far[2] : 0);
      FillAsync((to ^ flip) + i * 512, from + i * 512, i * 512 + lane_ * 16 < valid ? 16 : 0);
    }
  }

  __device__ __forceinline__ void Issue() {
    if (InRaw()) {
      IssueRaw();
      if (++chunk_ == 2) {
        units_.raw += kRawUnitTokens * units_.stride;
        Enter();
      }
    } else if (InPages()) {
      if (chunk_ == 0) {
        const uint32_t header = Shared(shared_ + kSlots * SlotBytes(shape_.Steps())) +
                                (headers_ >> 1) * header_bytes_ + lane_ * 16;
        const int bytes = task_.parts[0].offset - lane_ * 16;
        CopyAsync(header, page_, 0 < bytes);
        CopyAsync(header + 512, page_ + 512, 512 < bytes);
        if (S::kSteps > 8) {
          CopyAsync(header + 1024, page_ + 1024, 1024 < bytes);
          CopyAsync(header + 1536, page_ + 1536, 1536 < bytes);
        }
      }
      const int k_chunks = task_.parts[0].chunks, index = chunk_ < k_chunks ? chunk_ : chunk_ - k_chunks;
      const Part part = task_.parts[chunk_ < k_chunks ? 0 : 1];
      const int begin = index * part.chunk;
      CopyChunk(part, page_ + part.offset + begin, min(part.chunk, part.bytes - begin));
      if (chunk_ >= k_chunks && index + 1 == part.chunks) {
        units_.page += units_.stride;
        headers_ ^= 2;
        Enter();
      } else {
        ++chunk_;
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  const S& shape_;
  const Batch& batch_;
  const Task& task_;
  uint8_t* shared_;
  int header_bytes_, lane_;
  Units units_;                    // that is copied
  const uint8_t* page_ = nullptr;  // and its page, the lane's first cell
  uint32_t next_id_ = 0;
  int chunk_ = 0, slot_ = 0;
  int headers_ = 0;  // bit 0: of the page that is read; bit 1: of the one that is copied
};

}  // namespace moend::cuda
