#include <algorithm>
#include <bit>
#include <cmath>

#include "moend/cache/compaction.h"
#include "moend/cache/layer_cache_impl.h"

namespace moend {
namespace {

struct Candidate {
  float score;
  int64_t slot;  // page * 64 + slot
  int64_t rank;  // among the live paged tokens
};

bool GoesFirst(const Candidate& a, const Candidate& b) {
  return a.score != b.score ? a.score < b.score : a.slot < b.slot;
}

}  // namespace

int64_t LayerCache::Excess(int64_t head) const {
  const Impl& s = *impl_;
  const int64_t paged = s.head(head).paged;
  const int64_t excess = paged + s.n_raw - KeptTokens(s.expert.keep, s.guard, s.tokens_seen);
  return std::clamp<int64_t>(excess, 0, paged);
}

Expected<void> LayerCache::Evict(int64_t h, std::span<const float> scores, int64_t count) {
  Impl& s = *impl_;
  if (!s.HasHead(h) || s.filling)
    return Fail(ErrorCode::kInvalidArgument, "KV head {} of {} cannot evict{}", h, s.shape.n_kv_heads,
                s.filling ? " while the cache is being filled" : "");
  CacheHead& head = s.head(h);
  PageTable& table = head.table;
  if (static_cast<int64_t>(scores.size()) != table.size() * kPageTokens && (count > 0 || !scores.empty()))
    return Fail(ErrorCode::kInvalidArgument, "{} scores were given for {} pages of {} slots", scores.size(),
                table.size(), kPageTokens);
  count = std::clamp<int64_t>(count, 0, head.paged);
  // Room that a new last page brought may be a page's worth together with what was dead before.
  if (count == 0 && table.size() * kPageTokens - head.paged < kPageTokens) return {};
  return CatchBadAlloc([&]() -> Expected<void> {
    std::vector<Candidate> candidates;
    candidates.reserve(static_cast<std::size_t>(head.paged));
    for (int64_t page = 0; page < table.size(); ++page) {
      for (uint64_t left = table.live()[page]; left; left &= left - 1) {
        const int64_t slot = page * kPageTokens + std::countr_zero(left);
        const float score = scores.empty() ? 0 : scores[static_cast<std::size_t>(slot)];
        // An undefined score must not undo the order.
        candidates.push_back(
            {std::isnan(score) ? -INFINITY : score, slot, static_cast<int64_t>(candidates.size())});
      }
    }
    const auto end = candidates.begin() + count;
    std::nth_element(candidates.begin(), end, candidates.end(), GoesFirst);

    std::vector<uint64_t> live(table.live(), table.live() + table.size());
    std::vector<char> goes(candidates.size());
    for (auto c = candidates.begin(); c != end; ++c) {
      live[static_cast<std::size_t>(c->slot / kPageTokens)] &= ~(uint64_t{1} << c->slot % kPageTokens);
      goes[static_cast<std::size_t>(c->rank)] = 1;
    }
    if (count > 0) MOEND_TRY(head.positions.MakeErasable(s.ledger));
    MOEND_TRY(Compact(table, live));
    s.NotePagesChange();
    int64_t rank = -s.SinksSeen();
    head.positions.ForEach([&](int64_t position) {
      if (rank >= 0 && rank < head.paged && goes[static_cast<std::size_t>(rank)])
        head.positions.Erase(position);
      ++rank;
    });
    head.paged -= count;
    // A table that stays too large is no error.
    (void)table.Fit(table.size());
    return {};
  });
}

}  // namespace moend
