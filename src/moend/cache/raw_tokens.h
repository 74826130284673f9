// The unquantized tokens of a layer: first the sinks, then the newest tokens, the same number in every KV
// head. One allocation; per head K as f16 [capacity / 16][head_size][16] and, of what is left of the
// capacity, [head_size][capacity % 16], then V as f16 [capacity][head_size]. Unused K lanes are finite.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "moend/attention/params.h"
#include "moend/base/error.h"
#include "moend/base/ledger.h"
#include "moend/plan/layout.h"

namespace moend {

// Work space for a page on its way between formats: K channel major, V token major.
struct PageScratch {
  Buffer<uint16_t> halves;                                 // [head_size][64]
  Buffer<float> k;                                         // [head_size][64]
  Buffer<float> v;                                         // [64][head_size]
  static Expected<PageScratch> Create(int64_t head_size);  // zeros
};

class RawTokens {
 public:
  explicit RawTokens(const KvShape& shape) : shape_(shape) {}

  // Room for `capacity` tokens a head, no more and no less.
  Expected<void> Resize(const std::shared_ptr<Ledger>& ledger, int64_t capacity);
  int64_t capacity() const { return capacity_; }
  // Tokens that block `block` of K has room for.
  int64_t Lanes(int64_t block) const {
    return std::min(kRawBlockTokens, capacity_ - block * kRawBlockTokens);
  }

  const uint16_t* keys(int64_t head) const { return memory_.data() + head * HeadStride(); }
  const uint16_t* values(int64_t head) const { return keys(head) + capacity_ * shape_.head_size; }
  uint16_t* keys(int64_t head) { return memory_.data() + head * HeadStride(); }
  uint16_t* values(int64_t head) { return keys(head) + capacity_ * shape_.head_size; }
  int64_t bytes() const { return memory_.size() * static_cast<int64_t>(sizeof(uint16_t)); }

  // k, v: [head_size]
  void Store(int64_t head, int64_t token, const float* k, const float* v);
  void Store(int64_t head, int64_t token, const DenseView& from, int64_t position);

  // Tokens [first, first + n) as floats, to slots [slot, slot + n) of a page.
  void Load(int64_t head, int64_t first, int64_t n, int64_t slot, PageScratch& to) const;

  // Takes tokens [first, first + n) out of `size`; those behind move up.
  void Remove(int64_t head, int64_t first, int64_t n, int64_t size);

  Expected<RawTokens> Copy(const std::shared_ptr<Ledger>& ledger) const;

 private:
  int64_t HeadStride() const { return 2 * capacity_ * shape_.head_size; }
  // Where token's channel 0 is in K; channels are Lanes() of its block apart.
  int64_t KeyOffset(int64_t token) const {
    return token / kRawBlockTokens * kRawBlockTokens * shape_.head_size + token % kRawBlockTokens;
  }

  KvShape shape_;
  Buffer<uint16_t> memory_;
  int64_t capacity_ = 0;
};

}  // namespace moend
