#include "moend/cache/raw_tokens.h"

#include <algorithm>

#include "moend/base/half.h"
#include "moend/cache/codec.h"

namespace moend {

Expected<PageScratch> PageScratch::Create(int64_t head_size) {
  PageScratch scratch;
  const int64_t n = head_size * kPageTokens;
  MOEND_ASSIGN(scratch.halves, Buffer<uint16_t>::Create(nullptr, n));
  MOEND_ASSIGN(scratch.k, Buffer<float>::Create(nullptr, n));
  MOEND_ASSIGN(scratch.v, Buffer<float>::Create(nullptr, n));
  std::fill_n(scratch.halves.data(), n, uint16_t{0});
  std::fill_n(scratch.k.data(), n, 0.0f);
  std::fill_n(scratch.v.data(), n, 0.0f);
  return scratch;
}

Expected<void> RawTokens::Reserve(const std::shared_ptr<Ledger>& ledger, int64_t n) {
  if (n <= capacity_) return {};
  RawTokens grown(shape_);
  grown.capacity_ = RoundUp(n, kRawBlockTokens);
  MOEND_ASSIGN(grown.memory_, Buffer<uint16_t>::Create(ledger, shape_.n_kv_heads * grown.HeadStride()));
  const int64_t old = capacity_ * shape_.head_size, now = grown.capacity_ * shape_.head_size;
  for (int64_t h = 0; h < shape_.n_kv_heads; ++h) {
    if (old > 0) {
      std::copy_n(keys(h), old, grown.keys(h));
      std::copy_n(values(h), old, grown.values(h));
    }
    std::fill(grown.keys(h) + old, grown.keys(h) + now, uint16_t{0});
    std::fill(grown.values(h) + old, grown.values(h) + now, uint16_t{0});
  }
  *this = std::move(grown);
  return {};
}

void RawTokens::Store(int64_t head, int64_t token, const float* k, const float* v) {
  uint16_t* key = keys(head) + KeyOffset(token);
  for (int64_t c = 0; c < shape_.head_size; ++c) key[c * kRawBlockTokens] = FloatToFiniteHalf(k[c]);
  FloatsToHalves(v, shape_.head_size, values(head) + token * shape_.head_size);
}

void RawTokens::Store(int64_t head, int64_t token, const DenseView& from, int64_t position) {
  const int64_t hs = shape_.head_size;
  uint16_t* key = keys(head) + KeyOffset(token);
  const uint16_t* k = from.k + position / kPageTokens * kPageTokens * hs + position % kPageTokens;
  for (int64_t c = 0; c < hs; ++c) key[c * kRawBlockTokens] = FiniteHalf(k[c * kPageTokens]);
  uint16_t* value = values(head) + token * hs;
  for (int64_t c = 0; c < hs; ++c) value[c] = FiniteHalf(from.v[position * hs + c]);
}

void RawTokens::LoadPage(int64_t head, int64_t first, PageScratch& to) const {
  const int64_t hs = shape_.head_size;
  for (int64_t t = 0; t < kPageTokens;) {
    const int64_t token = first + t;
    const int64_t run = std::min(kRawBlockTokens - token % kRawBlockTokens, kPageTokens - t);
    const uint16_t* key = keys(head) + KeyOffset(token);
    for (int64_t c = 0; c < hs; ++c)
      std::copy_n(key + c * kRawBlockTokens, run, to.halves.data() + c * kPageTokens + t);
    t += run;
  }
  HalvesToFloats(to.halves.data(), hs * kPageTokens, to.k.data());
  HalvesToFloats(values(head) + first * hs, hs * kPageTokens, to.v.data());
}

void RawTokens::RemovePage(int64_t head, int64_t first, int64_t size) {
  // A page is a whole number of blocks, so every token keeps its lane.
  static_assert(kPageTokens % kRawBlockTokens == 0);
  const int64_t hs = shape_.head_size, left = size - kPageTokens;
  const int64_t block = kRawBlockTokens * hs, page = kPageTokens * hs;
  for (int64_t token = first; token < left;) {
    const int64_t lane = token % kRawBlockTokens, run = kRawBlockTokens - lane;
    uint16_t* to = keys(head) + token / kRawBlockTokens * block;
    for (int64_t c = 0; c < hs; ++c) {
      uint16_t* row = to + c * kRawBlockTokens + lane;
      std::copy_n(row + page, run, row);
    }
    token += run;
  }
  std::copy(values(head) + (first + kPageTokens) * hs, values(head) + size * hs, values(head) + first * hs);
}

Expected<RawTokens> RawTokens::Copy(const std::shared_ptr<Ledger>& ledger) const {
  RawTokens copy(shape_);
  copy.capacity_ = capacity_;
  MOEND_ASSIGN(copy.memory_, Buffer<uint16_t>::Create(ledger, memory_.size()));
  if (memory_.size() > 0) std::copy_n(memory_.data(), memory_.size(), copy.memory_.data());
  return copy;
}

}  // namespace moend
