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
  if (resized.memory_.size() > 0) std::fill_n(resized.memory_.data(), resized.memory_.size(), uint16_t{0});
  const int64_t hs = shape_.head_size, kept = std::min(capacity_, capacity);
  for (int64_t h = 0; h < shape_.n_kv_heads && kept > 0; ++h) {
    for (int64_t begin = 0; begin < kept; begin += kRawBlockTokens) {
      const int64_t from = Lanes(begin / kRawBlockTokens), to = resized.Lanes(begin / kRawBlockTokens);
      const uint16_t* old = keys(h) + begin * hs;
      uint16_t* fresh = resized.keys(h) + begin * hs;
      if (from == to) {
        std::copy_n(old, hs * from, fresh);
      } else {
        for (int64_t c = 0; c < hs; ++c) std::copy_n(old + c * from, std::min(from, to), fresh + c * to);
      }
    }
    std::copy_n(values(h), kept * hs, resized.values(h));
  }
  *this = std::move(resized);
  return {};
}

void RawTokens::Store(int64_t head, int64_t token, const float* k, const float* v) {
  uint16_t* key = keys(head) + KeyOffset(token);
  const int64_t stride = Lanes(token / kRawBlockTokens);
  for (int64_t c = 0; c < shape_.head_size; ++c) key[c * stride] = FloatToFiniteHalf(k[c]);
  FloatsToHalves(v, shape_.head_size, values(head) + token * shape_.head_size);
}

void RawTokens::Store(int64_t head, int64_t token, const DenseView& from, int64_t position) {
  const int64_t hs = shape_.head_size, stride = Lanes(token / kRawBlockTokens);
  uint16_t* key = keys(head) + KeyOffset(token);
  const uint16_t* k = from.k + position / kPageTokens * kPageTokens * hs + position % kPageTokens;
  for (int64_t c = 0; c < hs; ++c) key[c * stride] = FiniteHalf(k[c * kPageTokens]);
  uint16_t* value = values(head) + token * hs;
  for (int64_t c = 0; c < hs; ++c) value[c] = FiniteHalf(from.v[position * hs + c]);
}

void RawTokens::Load(int64_t head, int64_t first, int64_t n, int64_t slot, PageScratch& to) const {
  const int64_t hs = shape_.head_size;
  std::array<uint16_t, kPageTokens> row;
  for (int64_t c = 0; c < hs; ++c) {
    for (int64_t t = 0; t < n;) {
      const int64_t run = std::min(kRawBlockTokens - (first + t) % kRawBlockTokens, n - t);
      std::copy_n(keys(head) + KeyOffset(first + t) + c * Lanes((first + t) / kRawBlockTokens), run,
                  row.data() + t);
      t += run;
    }
    HalvesToFloats(row.data(), n, to.k.data() + c * kPageTokens + slot);
  }
  HalvesToFloats(values(head) + first * hs, hs * n, to.v.data() + slot * hs);
}

void RawTokens::Remove(int64_t head, int64_t first, int64_t n, int64_t size) {
  const int64_t hs = shape_.head_size;
  if (n == 0) return;
  const bool blocks =
      first % kRawBlockTokens == 0 && n % kRawBlockTokens == 0 && RoundUp(size, kRawBlockTokens) <= capacity_;
  if (blocks && size > first + n)  // whole blocks of K move up
    std::copy(keys(head) + (first + n) * hs, keys(head) + RoundUp(size, kRawBlockTokens) * hs,
              keys(head) + first * hs);
  for (int64_t token = first + n; token < size && !blocks; ++token) {
    const uint16_t* from = keys(head) + KeyOffset(token);
    uint16_t* to = keys(head) + KeyOffset(token - n);
    const int64_t from_stride = Lanes(token / kRawBlockTokens),
                  to_stride = Lanes((token - n) / kRawBlockTokens);
    for (int64_t c = 0; c < hs; ++c) to[c * to_stride] = from[c * from_stride];
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
