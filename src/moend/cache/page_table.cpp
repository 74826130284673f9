#include "moend/cache/page_table.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

namespace moend {
namespace {

std::atomic<uint32_t>& References(const PageLayout& layout, uint8_t* page) {
  return *std::launder(reinterpret_cast<std::atomic<uint32_t>*>(page + layout.refs));
}

}  // namespace

uint64_t NextStamp() {
  static std::atomic<uint64_t> last{0};
  return last.fetch_add(1, std::memory_order_relaxed) + 1;
}

void Restamp(const PageLayout& layout, uint8_t* page) {
  const uint64_t stamp = NextStamp();
  std::memcpy(page + layout.stamp, &stamp, sizeof(stamp));
}

uint64_t PageStamp(const PageLayout& layout, const uint8_t* page) {
  uint64_t stamp = 0;
  std::memcpy(&stamp, page + layout.stamp, sizeof(stamp));
  return stamp;
}

Expected<PageRef> PageRef::Create(std::shared_ptr<Ledger> ledger, const PageLayout& layout) {
  auto* page = static_cast<uint8_t*>(ledger->Allocate(layout.bytes));
  if (!page) return Fail(ErrorCode::kOutOfMemory, "the system refused a page of {} bytes", layout.bytes);
  std::memset(page, 0, static_cast<std::size_t>(layout.bytes));
  new (page + layout.refs) std::atomic<uint32_t>(1);
  Restamp(layout, page);
  return PageRef(std::move(ledger), layout, page);
}

PageRef::~PageRef() {
  if (page_ && References(layout_, page_).fetch_sub(1, std::memory_order_acq_rel) == 1)
    ledger_->Free(page_, layout_.bytes);
}

bool IsShared(const PageLayout& layout, const uint8_t* page) {
  return References(layout, const_cast<uint8_t*>(page)).load(std::memory_order_acquire) > 1;
}

PageTable::PageTable(PageTable&& o) noexcept
    : ledger_(std::move(o.ledger_)),
      layout_(o.layout_),
      keep_scores_(o.keep_scores_),
      memory_(std::move(o.memory_)),
      capacity_(std::exchange(o.capacity_, 0)),
      size_(std::exchange(o.size_, 0)) {}

void PageTable::Clear() {
  for (int64_t i = 0; i < size_; ++i) PageRef::Adopt(ledger_, layout_, pages()[i]);
  memory_ = {};
  capacity_ = size_ = 0;
}

Expected<void> PageTable::Fit(int64_t pages) {
  const int64_t score_bytes = keep_scores_ ? sizeof(float) : 0, capacity = TableEntries(pages, score_bytes);
  if (capacity == capacity_) return {};
  PageTable fitted(ledger_, layout_, keep_scores_);
  MOEND_ASSIGN(fitted.memory_, Buffer<uint8_t>::Create(ledger_, TableBytes(pages, score_bytes)));
  fitted.capacity_ = capacity;
  if (size_ > 0) {
    fitted.size_ = size_;
    std::copy_n(this->pages(), size_, fitted.pages());
    std::copy_n(live(), size_, fitted.live());
    if (keep_scores_) std::copy_n(scores(), size_ * kPageTokens, fitted.scores());
    fitted.size_ = 0;  // the references stay with this table
  }
  memory_ = std::move(fitted.memory_);
  capacity_ = capacity;
  return {};
}

void PageTable::Push(PageRef page, uint64_t live) {
  pages()[size_] = page.Detach();
  this->live()[size_] = live;
  ++size_;
  if (keep_scores_) std::fill_n(scores() + (size_ - 1) * kPageTokens, kPageTokens, 0.0f);
}

Expected<PageTable> PageTable::Share() const {
  PageTable copy(ledger_, layout_, keep_scores_);
  MOEND_TRY(copy.Fit(size_));
  for (int64_t i = 0; i < size_; ++i) {
    References(layout_, pages()[i]).fetch_add(1, std::memory_order_relaxed);
    copy.Push(PageRef::Adopt(ledger_, layout_, pages()[i]), live()[i]);
  }
  if (keep_scores_ && size_ > 0) std::copy_n(scores(), size_ * kPageTokens, copy.scores());
  return copy;
}

}  // namespace moend
