// The bytes of a packed page and of a layer: one arithmetic for the solver (what would it cost), the cache
// (how much to allocate) and the kernels (where to read).
//
// A page holds kPageTokens tokens of one KV head: first the scales, then K, then V, each part on a cache
// line.
//
// Codes of 8, 4, 3 or 2 bits. K is quantized per channel over the page's tokens, V per token over groups of
// channels:
//     x ~ min + scale * code          (asymmetric; scale and min are IEEE half floats, code >= 0)
//   k_scale, k_min: f16 [head_size]            one pair a channel
//   v_scale, v_min: f16 [v_groups][64]         one pair a token and group of head_size / v_groups channels
// Before packing, the codes of a block are bytes in rows of 64, in an order that lets one vector lane
// accumulate one token (K) or one channel (V) while four neighbours of the summed axis lie in one 32-bit
// word:
//   K: row  r = quad * 4 + tv       byte lane * 4 + j  =  channel quad * 4 + j,  token tv * 16 + lane
//   V: row  r = cv * 16 + quad      byte lane * 4 + j  =  token quad * 4 + j,    channel cv * 16 + lane
// Both have head_size rows. Packing to n = 8, 4, 2 bits joins m = 8 / n consecutive rows into one row of 64
// bytes:
//   packed[i][b] = sum over s < m of row[i * m + s][b] << (s * n)
// 3 bits are a 2-bit plane of the low bits (head_size / 4 rows) followed by a 1-bit plane of the high bits
// (head_size / 8 rows), both packed as above.
//
// 16 bits ("not quantized"): no scales; K is f16 [head_size][64] (channel major), V is f16 [64][head_size].
#pragma once

#include <cstdint>

#include "moend/base/error.h"
#include "moend/plan/expert.h"

namespace moend {

inline constexpr int64_t kPageTokens = 64;
inline constexpr int64_t kRawBlockTokens = 16;  // granularity of the unquantized (raw) tokens
inline constexpr int64_t kPackTokens = 16;      // raw tokens beyond the window that are packed together
inline constexpr int64_t kEvictInterval = 128;  // generated tokens between two evictions

// Groups of channels that share a V scale: at most 64 channels where head_size allows it, else the whole
// head.
constexpr int64_t VGroups(int64_t head_size) {
  return head_size % 64 == 0 ? head_size / 64 : 1;
}

// Byte offsets inside a page; equal for all pages of a layer. Offsets of parts that a 16-bit side lacks are
// -1.
struct PageLayout {
  int64_t head_size = 0;
  int k_bits = 16, v_bits = 16;
  int64_t v_groups = 1;
  int64_t k_scale = -1, k_min = -1, v_scale = -1, v_min = -1;
  int64_t k_codes = 0, v_codes = 0;
  int64_t refs = 0;   // std::atomic<uint32_t>: caches that share the page
  int64_t stamp = 0;  // uint64_t that no other content of a page has
  int64_t bytes = 0;  // of the whole page
};

// kInvalidArgument for a head size or bit width outside the lists of expert.h.
Expected<PageLayout> MakePageLayout(int64_t head_size, int k_bits, int v_bits);

// kInvalidArgument, naming the value, for a shape, an expert or a guard that no cache can have.
Expected<void> CheckCacheConfig(const KvShape& shape, const Expert& expert, const Protected& guard);

// floor(keep * n_tokens), for ratios that binary cannot write, too.
int64_t ShareOf(double keep, int64_t n_tokens);

// Most tokens that each KV head holds after `n_tokens` were seen and eviction has run: keep * n_tokens, where
// what is not protected is rounded up to whole pages, for a page that is paid for is filled; never fewer than
// the protected ones and never more than n_tokens. Of these, sinks + window and up to kPackTokens - 1 more
// are raw.
int64_t KeptTokens(double keep, const Protected& guard, int64_t n_tokens);

// Pages that hold what is not protected of KeptTokens(); the last one may have room.
int64_t KeptPages(double keep, const Protected& guard, int64_t n_tokens);

// Raw tokens that a KV head has room for: sinks + window + those that are about to be packed, in whole
// blocks. In a short context it has less (MostBytes), or holds more (MostHeld).
int64_t RawCapacity(const Protected& guard);

// What a short context may take of bytes or tokens where the uncompressed cache takes n: 5 % more.
constexpr int64_t WithSlack(int64_t n) {
  return n + n / 20;
}

// A cache takes no more than the tokens seen would uncompressed, and one in twenty on top. In short contexts
// it has no room for tokens to come, and a page that would cost more than that is opened later. Where a full
// page with its table costs more (16 bit heads of 16 channels, with scores), this does not hold: INT64_MAX.
int64_t MostBytes(const PageLayout& layout, int64_t n_kv_heads, int64_t n_tokens, int64_t score_bytes);

// Raw tokens beyond the protected ones for which a page is opened whatever it costs: as many as cost as much
// as the page. kPackTokens where that is never asked; a page's worth at most.
int64_t MostHeld(const PageLayout& layout, int64_t score_bytes);

// The tables of a KV head grow and shrink in whole cache lines: entries of the page table (a pointer, a live
// mask and, with scores, 64 floats each) for `pages` pages, and bytes of the bitmap of `n_tokens` positions.
// Positions have a bitmap only where some are gone.
int64_t TableEntries(int64_t pages, int64_t score_bytes);
int64_t TableEntryBytes(int64_t score_bytes);
int64_t TableBytes(int64_t pages, int64_t score_bytes);
int64_t BitmapBytes(int64_t n_tokens);

// Most bytes that one layer's cache allocates at `n_tokens` tokens seen, right after eviction, with the raw
// part full: pages, raw blocks, page table, position bitmap, per-slot scorer state (`score_bytes` a slot: 0
// or 4); never more than MostBytes(). Between two evictions the tokens seen since then come on top, in whole
// pages. Exact where contexts are long enough that no page waits.
Expected<int64_t> LayerBytes(const KvShape& shape, const Expert& expert, const Protected& guard,
                             int64_t n_tokens, int64_t score_bytes);

// The same of a sliding layer, whose tokens see the newest `window` up to themselves: those at 16 bit and the
// kPackTokens that are about to be dropped, and nothing else.
Expected<int64_t> WindowBytes(const KvShape& shape, int64_t window, int64_t n_tokens);

// Bytes of the uncompressed cache that ratios are measured against: n_tokens x K and V at 16 bit, nothing
// else.
int64_t FullLayerBytes(const KvShape& shape, int64_t n_tokens);

}  // namespace moend
