#include "moend/cache/layer_cache.h"

#include <algorithm>
#include <cstring>

#include "moend/attention/rotation.h"
#include "moend/cache/codec.h"
#include "moend/cache/layer_cache_impl.h"

namespace moend {
namespace {

// Copies K (or V) of a page to a page that stores it with as many bits.
void CopySide(const PageLayout& from, const uint8_t* source, const PageLayout& to, uint8_t* page, bool keys) {
  const int bits = keys ? from.k_bits : from.v_bits;
  const int64_t scales = keys ? from.head_size : from.v_groups * kPageTokens;
  const auto copy = [&](int64_t from_offset, int64_t to_offset, int64_t bytes) {
    std::memcpy(page + to_offset, source + from_offset, static_cast<std::size_t>(bytes));
  };
  if (bits != 16) {
    copy(keys ? from.k_scale : from.v_scale, keys ? to.k_scale : to.v_scale, scales * 2);
    copy(keys ? from.k_min : from.v_min, keys ? to.k_min : to.v_min, scales * 2);
  }
  copy(keys ? from.k_codes : from.v_codes, keys ? to.k_codes : to.v_codes,
       from.head_size * kPageTokens * bits / 8);
}

}  // namespace

LayerCache::LayerCache() = default;
LayerCache::LayerCache(LayerCache&&) noexcept = default;
LayerCache& LayerCache::operator=(LayerCache&&) noexcept = default;
LayerCache::~LayerCache() = default;

Expected<std::unique_ptr<LayerCache::Impl>> LayerCache::Impl::Create(
    std::shared_ptr<Ledger> ledger, const KvShape& shape, const Expert& expert, const Protected& guard,
    bool keep_scores, std::shared_ptr<const KeyRotations> turns) {
  MOEND_TRY(CheckCacheConfig(shape, expert, guard));
  if (turns && turns->shape() != shape)
    return Fail(ErrorCode::kInvalidArgument, "rotations of {} KV heads of size {} for a cache of {} of {}",
                turns->shape().n_kv_heads, turns->shape().head_size, shape.n_kv_heads, shape.head_size);
  auto impl = std::make_unique<Impl>(shape);
  impl->ledger = ledger ? std::move(ledger) : std::make_shared<Ledger>();
  impl->expert = expert;
  impl->guard = guard;
  impl->keep_scores = keep_scores;
  impl->rotations = std::move(turns);
  MOEND_ASSIGN(impl->layout, MakePageLayout(shape.head_size, expert.k_bits, expert.v_bits));
  impl->heads.reserve(static_cast<std::size_t>(shape.n_kv_heads));
  for (int64_t h = 0; h < shape.n_kv_heads; ++h)
    impl->heads.emplace_back(PageTable(impl->ledger, impl->layout, keep_scores));
  return impl;
}

Expected<LayerCache> LayerCache::Create(std::shared_ptr<Ledger> ledger, const KvShape& shape,
                                        const Expert& expert, const Protected& guard, bool keep_scores,
                                        std::shared_ptr<const KeyRotations> rotations) {
  return CatchBadAlloc([&]() -> Expected<LayerCache> {
    LayerCache cache;
    MOEND_ASSIGN(cache.impl_,
                 Impl::Create(std::move(ledger), shape, expert, guard, keep_scores, std::move(rotations)));
    return cache;
  });
}

Expected<LayerCache> LayerCache::CreateSliding(std::shared_ptr<Ledger> ledger, const KvShape& shape,
                                               int64_t window) {
  if (window < 1)
    return Fail(ErrorCode::kInvalidArgument, "a sliding layer that sees {} tokens; it must be 1 or more",
                window);
  MOEND_ASSIGN(auto cache, Create(std::move(ledger), shape, Expert{}, Protected{0, window}, false));
  cache.impl_->sliding = true;
  return cache;
}

void LayerCache::Impl::PackPage(int64_t h, PageScratch& from, const float* feedback, uint64_t live,
                                uint8_t* page) const {
  if (const KeyRotation* turn = rotation(h))
    simd::RotateLanes(from.k.data(), shape.head_size, turn->balance, nullptr);
  if (feedback && layout.k_bits < 16) {
    PackKeysFeedback(layout, from.k.data(), feedback, page);
  } else {
    PackKeys(layout, from.k.data(), live, page);
  }
  PackValues(layout, from.v.data(), live, page);
}

int64_t LayerCache::Impl::Paged(bool with_new) const {
  int64_t bytes = 0;
  for (const CacheHead& h : heads) {
    bytes += h.table.bytes();
    const int64_t n = h.table.size();
    if (with_new && h.table.Room() == 0)
      bytes += layout.bytes + TableBytes(n + 1, ScoreBytes()) - TableBytes(n, ScoreBytes());
  }
  return bytes;
}

bool LayerCache::Impl::MayPack(int64_t n, int64_t seen) const {
  const bool opens = std::ranges::any_of(heads, [](const CacheHead& h) { return h.table.Room() == 0; });
  if (!opens || n - Guarded() >= MostHeld(layout, ScoreBytes())) return true;
  return Paged(true) + Bitmaps(seen) + RawBytes(n - std::min(Room(), n - Guarded())) <= Most(seen);
}

int64_t LayerCache::Impl::RoomFor(int64_t n, int64_t seen, int64_t others) const {
  // MostBytes() of pages that cost nothing, for where there is no other limit.
  const int64_t token = RawBytes(1), most = Most(seen);
  const int64_t limit = most == INT64_MAX ? WithSlack(seen) : (most - others) / token;
  return std::max(n, std::min(std::max(RawCapacity(guard), RoundUp(n, kRawBlockTokens)), limit));
}

Expected<void> LayerCache::Impl::ReserveRaw(int64_t n, int64_t seen) {
  if (n <= raw.capacity()) return {};
  return raw.Resize(ledger, RoomFor(n, seen, Paged(false) + Bitmaps(seen)));
}

void LayerCache::Impl::SettleRaw() {
  const int64_t room = RoomFor(n_raw, tokens_seen, Paged(false) + Bitmaps(tokens_seen));
  if (raw.capacity() > room || (raw.capacity() < room && room == RawCapacity(guard)))
    (void)raw.Resize(ledger, room);
}

void LayerCache::Impl::Clear() {
  for (CacheHead& head : heads) {
    head.table.Clear();
    head.positions = {};
    head.paged = 0;
    head.filled = false;
  }
  raw = RawTokens(shape);
  tokens_seen = n_raw = 0;
  NotePagesChange();
}

Expected<LayerCache> LayerCache::Fork() const {
  return Repack(impl_->expert);
}

Expected<LayerCache> LayerCache::Repack(const Expert& expert) const {
  const Impl& s = *impl_;
  if (s.filling) return Fail(ErrorCode::kInvalidArgument, "a cache that is being filled cannot be copied");
  if (s.sliding && expert != Expert{})
    return Fail(ErrorCode::kInvalidArgument, "the cache of a sliding layer cannot be compressed");
  return CatchBadAlloc([&]() -> Expected<LayerCache> {
    LayerCache cache;
    MOEND_ASSIGN(cache.impl_, Impl::Create(s.ledger, s.shape, expert, s.guard, s.keep_scores, s.rotations));
    Impl& d = *cache.impl_;
    d.sliding = s.sliding;
    d.tokens_seen = s.tokens_seen;
    d.n_raw = s.n_raw;
    MOEND_ASSIGN(d.raw, s.raw.Copy(s.ledger));
    const bool same_k = expert.k_bits == s.expert.k_bits, same_v = expert.v_bits == s.expert.v_bits;
    PageScratch scratch;
    if (!same_k || !same_v) {
      MOEND_ASSIGN(scratch, PageScratch::Create(s.shape.head_size));
    }
    d.heads.clear();
    for (int64_t h = 0; h < s.shape.n_kv_heads; ++h) {
      const CacheHead& from = s.head(h);
      const KeyRotation *was = s.rotation(h), *becomes = d.rotation(h);
      if (same_k && same_v) {
        MOEND_ASSIGN(auto shared, from.table.Share());
        d.heads.emplace_back(std::move(shared));
      } else {
        d.heads.emplace_back(PageTable(s.ledger, d.layout, s.keep_scores));
        PageTable& table = d.heads.back().table;
        MOEND_TRY(table.Fit(from.table.size()));
        for (int64_t i = 0; i < from.table.size(); ++i) {
          MOEND_ASSIGN(auto page, PageRef::Create(s.ledger, d.layout));
          const uint8_t* source = from.table.pages()[i];
          const uint64_t live = from.table.live()[i];
          if (same_k) {
            CopySide(s.layout, source, d.layout, page.data(), true);
          } else {
            UnpackKeys(s.layout, source, scratch.k.data());
            // Rotated keys are packed anew as they are.
            if (was && !becomes)
              simd::RotateLanes(scratch.k.data(), s.shape.head_size, nullptr, was->inverse);
            if (!was && becomes)
              simd::RotateLanes(scratch.k.data(), s.shape.head_size, becomes->balance, nullptr);
            PackKeys(d.layout, scratch.k.data(), live, page.data());
          }
          if (same_v) {
            CopySide(s.layout, source, d.layout, page.data(), false);
          } else {
            UnpackValues(s.layout, source, scratch.v.data());
            PackValues(d.layout, scratch.v.data(), live, page.data());
          }
          table.Push(std::move(page), live);
        }
        if (const float* scores = from.table.scores())
          std::copy_n(scores, table.size() * kPageTokens, table.scores());
      }
      CacheHead& to = d.heads.back();
      to.paged = from.paged;
      MOEND_ASSIGN(to.positions, from.positions.Copy(s.ledger));
    }
    return cache;
  });
}

StreamView LayerCache::view(int64_t head) const {
  const Impl& s = *impl_;
  StreamView view;
  view.layout = s.layout;
  view.rotation = s.rotation(head);
  const PageTable& table = s.head(head).table;
  view.n_pages = table.size();
  if (view.n_pages > 0) {
    view.pages = table.pages();
    view.live = table.live();
  }
  view.n_raw = s.n_raw;
  if (view.n_raw > 0) {
    view.raw_k = s.raw.keys(head);
    view.raw_v = s.raw.values(head);
    view.raw_tail = s.raw.Lanes((view.n_raw - 1) / kRawBlockTokens);
  }
  return view;
}

std::vector<uint32_t> LayerCache::positions(int64_t head) const {
  const Impl& s = *impl_;
  const CacheHead& from = s.head(head);
  std::vector<uint32_t> ascending;
  if (s.sliding) {
    for (int64_t i = s.tokens_seen - s.n_raw; i < s.tokens_seen; ++i)
      ascending.push_back(static_cast<uint32_t>(i));
    return ascending;
  }
  ascending.reserve(static_cast<std::size_t>(from.paged + s.n_raw));
  from.positions.ForEach([&](int64_t position) { ascending.push_back(static_cast<uint32_t>(position)); });
  // The sinks come before the paged tokens, but are raw.
  std::rotate(ascending.begin(), ascending.begin() + s.SinksSeen(),
              ascending.begin() + s.SinksSeen() + from.paged);
  return ascending;
}

uint64_t LayerCache::version() const {
  return impl_->version.load(std::memory_order_relaxed);
}
uint64_t LayerCache::pages_version() const {
  return impl_->pages_version.load(std::memory_order_relaxed);
}
float* LayerCache::scores(int64_t head) {
  return impl_->head(head).table.scores();
}
const KvShape& LayerCache::shape() const {
  return impl_->shape;
}
bool LayerCache::sliding() const {
  return impl_->sliding;
}
const Expert& LayerCache::expert() const {
  return impl_->expert;
}
const Protected& LayerCache::guard() const {
  return impl_->guard;
}
int64_t LayerCache::tokens_seen() const {
  return impl_->tokens_seen;
}
int64_t LayerCache::tokens(int64_t head) const {
  return impl_->head(head).paged + impl_->n_raw;
}
int64_t LayerCache::bytes() const {
  int64_t bytes = impl_->raw.bytes();
  for (const CacheHead& head : impl_->heads) bytes += head.table.bytes() + head.positions.bytes();
  return bytes;
}

}  // namespace moend
