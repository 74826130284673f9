// What a LayerCache is made of; for the files of this room only.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "moend/base/caught.h"
#include "moend/cache/layer_cache.h"
#include "moend/cache/page_table.h"
#include "moend/cache/position_set.h"
#include "moend/cache/raw_tokens.h"

namespace moend {

struct CacheHead {
  explicit CacheHead(PageTable t) : table(std::move(t)) {}
  PageTable table;
  PositionSet positions;  // of all tokens held, raw ones included
  int64_t paged = 0;      // live tokens in pages
  bool filled = false;    // between BeginFill and EndFill
};

struct LayerCache::Impl {
  std::shared_ptr<Ledger> ledger;
  KvShape shape;
  Expert expert;
  Protected guard;
  bool keep_scores = false;
  bool sliding = false;  // guard.window is all that is remembered; heads have no positions
  std::shared_ptr<const KeyRotations> rotations;  // of these heads, or null
  PageLayout layout;
  int64_t tokens_seen = 0;
  int64_t n_raw = 0;
  std::atomic<uint64_t> version{NextStamp()}, pages_version{NextStamp()};  // heads may change together
  bool filling = false;
  // While filling: tokens seen, kept by each head, and of these in pages.
  int64_t fill_tokens = 0, fill_kept = 0, fill_paged = 0;
  RawTokens raw;
  std::vector<CacheHead> heads;

  static Expected<std::unique_ptr<Impl>> Create(std::shared_ptr<Ledger> ledger, const KvShape& shape,
                                                const Expert& expert, const Protected& guard,
                                                bool keep_scores,
                                                std::shared_ptr<const KeyRotations> rotations);
  explicit Impl(const KvShape& s) : shape(s), raw(s) {}

  CacheHead& head(int64_t h) { return heads[static_cast<std::size_t>(h)]; }
  const CacheHead& head(int64_t h) const { return heads[static_cast<std::size_t>(h)]; }
  bool HasHead(int64_t h) const { return h >= 0 && h < shape.n_kv_heads; }

  // How the keys in the pages of a head are turned; null: not at all.
  const KeyRotation* rotation(int64_t h) const {
    return rotations && expert.k_bits < 16 ? rotations->head(h) : nullptr;
  }
  // Packs the `live` ones of the 64 tokens in `from`, which may be changed, into a page of a head. `feedback`
  // may be null; if it is not, K of the other slots is to lie within the range of the live ones.
  void PackPage(int64_t h, PageScratch& from, const float* feedback, uint64_t live, uint8_t* page) const;

  // Tokens that can be packed into one page of every head: the last one, or a new one where that is full.
  int64_t Room() const {
    int64_t room = kPageTokens;
    for (const CacheHead& h : heads)
      if (h.table.Room() > 0) room = std::min(room, h.table.Room());
    return room;
  }
  int64_t Guarded() const { return guard.sinks + guard.window; }
  int64_t SinksSeen() const { return std::min(guard.sinks, n_raw); }

  int64_t ScoreBytes() const { return keep_scores ? static_cast<int64_t>(sizeof(float)) : 0; }
  int64_t Most(int64_t seen) const { return MostBytes(layout, shape.n_kv_heads, seen, ScoreBytes()); }
  // Bytes of `n` raw tokens of every head.
  int64_t RawBytes(int64_t n) const { return FullLayerBytes(shape, n); }
  // What every head's bitmap takes or may soon take when `seen` tokens were seen.
  int64_t Bitmaps(int64_t seen) const {
    return expert.keep < 1.0 && seen > Guarded() ? shape.n_kv_heads * BitmapBytes(seen) : 0;
  }
  // Bytes of all pages and tables, with a page more where the last one is full if `with_new`.
  int64_t Paged(bool with_new) const;
  // Whether `n` raw tokens, of `seen` that were seen, may go into pages, or a new page would take too much.
  bool MayPack(int64_t n, int64_t seen) const;
  // How many raw tokens to have room for while there are n, next to `others` bytes.
  int64_t RoomFor(int64_t n, int64_t seen, int64_t others) const;
  // Makes room for n raw tokens, of `seen` that will have been seen.
  Expected<void> ReserveRaw(int64_t n, int64_t seen);
  // Gives back what the raw tokens no longer need, and takes what they will, if there is memory for the copy.
  void SettleRaw();

  // What whoever changes more than raw tokens at the end calls afterwards; and more than the last page.
  void NoteChange() { version.store(NextStamp(), std::memory_order_relaxed); }
  void NotePagesChange() {
    NoteChange();
    pages_version.store(NextStamp(), std::memory_order_relaxed);
  }

  // Back to an empty cache; needs no memory.
  void Clear();

  // Appends m tokens to the raw ones; if these are then `limit`, packs as many as go into one page, or drops
  // what is no longer in the window. `at_any_price`: into a new page, too, that would take too much.
  Expected<void> AppendChunk(const float* k, const float* v, int64_t m, int64_t limit,
                             bool at_any_price = false);
};

}  // namespace moend
