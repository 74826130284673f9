// The compressed K/V cache of one layer. Each KV head keeps its own tokens:
//
//     sinks (raw) | packed pages of 64, ascending positions, some slots evicted | newest tokens (raw)
//
// Raw tokens are unquantized half floats. When sinks + window + 16 raw tokens are there, the oldest behind
// the sinks are packed: into the room that the last page has behind its last live slot, else into a new page;
// later where a new page would take the cache beyond MostBytes(), as it does in short contexts.
// (A page's worth of raw tokens costs as much as 5 packed pages: held back until a page is full, they took a
// third of a 14x budget at 4,096 tokens.) Eviction marks slots of pages dead and then compacts: runs of
// neighbouring pages whose dead slots add up to a page are re-packed into fewer pages. Original positions are
// a bitmap over the tokens seen, once one of them is gone.
//
// The cache of a sliding layer is simpler: the newest tokens, raw, and nothing else. kPackTokens are dropped
// at a time, so that up to kPackTokens - 1 older ones are there, which whoever attends masks
// (QueryRows::window).
//
// All memory, the tables included, comes from one Ledger; bytes() is what was
// allocated.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moend/attention/params.h"
#include "moend/base/error.h"
#include "moend/base/ledger.h"
#include "moend/cache/key_rotations.h"
#include "moend/plan/layout.h"

namespace moend {

// A number that no other page has, and no other content of this one: whoever keeps a copy of a page knows by
// it whether the copy is still good. Pages that forks share have it in common.
uint64_t PageStamp(const PageLayout& layout, const uint8_t* page);

class LayerCache {
 public:
  struct Impl;

  // `keep_scores`: each paged slot carries a float that eviction can use (accumulated attention for H2O).
  // `rotations`: of these KV heads; pages of less than 16 bits then hold rotated keys. Null: keys as they
  // are.
  static Expected<LayerCache> Create(std::shared_ptr<Ledger> ledger, const KvShape& shape,
                                     const Expert& expert, const Protected& guard, bool keep_scores,
                                     std::shared_ptr<const KeyRotations> rotations = {});
  // Of a layer that sees the newest `window` tokens. Nothing can be filled in or evicted (Excess() is 0).
  static Expected<LayerCache> CreateSliding(std::shared_ptr<Ledger> ledger, const KvShape& shape,
                                            int64_t window);
  LayerCache(LayerCache&&) noexcept;
  LayerCache& operator=(LayerCache&&) noexcept;
  ~LayerCache();

  // Fills an empty cache from a prefill's scratch. heads[h] is KV head h; kept[h] the ascending positions
  // that head h keeps, all kept[h] of one size that KeptTokens() returned, with the sinks and the newest
  // `window` tokens among them. An empty kept[h] keeps every token. scores[h], if not null, has one float per
  // scratch position.
  // `scores` itself may be empty. On an error the cache is empty again.
  Expected<void> Fill(std::span<const DenseView> heads, std::span<const std::vector<uint32_t>> kept,
                      std::span<const float* const> scores);

  // The same in steps, so that threads can fill different heads at the same time. n_kept is the size of each
  // kept[h], n_tokens if they are empty. `feedback`: FeedbackFactors() of the head's queries, or null; keys
  // of less than 16 bits are then rounded for these queries. EndFill() fails, and empties the cache, unless
  // every head was filled; it is also the way to give up after an error. In between nothing else may be
  // called.
  Expected<void> BeginFill(int64_t n_tokens, int64_t n_kept);
  Expected<void> FillHead(int64_t head, const DenseView& from, std::span<const uint32_t> kept,
                          const float* scores, const float* feedback = nullptr);
  Expected<void> EndFill();

  // Appends tokens at positions tokens_seen()...; k and v are f32 [n][n_kv_heads][head_size]. Of many tokens
  // whole pages are packed; of a few, kPackTokens at a time, whose K may widen the ranges of a page's
  // channels: its codes are then rounded once more. A packed slot's score starts at 0. On an error the tokens
  // up to tokens_seen() are in, the others are not.
  Expected<void> Append(const float* k, const float* v, int64_t n);

  // A sliding cache only: appends the tokens of heads[h] to KV head h, as Append would, but what falls out of
  // the window at once is not even copied. Afterwards the window is all there is. On an error nothing has
  // changed.
  Expected<void> AppendNewest(std::span<const DenseView> heads);

  // Evicts the `count` live paged tokens of KV head `head` with the lowest score (scores[page * 64 + slot];
  // dead slots ignored; ties: the older token goes; NaN is lowest), then compacts: fewer than 64 slots are
  // dead afterwards, the room of the last page included. Evicts fewer when fewer are paged; 0 only compacts,
  // and needs no scores. Threads may evict from different heads at the same
  // time. On an error nothing has changed.
  Expected<void> Evict(int64_t head, std::span<const float> scores, int64_t count);

  // How many paged tokens Evict must take from each head now so that at most KeptTokens(keep, guard,
  // tokens_seen()) stay. After Evict(Excess()) of every head bytes() is at most LayerBytes(tokens_seen()).
  int64_t Excess(int64_t head) const;

  // To be called before Excess() where an eviction is due: packs the raw tokens that wait for a page
  // (MostBytes) if there are more of them than may stay, for only what is paged can be evicted. Until the
  // eviction the cache may be that page larger than MostBytes(). On an error all tokens are still there.
  Expected<void> PackExcess();

  // A second cache with the same content; pages are shared until one side re-packs them (copy on write).
  Expected<LayerCache> Fork() const;

  // The whole cache re-packed for another expert (fewer bits; a lower keep takes effect at the next Evict).
  Expected<LayerCache> Repack(const Expert& expert) const;

  StreamView view(int64_t head) const;  // valid until the next non-const call
  std::vector<uint32_t> positions(
      int64_t head) const;      // live tokens in slot order: pages, then raw (sinks, newest)
  float* scores(int64_t head);  // [n_pages * 64], null without keep_scores

  // A number that no other content has, of this cache or of another: it changes with the content, but for raw
  // tokens that come behind those that are there. A fork has its own.
  uint64_t version() const;
  // The same for all pages but the last one and those that come behind it, and for their live masks.
  uint64_t pages_version() const;

  const KvShape& shape() const;
  bool sliding() const;
  const Expert& expert() const;
  const Protected& guard() const;  // of a sliding cache: its window, without sinks
  int64_t tokens_seen() const;
  int64_t tokens(int64_t head) const;  // live ones
  int64_t bytes() const;               // allocated by this cache; a shared page counts in each sharer

 private:
  friend Expected<std::string> SerializeCache(const LayerCache& cache);
  friend Expected<LayerCache> DeserializeCache(std::shared_ptr<Ledger> ledger, std::string_view blob,
                                               std::string_view source,
                                               std::shared_ptr<const KeyRotations> rotations);
  LayerCache();
  std::unique_ptr<Impl> impl_;
};

}  // namespace moend
