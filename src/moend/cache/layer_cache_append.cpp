#include <algorithm>

#include "moend/attention/rotation.h"
#include "moend/base/caught.h"
#include "moend/cache/codec.h"
#include "moend/cache/layer_cache_impl.h"
#include "moend/cache/value_transfer.h"

namespace moend {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 31;  // positions are uint32_t

// Puts tokens behind the last live one of a page that has room for them. V is moved as it is stored, K is
// packed again, which changes no code of a channel whose range the new tokens do not widen.
class PageFiller {
 public:
  static Expected<PageFiller> Create(const PageLayout& layout) {
    MOEND_ASSIGN(auto values, ValueTransfer::Create(layout));
    MOEND_ASSIGN(auto fresh, Buffer<uint8_t>::Create(nullptr, layout.bytes));
    MOEND_ASSIGN(auto old, PageScratch::Create(layout.head_size));
    return PageFiller(layout, std::move(values), std::move(fresh), std::move(old));
  }

  // `added`, in the first n slots, becomes the tokens [slot, slot + n) of `page`, whose `live` ones are read
  // from `from`; that may be `page` itself. `turn`: how the page's keys are rotated, or null.
  void Fill(const uint8_t* from, uint64_t live, PageScratch& added, int64_t slot, int64_t n,
            const KeyRotation* turn, uint8_t* page) {
    const int64_t hs = layout_.head_size;
    if (turn) simd::RotateLanes(added.k.data(), hs, turn->balance, nullptr);
    PackValues(layout_, added.v.data(), FirstSlots(n), fresh_.data());
    UnpackKeys(layout_, from, old_.k.data());
    for (int64_t c = 0; c < hs; ++c)
      std::copy_n(added.k.data() + c * kPageTokens, n, old_.k.data() + c * kPageTokens + slot);
    values_.Open(from);
    for (uint64_t left = live; left; left &= left - 1)
      values_.Move(std::countr_zero(left), std::countr_zero(left));
    values_.Open(fresh_.data());
    for (int64_t t = 0; t < n; ++t) values_.Move(t, slot + t);
    PackKeys(layout_, old_.k.data(), live | FirstSlots(n) << slot, page);
    values_.Flush(page);
  }

 private:
  PageFiller(const PageLayout& layout, ValueTransfer values, Buffer<uint8_t> fresh, PageScratch old)
      : layout_(layout), values_(std::move(values)), fresh_(std::move(fresh)), old_(std::move(old)) {}
  PageLayout layout_;
  ValueTransfer values_;
  Buffer<uint8_t> fresh_;  // a page of the added tokens
  PageScratch old_;
};

}  // namespace

Expected<void> LayerCache::Impl::AppendChunk(const float* k, const float* v, int64_t m, int64_t limit,
                                             bool at_any_price) {
  // First everything that can fail.
  const bool packs = n_raw + m == limit && (sliding || at_any_price || MayPack(n_raw + m, tokens_seen + m));
  MOEND_TRY(ReserveRaw(n_raw + m, tokens_seen + m));
  if (!sliding)
    for (CacheHead& head : heads) MOEND_TRY(head.positions.Reserve(ledger, tokens_seen + m));
  PageScratch scratch;
  std::optional<PageFiller> filler;
  std::vector<PageRef> pages;  // new ones, and copies of shared ones
  if (packs && !sliding) {
    MOEND_ASSIGN(scratch, PageScratch::Create(shape.head_size));
    pages.resize(heads.size());
    for (std::size_t h = 0; h < heads.size(); ++h) {
      PageTable& table = heads[h].table;
      if (table.Room() > 0) {
        if (!filler) {
          MOEND_ASSIGN(filler, PageFiller::Create(layout));
        }
        if (!IsShared(layout, table.pages()[table.size() - 1])) continue;
      } else {
        MOEND_TRY(table.Fit(table.size() + 1));
      }
      MOEND_ASSIGN(pages[h], PageRef::Create(ledger, layout));
    }
  }

  for (int64_t h = 0; h < shape.n_kv_heads; ++h) {
    for (int64_t i = 0; i < m; ++i) {
      const int64_t offset = (i * shape.n_kv_heads + h) * shape.head_size;
      raw.Store(h, n_raw + i, k + offset, v + offset);
    }
    if (!sliding) head(h).positions.Add(m);
  }
  n_raw += m;
  tokens_seen += m;
  if (!packs) return {};
  NoteChange();
  if (sliding) {
    for (int64_t h = 0; h < shape.n_kv_heads; ++h) raw.Remove(h, 0, n_raw - guard.window, n_raw);
    n_raw = guard.window;
    return {};
  }
  const int64_t count = std::min(Room(), n_raw - Guarded());
  for (int64_t h = 0; h < shape.n_kv_heads; ++h) {
    PageTable& table = head(h).table;
    PageRef& page = pages[static_cast<std::size_t>(h)];
    raw.Load(h, guard.sinks, count, 0, scratch);
    if (table.Room() == 0) {
      PackPage(h, scratch, nullptr, FirstSlots(count), page.data());
      table.Push(std::move(page), FirstSlots(count));
    } else {
      uint8_t*& last = table.pages()[table.size() - 1];
      uint64_t& live = table.live()[table.size() - 1];
      const int64_t slot = kPageTokens - table.Room();
      uint8_t* to = page.data() ? page.data() : last;
      filler->Fill(last, live, scratch, slot, count, rotation(h), to);
      Restamp(layout, to);
      if (page.data()) PageRef::Adopt(ledger, layout, std::exchange(last, page.Detach()));
      live |= FirstSlots(count) << slot;
      if (float* scores = table.scores())
        std::fill_n(scores + (table.size() - 1) * kPageTokens + slot, count, 0.0f);
    }
    head(h).paged += count;
    raw.Remove(h, guard.sinks, count, n_raw);
  }
  n_raw -= count;
  return {};
}

Expected<void> LayerCache::Append(const float* k, const float* v, int64_t n) {
  Impl& s = *impl_;
  if (n < 0 || s.filling)
    return Fail(ErrorCode::kInvalidArgument, "{} tokens cannot be appended{}", n,
                s.filling ? " while the cache is being filled" : "");
  if (n > kMaxTokens - s.tokens_seen)
    return Fail(ErrorCode::kTooLong, "{} more tokens after {} are beyond the {} that a cache can number", n,
                s.tokens_seen, kMaxTokens);
  return CatchBadAlloc([&]() -> Expected<void> {
    const int64_t stride = s.shape.n_kv_heads * s.shape.head_size;
    for (int64_t done = 0; done < n;) {
      // As many as there are for a page are packed in one go; in steps where a new page has to wait.
      const int64_t room = s.Room(), held = s.n_raw - s.Guarded(), unguarded = held + n - done;
      int64_t together = unguarded >= room ? room : unguarded / kPackTokens * kPackTokens;
      if (s.sliding || together < kPackTokens) together = kPackTokens;
      if (together <= held) together = (held / kPackTokens + 1) * kPackTokens;
      const int64_t limit = s.Guarded() + together;
      const int64_t m = std::min(n - done, limit - s.n_raw);
      MOEND_TRY(s.AppendChunk(k + done * stride, v + done * stride, m, limit));
      done += m;
    }
    s.SettleRaw();
    return {};
  });
}

Expected<void> LayerCache::PackExcess() {
  Impl& s = *impl_;
  if (s.sliding || s.filling || s.n_raw - s.Guarded() < kPackTokens) return {};
  const int64_t kept = KeptTokens(s.expert.keep, s.guard, s.tokens_seen);
  if (s.n_raw <= kept) return {};  // pages hold enough to evict
  return CatchBadAlloc([&]() -> Expected<void> {
    while (s.n_raw > s.Guarded()) MOEND_TRY(s.AppendChunk(nullptr, nullptr, 0, s.n_raw, true));
    s.SettleRaw();
    return {};
  });
}

Expected<void> LayerCache::AppendNewest(std::span<const DenseView> from) {
  Impl& s = *impl_;
  const int64_t n = from.empty() ? 0 : from[0].n_tokens;
  const bool fits = std::ranges::all_of(
      from, [&](const DenseView& head) { return head.head_size == s.shape.head_size && head.n_tokens == n; });
  if (!s.sliding || !fits || std::ssize(from) != s.shape.n_kv_heads || n < 0)
    return Fail(ErrorCode::kInvalidArgument,
                "{} tokens of {} KV heads cannot be appended to a {} cache of {}", n, from.size(),
                s.sliding ? "sliding" : "full", s.shape.n_kv_heads);
  if (n > kMaxTokens - s.tokens_seen)
    return Fail(ErrorCode::kTooLong, "{} more tokens after {} are beyond the {} that a cache can number", n,
                s.tokens_seen, kMaxTokens);
  return CatchBadAlloc([&]() -> Expected<void> {
    const int64_t window = s.guard.window, added = std::min(n, window);
    const int64_t kept = std::min(s.n_raw, window - added);  // of those that are there
    // With room for those that follow, so that no more is allocated later.
    if (kept + added > s.raw.capacity())
      MOEND_TRY(
          s.raw.Resize(s.ledger, std::max(kept + added, std::min(s.tokens_seen + n, RawCapacity(s.guard)))));
    for (int64_t h = 0; h < s.shape.n_kv_heads; ++h) {
      s.raw.Remove(h, 0, s.n_raw - kept, s.n_raw);
      const DenseView& head = from[static_cast<std::size_t>(h)];
      for (int64_t i = 0; i < added; ++i) s.raw.Store(h, kept + i, head, n - added + i);
    }
    s.n_raw = kept + added;
    s.tokens_seen += n;
    s.NoteChange();
    return {};
  });
}

}  // namespace moend
