#include "moend/cache/raw_tokens.h"

#include <algorithm>
#include <array>

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

Expected<void> RawTokens::Resize(const std::shared_ptr<Ledger>& ledger, int64_t capacity) {
  RawTokens resized(shape_);
  resized.capacity_ = capacity;
  MOEND_ASSIGN(resized.memory_, Buffer<uint16_t>::Create(ledger, shape_.n_kv_heads * resized.HeadStride()));
  const int64_t now = capacity * shape_.head_size, kept = std::min(capacity_ * shape_.head_size, now);
  for (int64_t h = 0; h < shape_.n_kv_heads; ++h) {
    if (kept > 0) {
      std::copy_n(keys(h), kept, resized.keys(h));
      std::copy_n(values(h), kept, resized.values(h));
    }
    std::fill(resized.keys(h) + kept, resized.keys(h) + now, uint16_t{0});
    std::fill(resized.values(h) + kept, resized.values(h) + now, uint16_t{0});
  }
  *this = std::move(resized);
  return {};
}

Expected<void> RawTokens::Reserve(const std::shared_ptr<Ledger>& ledger, int64_t n) {
  return n <= capacity_ ? Expected<void>() : Resize(ledger, RoundUp(n, kRawBlockTokens));
}

void RawTokens::Shrink(const std::shared_ptr<Ledger>& ledger, int64_t n) {
  if (RoundUp(n, kRawBlockTokens) < capacity_) (void)Resize(ledger, RoundUp(n, kRawBlockTokens));
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

void RawTokens::Load(int64_t head, int64_t first, int64_t n, int64_t slot, PageScratch& to) const {
  const int64_t hs = shape_.head_size;
  std::array<uint16_t, kPageTokens> row;
  for (int64_t c = 0; c < hs; ++c) {
    const uint16_t* key = keys(head) + c * kRawBlockTokens;
    for (int64_t t = 0; t < n;) {
      const int64_t run = std::min(kRawBlockTokens - (first + t) % kRawBlockTokens, n - t);
      std::copy_n(key + KeyOffset(first + t), run, row.data() + t);
      t += run;
    }
    HalvesToFloats(row.data(), n, to.k.data() + c * kPageTokens + slot);
  }
  HalvesToFloats(values(head) + first * hs, hs * n, to.v.data() + slot * hs);
}

void RawTokens::Remove(int64_t head, int64_t first, int64_t n, int64_t size) {
  const int64_t hs = shape_.head_size;
  if (n == 0) return;
  const bool blocks = first % kRawBlockTokens == 0 && n % kRawBlockTokens == 0;
  if (blocks && size > first + n)  // whole blocks of K move up
    std::copy(keys(head) + (first + n) * hs, keys(head) + RoundUp(size, kRawBlockTokens) * hs,
              keys(head) + first * hs);
  for (int64_t token = first + n; token < size && !blocks; ++token) {
    const uint16_t* from = keys(head) + KeyOffset(token);
    uint16_t* to = keys(head) + KeyOffset(token - n);
    for (int64_t c = 0; c < hs; ++c) to[c * kRawBlockTokens] = from[c * kRawBlockTokens];
  }
  std::copy(values(head) + (first + n) * hs, values(head) + size * hs, values(head) + first * hs);
}

Expected<RawTokens> RawTokens::Copy(const std::shared_ptr<Ledger>& ledger) const {
  RawTokens copy(shape_);
  copy.capacity_ = capacity_;
  MOEND_ASSIGN(copy.memory_, Buffer<uint16_t>::Create(ledger, memory_.size()));
  if (memory_.size() > 0) std::copy_n(memory_.data(), memory_.size(), copy.memory_.data());
  return copy;
}

}  // namespace moend
