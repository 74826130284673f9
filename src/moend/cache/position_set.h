// Which of the positions seen so far a KV head still holds: a bitmap, once one of them is gone.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <memory>

#include "moend/base/error.h"
#include "moend/base/ledger.h"
#include "moend/plan/layout.h"

namespace moend {

class PositionSet {
 public:
  // Memory for what Add() up to `n` positions needs; nothing while all are held.
  Expected<void> Reserve(const std::shared_ptr<Ledger>& ledger, int64_t n) {
    return words_.size() > 0 ? Grow(ledger, n) : Expected<void>();
  }
  // The next n positions are held, with room made by Reserve().
  void Add(int64_t n) {
    for (int64_t i = seen_; i < seen_ + n && words_.size() > 0; ++i) Insert(i);
    seen_ += n;
  }
  // Of n positions none is held, with room to Insert() those that are.
  Expected<void> StartEmpty(const std::shared_ptr<Ledger>& ledger, int64_t n) {
    words_ = {};
    MOEND_TRY(Grow(ledger, n));
    seen_ = n;
    return {};
  }
  // Makes the bitmap that Erase() needs.
  Expected<void> MakeErasable(const std::shared_ptr<Ledger>& ledger) {
    if (words_.size() > 0 || seen_ == 0) return {};
    MOEND_TRY(Grow(ledger, seen_));
    for (int64_t i = 0; i < seen_; ++i) Insert(i);
    return {};
  }
  // Gives the bitmap up again; all positions are held.
  void HoldAll() { words_ = {}; }

  void Insert(int64_t position) { words_[position / 64] |= uint64_t{1} << position % 64; }
  void Erase(int64_t position) { words_[position / 64] &= ~(uint64_t{1} << position % 64); }

  // f(position), ascending; f may erase the position it is given.
  template <class F>
  void ForEach(F f) const {
    if (words_.size() == 0)
      for (int64_t i = 0; i < seen_; ++i) f(i);
    for (int64_t w = 0; w < words_.size(); ++w)
      for (uint64_t left = words_[w]; left; left &= left - 1) f(w * 64 + std::countr_zero(left));
  }

  // Word w of the bitmap, whether there is one or not.
  uint64_t word(int64_t w) const {
    if (words_.size() > 0) return words_[w];
    const int64_t n = std::clamp<int64_t>(seen_ - w * 64, 0, 64);
    return n == 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
  }

  Expected<PositionSet> Copy(const std::shared_ptr<Ledger>& ledger) const {
    PositionSet copy;
    copy.seen_ = seen_;
    MOEND_ASSIGN(copy.words_, Buffer<uint64_t>::Create(ledger, words_.size()));
    if (words_.size() > 0) std::copy_n(words_.data(), words_.size(), copy.words_.data());
    return copy;
  }

  int64_t bytes() const { return words_.size() * static_cast<int64_t>(sizeof(uint64_t)); }
  uint64_t* words() { return words_.data(); }
  int64_t n_words() const { return words_.size(); }

 private:
  Expected<void> Grow(const std::shared_ptr<Ledger>& ledger, int64_t n) {
    const int64_t words = BitmapBytes(n) / static_cast<int64_t>(sizeof(uint64_t));
    if (words <= words_.size()) return {};
    MOEND_ASSIGN(auto grown, Buffer<uint64_t>::Create(ledger, words));
    if (words_.size() > 0) std::copy_n(words_.data(), words_.size(), grown.data());
    std::fill_n(grown.data() + words_.size(), words - words_.size(), uint64_t{0});
    words_ = std::move(grown);
    return {};
  }

  Buffer<uint64_t> words_;  // empty while every position below seen_ is held
  int64_t seen_ = 0;
};

}  // namespace moend
