#include "moend/plan/layout.h"

#include <algorithm>
#include <cmath>

#include "moend/base/ledger.h"

namespace moend {
namespace {

constexpr int64_t kMaxHeadSize = 256;
constexpr int64_t kMostKvHeads = int64_t{1} << 16;
constexpr int64_t kMaxProtected = int64_t{1} << 24;
constexpr int64_t kMostTokens = int64_t{1} << 31;  // positions are uint32_t
constexpr int64_t kHalfBytes = 2;

// Four page table entries without scores are one cache line; one with scores is four and a quarter.
constexpr int64_t kTableStep = 4;

int64_t TokenBytes(int64_t head_size) {
  return head_size * 2 * kHalfBytes;
}

// Bytes of the codes of 64 tokens of K or of V.
int64_t CodeBytes(int64_t head_size, int bits) {
  return head_size * kPageTokens * bits / 8;
}

Expected<void> CheckHeadSize(int64_t head_size) {
  if (head_size < 16 || head_size > kMaxHeadSize || head_size % 16 != 0)
    return Fail(ErrorCode::kInvalidArgument,
                "head size {} is not supported; it must be a multiple of 16 from 16 to {}", head_size,
                kMaxHeadSize);
  return {};
}

Expected<void> CheckBits(const char* what, int bits) {
  if (!IsBitWidth(bits))
    return Fail(ErrorCode::kInvalidArgument, "{} with {} bits is not supported; 16, 8, 4, 3 and 2 are", what,
                bits);
  return {};
}

// The most tokens seen at which a cache may hold back a page because of MostBytes(). Beyond that it may not:
// with the pages of all tokens, room for those that are dead, the raw ones and a bitmap it takes less.
int64_t LastHolding(const PageLayout& layout, const Protected& guard, int64_t score_bytes) {
  if (MostHeld(layout, score_bytes) <= kPackTokens) return 0;
  const int64_t token = TokenBytes(layout.head_size), guarded = guard.sinks + guard.window;
  const int64_t page = layout.bytes + TableEntryBytes(score_bytes);  // of kPageTokens tokens
  // Slots of pages without a token: those that eviction left dead, of the last one, and of the new one.
  constexpr int64_t kEmpty = 3 * kPageTokens;
  // For n tokens: (n - guarded + kEmpty) / 64 pages + guarded raw tokens + n / 8 and some for tables <=
  // n + n / 20 tokens - 1, all times 64.
  const int64_t each = WithSlack(kPageTokens * token) - page - kPageTokens / 8;
  const int64_t at_once = (kEmpty - guarded) * page + kPageTokens * ((guarded + 1) * token + 3 * kCacheLine);
  return each <= 0 ? kMostTokens : at_once <= 0 ? 0 : at_once / each + 1;
}

}  // namespace

Expected<PageLayout> MakePageLayout(int64_t head_size, int k_bits, int v_bits) {
  MOEND_TRY(CheckHeadSize(head_size));
  MOEND_TRY(CheckBits("K", k_bits));
  MOEND_TRY(CheckBits("V", v_bits));
  PageLayout layout;
  layout.head_size = head_size;
  layout.k_bits = k_bits;
  layout.v_bits = v_bits;
  layout.v_groups = VGroups(head_size);
  int64_t end = 0;
  const auto place = [&end](int64_t bytes) {
    const int64_t begin = end;
    end = RoundUp(end + bytes, kCacheLine);
    return begin;
  };
  if (k_bits != 16) {
    layout.k_scale = place(head_size * kHalfBytes);
    layout.k_min = place(head_size * kHalfBytes);
  }
  if (v_bits != 16) {
    layout.v_scale = place(layout.v_groups * kPageTokens * kHalfBytes);
    layout.v_min = place(layout.v_groups * kPageTokens * kHalfBytes);
  }
  layout.k_codes = place(CodeBytes(head_size, k_bits));
  layout.v_codes = place(CodeBytes(head_size, v_bits));
  layout.refs = place(2 * static_cast<int64_t>(sizeof(uint64_t)));
  layout.stamp = layout.refs + static_cast<int64_t>(sizeof(uint64_t));
  layout.bytes = end;
  return layout;
}

Expected<void> CheckCacheConfig(const KvShape& shape, const Expert& expert, const Protected& guard) {
  MOEND_TRY(CheckHeadSize(shape.head_size));
  MOEND_TRY(CheckBits("K", expert.k_bits));
  MOEND_TRY(CheckBits("V", expert.v_bits));
  if (shape.n_kv_heads < 1 || shape.n_kv_heads > kMostKvHeads)
    return Fail(ErrorCode::kInvalidArgument, "{} KV heads are not supported; 1 to {} are", shape.n_kv_heads,
                kMostKvHeads);
  if (!(expert.keep > 0.0 && expert.keep <= 1.0))
    return Fail(ErrorCode::kInvalidArgument, "a keep ratio of {} is not above 0 and at most 1", expert.keep);
  if (guard.sinks < 0 || guard.sinks > kMaxProtected)
    return Fail(ErrorCode::kInvalidArgument, "{} sinks are not possible; 0 to {} are", guard.sinks,
                kMaxProtected);
  if (guard.window < 0 || guard.window > kMaxProtected)
    return Fail(ErrorCode::kInvalidArgument, "a window of {} tokens is not possible; 0 to {} are",
                guard.window, kMaxProtected);
  return {};
}

int64_t ShareOf(double keep, int64_t n_tokens) {
  if (keep >= 1.0) return n_tokens;
  // The factor forgives the binary rounding of ratios: 0.29 of 100 tokens are 29.
  const double share = std::floor(keep * static_cast<double>(n_tokens) * (1.0 + 1e-12));
  return std::min(n_tokens, static_cast<int64_t>(share));
}

int64_t KeptTokens(double keep, const Protected& guard, int64_t n_tokens) {
  if (keep >= 1.0) return n_tokens;
  const int64_t guarded = guard.sinks + guard.window;
  const int64_t others = std::max<int64_t>(ShareOf(keep, n_tokens) - guarded, 0);
  return std::min(n_tokens, guarded + RoundUp(others, kPageTokens));
}

int64_t KeptPages(double keep, const Protected& guard, int64_t n_tokens) {
  const int64_t others = KeptTokens(keep, guard, n_tokens) - guard.sinks - guard.window;
  return RoundUp(std::max<int64_t>(others, 0), kPageTokens) / kPageTokens;
}

int64_t RawCapacity(const Protected& guard) {
  return RoundUp(guard.sinks + guard.window + kPackTokens, kRawBlockTokens);
}

int64_t TableEntries(int64_t pages, int64_t score_bytes) {
  return score_bytes > 0 ? pages : RoundUp(pages, kTableStep);
}

int64_t TableEntryBytes(int64_t score_bytes) {
  return static_cast<int64_t>(sizeof(uint8_t*) + sizeof(uint64_t)) + kPageTokens * score_bytes;
}

int64_t TableBytes(int64_t pages, int64_t score_bytes) {
  return RoundUp(TableEntries(pages, score_bytes) * TableEntryBytes(score_bytes), kCacheLine);
}

int64_t BitmapBytes(int64_t n_tokens) {
  return RoundUp(n_tokens, kCacheLine * 8) / 8;
}

int64_t MostBytes(const PageLayout& layout, int64_t n_kv_heads, int64_t n_tokens, int64_t score_bytes) {
  const int64_t token = TokenBytes(layout.head_size), page = layout.bytes + TableBytes(1, score_bytes);
  if (page > WithSlack(kPageTokens * token)) return INT64_MAX;
  return n_kv_heads * WithSlack(n_tokens) * token;
}

int64_t MostHeld(const PageLayout& layout, int64_t score_bytes) {
  const int64_t page = layout.bytes + TableBytes(1, score_bytes);
  if (MostBytes(layout, 1, 0, score_bytes) != 0) return kPackTokens;
  return std::clamp(RoundUp(page, kPackTokens * TokenBytes(layout.head_size)) / TokenBytes(layout.head_size),
                    kPackTokens, kPageTokens);
}

Expected<int64_t> LayerBytes(const KvShape& shape, const Expert& expert, const Protected& guard,
                             int64_t n_tokens, int64_t score_bytes) {
  MOEND_TRY(CheckCacheConfig(shape, expert, guard));
  if (n_tokens < 0 || n_tokens > kMostTokens)
    return Fail(ErrorCode::kInvalidArgument, "a context of {} tokens is not possible; 0 to {} are", n_tokens,
                kMostTokens);
  if (score_bytes != 0 && score_bytes != static_cast<int64_t>(sizeof(float)))
    return Fail(ErrorCode::kInvalidArgument, "{} bytes of score a slot; 0 or 4 are possible", score_bytes);
  MOEND_ASSIGN(const PageLayout layout, MakePageLayout(shape.head_size, expert.k_bits, expert.v_bits));
  // Of a KV head with room for so many raw tokens.
  const auto head = [&](int64_t n, int64_t raw) {
    const int64_t pages = KeptPages(expert.keep, guard, n);
    const int64_t bitmap = expert.keep < 1.0 && n > guard.sinks + guard.window ? BitmapBytes(n) : 0;
    return pages * layout.bytes + TableBytes(pages, score_bytes) + bitmap +
           std::min(raw, WithSlack(n)) * TokenBytes(shape.head_size);
  };
  const int64_t most_raw =
      RoundUp(guard.sinks + guard.window + MostHeld(layout, score_bytes), kRawBlockTokens);
  const int64_t held = std::min(n_tokens, LastHolding(layout, guard, score_bytes));
  const int64_t bytes = std::max(head(n_tokens, RawCapacity(guard)), head(held, most_raw));
  return std::min(shape.n_kv_heads * bytes, MostBytes(layout, shape.n_kv_heads, n_tokens, score_bytes));
}

Expected<int64_t> WindowBytes(const KvShape& shape, int64_t window, int64_t n_tokens) {
  const Protected newest{0, window};
  MOEND_TRY(CheckCacheConfig(shape, Expert{}, newest));
  if (n_tokens < 0 || n_tokens > kMostTokens)
    return Fail(ErrorCode::kInvalidArgument, "a context of {} tokens is not possible; 0 to {} are", n_tokens,
                kMostTokens);
  return FullLayerBytes(shape, std::min(RawCapacity(newest), WithSlack(n_tokens)));
}

int64_t FullLayerBytes(const KvShape& shape, int64_t n_tokens) {
  return n_tokens * shape.n_kv_heads * shape.head_size * 2 * kHalfBytes;
}

}  // namespace moend
