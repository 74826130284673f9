// Pages of one KV head: reference-counted memory from the ledger, and the table that points to it.
#pragma once

#include <bit>
#include <cstdint>
#include <memory>
#include <utility>

#include "moend/base/error.h"
#include "moend/base/ledger.h"
#include "moend/plan/layout.h"

namespace moend {

// One reference to a page; pages are shared between forked caches and must not be written while shared.
class PageRef {
 public:
  PageRef() = default;
  PageRef(PageRef&& o) noexcept
      : ledger_(std::move(o.ledger_)), layout_(o.layout_), page_(std::exchange(o.page_, nullptr)) {}
  PageRef& operator=(PageRef&& o) noexcept {
    std::swap(ledger_, o.ledger_);
    std::swap(layout_, o.layout_);
    std::swap(page_, o.page_);
    return *this;
  }
  ~PageRef();

  // A new page of zeros with one reference.
  static Expected<PageRef> Create(std::shared_ptr<Ledger> ledger, const PageLayout& layout);
  // Takes over the reference that Detach() gave away.
  static PageRef Adopt(std::shared_ptr<Ledger> ledger, const PageLayout& layout, uint8_t* page) {
    return PageRef(std::move(ledger), layout, page);
  }

  uint8_t* data() const { return page_; }
  uint8_t* Detach() { return std::exchange(page_, nullptr); }

 private:
  PageRef(std::shared_ptr<Ledger> ledger, const PageLayout& layout, uint8_t* page)
      : ledger_(std::move(ledger)), layout_(layout), page_(page) {}
  std::shared_ptr<Ledger> ledger_;
  PageLayout layout_;
  uint8_t* page_ = nullptr;
};

// Of what is packed into a page that was there already; PageRef::Create() gives a stamp, too.
void Restamp(const PageLayout& layout, uint8_t* page);
// Never the same twice.
uint64_t NextStamp();

// False is final; true may change to false at any time, when another cache lets go.
bool IsShared(const PageLayout& layout, const uint8_t* page);

// The mask of a page's first n slots.
constexpr uint64_t FirstSlots(int64_t n) {
  return n == kPageTokens ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
}

// Pointers, live masks and (optionally) scores of the pages, in one allocation that fits them by cache lines.
class PageTable {
 public:
  PageTable(std::shared_ptr<Ledger> ledger, const PageLayout& layout, bool keep_scores)
      : ledger_(std::move(ledger)), layout_(layout), keep_scores_(keep_scores) {}
  PageTable(PageTable&& o) noexcept;
  PageTable& operator=(PageTable&&) = delete;
  ~PageTable() { Clear(); }

  int64_t size() const { return size_; }
  const PageLayout& layout() const { return layout_; }
  const std::shared_ptr<Ledger>& ledger() const { return ledger_; }
  int64_t bytes() const { return memory_.size() + size_ * layout_.bytes; }

  uint8_t** pages() { return reinterpret_cast<uint8_t**>(memory_.data()); }
  uint8_t* const* pages() const { return reinterpret_cast<uint8_t* const*>(memory_.data()); }
  uint64_t* live() { return reinterpret_cast<uint64_t*>(pages() + capacity_); }
  const uint64_t* live() const { return reinterpret_cast<const uint64_t*>(pages() + capacity_); }
  // [size * 64], or null.
  float* scores() { return keep_scores_ && size_ ? reinterpret_cast<float*>(live() + capacity_) : nullptr; }
  const float* scores() const { return const_cast<PageTable*>(this)->scores(); }

  // Makes the table fit `pages` pages, no more and no less; `pages` is not below size().
  Expected<void> Fit(int64_t pages);

  // With room made by Fit(). Scores start at 0.
  void Push(PageRef page, uint64_t live);

  // Slots of the last page behind its last live one.
  int64_t Room() const { return size_ == 0 ? 0 : std::countl_zero(live()[size_ - 1]); }

  // Drops entries from `size` on. Their references are the caller's business.
  void Truncate(int64_t size) { size_ = size; }

  // Lets go of everything.
  void Clear();

  // Another table of the same pages, each with a reference more.
  Expected<PageTable> Share() const;

 private:
  std::shared_ptr<Ledger> ledger_;
  PageLayout layout_;
  bool keep_scores_;
  Buffer<uint8_t> memory_;
  int64_t capacity_ = 0, size_ = 0;
};

}  // namespace moend
