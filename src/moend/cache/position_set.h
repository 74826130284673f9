// Which of the positions seen so far a KV head still holds: a bitmap.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>

#include "moend/base/error.h"
#include "moend/base/ledger.h"
#include "moend/plan/layout.h"

namespace moend {

class PositionSet {
 public:
  // Makes room for positions below `n`; never shrinks.
  Expected<void> Reserve(const std::shared_ptr<Ledger>& ledger, int64_t n) {
    const int64_t words = BitmapBytes(n) / static_cast<int64_t>(sizeof(uint64_t));
    if (words <= words_.size()) return {};
    MOEND_ASSIGN(auto grown, Buffer<uint64_t>::Create(ledger, words));
    const auto old_bytes = static_cast<std::size_t>(bytes());
    if (old_bytes) std::memcpy(grown.data(), words_.data(), old_bytes);
    std::memset(grown.data() + words_.size(), 0,
                static_cast<std::size_t>(words - words_.size()) * sizeof(uint64_t));
    words_ = std::move(grown);
    return {};
  }

  void Insert(int64_t position) { words_[position / 64] |= uint64_t{1} << position % 64; }
  void Erase(int64_t position) { words_[position / 64] &= ~(uint64_t{1} << position % 64); }

  // f(position), ascending; f may erase the position it is given.
  template <class F>
  void ForEach(F f) const {
    for (int64_t w = 0; w < words_.size(); ++w)
      for (uint64_t left = words_[w]; left; left &= left - 1) f(w * 64 + std::countr_zero(left));
  }

  int64_t bytes() const { return words_.size() * static_cast<int64_t>(sizeof(uint64_t)); }
  uint64_t* words() { return words_.data(); }
  const uint64_t* words() const { return words_.data(); }
  int64_t n_words() const { return words_.size(); }

 private:
  Buffer<uint64_t> words_;
};

}  // namespace moend
