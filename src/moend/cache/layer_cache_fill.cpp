#include <algorithm>
#include <array>

#include "moend/cache/codec.h"
#include "moend/cache/layer_cache_impl.h"

namespace moend {
namespace {

// Tokens at n <= 64 ascending positions, as floats. Slots behind them repeat K of the last one, so that they
// do not count where all slots are looked at.
void LoadPage(const DenseView& from, const uint32_t* positions, int64_t n, PageScratch& to) {
  const int64_t hs = from.head_size;
  for (int64_t t = 0; t < n;) {
    // Neighbours of one block are copied together.
    const int64_t position = positions[t], in_block = position % kPageTokens;
    int64_t run = 1;
    while (t + run < n && in_block + run < kPageTokens && positions[t + run] == position + run) ++run;
    const uint16_t* k = from.k + (position - in_block) * hs + in_block;
    for (int64_t c = 0; c < hs; ++c)
      std::copy_n(k + c * kPageTokens, run, to.halves.data() + c * kPageTokens + t);
    t += run;
  }
  if (n < kPageTokens)
    for (int64_t c = 0; c < hs; ++c) {
      uint16_t* row = to.halves.data() + c * kPageTokens;
      std::fill(row + n, row + kPageTokens, row[n - 1]);
    }
  HalvesToFloats(to.halves.data(), hs * kPageTokens, to.k.data());
  for (int64_t t = 0; t < n;) {
    int64_t run = 1;
    while (t + run < n && positions[t + run] == positions[t] + run) ++run;
    HalvesToFloats(from.v + positions[t] * hs, run * hs, to.v.data() + t * hs);
    t += run;
  }
}

// Whether `kept` ascends below n, with the first `sinks` and the last `window` positions in it.
bool IsValidSelection(std::span<const uint32_t> kept, int64_t sinks, int64_t window, int64_t n) {
  const auto size = static_cast<int64_t>(kept.size());
  if (size > n || size < std::min(n, sinks + window)) return false;
  for (int64_t i = 1; i < size; ++i)
    if (kept[i] <= kept[i - 1]) return false;
  if (size == 0) return true;
  const int64_t first = std::min(sinks, size), last = std::min(window, size);
  return kept[size - 1] < n && (first == 0 || kept[first - 1] == first - 1) &&
         (last == 0 || kept[size - last] == n - last);
}

}  // namespace

Expected<void> LayerCache::BeginFill(int64_t n_tokens, int64_t n_kept) {
  Impl& s = *impl_;
  if (s.sliding) return Fail(ErrorCode::kInvalidArgument, "a sliding cache is appended to, not filled");
  if (s.tokens_seen > 0 || s.filling)
    return Fail(ErrorCode::kInvalidArgument, "only an empty cache can be filled; this one saw {} tokens",
                s.tokens_seen);
  const int64_t guarded = s.Guarded();
  if (n_kept < std::min(n_tokens, guarded) || n_kept > n_tokens || n_tokens > int64_t{1} << 31)
    return Fail(ErrorCode::kInvalidArgument,
                "{} of {} tokens cannot be kept; at least the {} protected ones must be, at most all", n_kept,
                n_tokens, std::min(n_tokens, guarded));
  // What is left of whole pages goes into one that has room, or waits among the raw tokens.
  const int64_t sum = std::max<int64_t>(0, n_kept - guarded), left = sum % kPageTokens;
  const auto bytes = [&](int64_t paged) {
    const int64_t pages = RoundUp(paged, kPageTokens) / kPageTokens;
    return s.shape.n_kv_heads * (pages * s.layout.bytes + TableBytes(pages, s.ScoreBytes())) +
           s.Bitmaps(n_tokens);
  };
  const bool waits = left > 0 && left < MostHeld(s.layout, s.ScoreBytes()) &&
                     bytes(sum) + s.RawBytes(n_kept - sum) > s.Most(n_tokens);
  const int64_t paged = waits ? sum - left : sum;
  // With room for those that follow, so that in a long context no more is allocated for raw tokens later.
  MOEND_TRY(CatchBadAlloc(
      [&] { return s.raw.Resize(s.ledger, s.RoomFor(n_kept - paged, n_tokens, bytes(paged))); }));
  s.filling = true;
  s.fill_tokens = n_tokens;
  s.fill_kept = n_kept;
  s.fill_paged = paged;
  return {};
}

Expected<void> LayerCache::FillHead(int64_t h, const DenseView& from, std::span<const uint32_t> kept,
                                    const float* scores, const float* feedback) {
  Impl& s = *impl_;
  if (!s.filling || !s.HasHead(h) || s.head(h).filled)
    return Fail(ErrorCode::kInvalidArgument, "KV head {} of {} is not waiting to be filled", h,
                s.shape.n_kv_heads);
  if (from.head_size != s.shape.head_size || from.n_tokens != s.fill_tokens)
    return Fail(ErrorCode::kInvalidArgument,
                "{} tokens of head size {} cannot fill a cache that expects {} of {}", from.n_tokens,
                from.head_size, s.fill_tokens, s.shape.head_size);
  return CatchBadAlloc([&]() -> Expected<void> {
    std::vector<uint32_t> all;
    if (kept.empty() && s.fill_kept == s.fill_tokens) {
      all.resize(static_cast<std::size_t>(s.fill_tokens));
      for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint32_t>(i);
      kept = all;
    }
    if (static_cast<int64_t>(kept.size()) != s.fill_kept ||
        !IsValidSelection(kept, s.guard.sinks, s.guard.window, s.fill_tokens))
      return Fail(
          ErrorCode::kInvalidArgument,
          "the {} kept positions of KV head {} are not {} ascending ones below {} with all sinks and the "
          "newest {} among them",
          kept.size(), h, s.fill_kept, s.fill_tokens, s.guard.window);

    CacheHead& head = s.head(h);
    const int64_t paged = s.fill_paged;
    const int64_t pages = RoundUp(paged, kPageTokens) / kPageTokens;
    const int64_t sinks = std::min(s.guard.sinks, s.fill_kept);
    MOEND_TRY(head.table.Fit(pages));
    if (s.fill_kept == s.fill_tokens) {
      head.positions.Add(s.fill_tokens);
    } else {
      MOEND_TRY(head.positions.StartEmpty(s.ledger, s.fill_tokens));
      for (const uint32_t position : kept) head.positions.Insert(position);
    }
    MOEND_ASSIGN(auto scratch, PageScratch::Create(s.shape.head_size));
    for (int64_t i = 0; i < pages; ++i) {
      const uint32_t* positions = kept.data() + sinks + i * kPageTokens;
      const int64_t n = std::min(kPageTokens, paged - i * kPageTokens);
      MOEND_ASSIGN(auto page, PageRef::Create(s.ledger, s.layout));
      LoadPage(from, positions, n, scratch);
      s.PackPage(h, scratch, feedback, FirstSlots(n), page.data());
      head.table.Push(std::move(page), FirstSlots(n));
      if (float* out = head.table.scores(); out && scores)
        for (int64_t t = 0; t < n; ++t) out[i * kPageTokens + t] = scores[positions[t]];
    }
    head.paged = paged;
    for (int64_t i = 0; i < sinks; ++i) s.raw.Store(h, i, from, kept[i]);
    for (int64_t i = sinks + head.paged; i < s.fill_kept; ++i) s.raw.Store(h, i - head.paged, from, kept[i]);
    head.filled = true;
    return {};
  });
}

Expected<void> LayerCache::EndFill() {
  Impl& s = *impl_;
  return CatchBadAlloc([&]() -> Expected<void> {
    if (!s.filling) return Fail(ErrorCode::kInvalidArgument, "the cache is not being filled");
    s.filling = false;
    const int64_t filled =
        std::count_if(s.heads.begin(), s.heads.end(), [](auto& head) { return head.filled; });
    if (filled < s.shape.n_kv_heads) {
      s.Clear();  // what was filled is of no use without the rest
      return Fail(ErrorCode::kInvalidArgument, "only {} of {} KV heads were filled", filled,
                  s.shape.n_kv_heads);
    }
    s.tokens_seen = s.fill_tokens;
    s.n_raw = s.fill_kept - s.heads[0].paged;
    s.NotePagesChange();
    return {};
  });
}

Expected<void> LayerCache::Fill(std::span<const DenseView> heads, std::span<const std::vector<uint32_t>> kept,
                                std::span<const float* const> scores) {
  const int64_t n_heads = impl_->shape.n_kv_heads;
  const auto fits = [&](std::size_t n) { return static_cast<int64_t>(n) == n_heads; };
  if (!fits(heads.size()) || !fits(kept.size()) || !(scores.empty() || fits(scores.size())))
    return Fail(ErrorCode::kInvalidArgument,
                "a cache of {} KV heads was given {} heads, {} selections, {} scores", n_heads, heads.size(),
                kept.size(), scores.size());
  const int64_t n_tokens = heads[0].n_tokens;
  MOEND_TRY(BeginFill(n_tokens, kept[0].empty() ? n_tokens : static_cast<int64_t>(kept[0].size())));
  for (std::size_t h = 0; h < heads.size(); ++h) {
    auto filled = FillHead(static_cast<int64_t>(h), heads[h], kept[h], scores.empty() ? nullptr : scores[h]);
    if (!filled) {
      (void)EndFill();
      return Forward(filled);
    }
  }
  return EndFill();
}

}  // namespace moend
