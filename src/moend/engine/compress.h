// From what a layer's prefill left behind to its compressed cache: score, select, pack. Each KV head has a
// cache of its own (a LayerCache of one head), because heads may differ in all that an expert says.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "moend/cache/layer_cache.h"
#include "moend/engine/compute.h"
#include "moend/engine/layer_scratch.h"
#include "moend/score/scorer.h"

namespace moend {

// A scorer and what it gets of one layer beside K/V.
struct LayerScorer {
  LayerScorer(const Scorer& s, std::span<const HeadQueries> q = {}) : scorer(s), queries(q) {}
  const Scorer& scorer;
  std::span<const HeadQueries> queries;  // one a KV head; empty unless the scorer needs them
  bool shares = false;                   // the heads share their layer's tokens (Plan::adaptive_heads)
  bool refit = false;                    // Plan::refit; needs LayerScratch::reference()
  const HeadQueries* head(int64_t h) const {
    return queries.empty() ? nullptr : &queries[static_cast<std::size_t>(h)];
  }
};

// Importance of the first `n_tokens` tokens of a scratch for every KV head: [head][token].
Expected<std::vector<std::vector<float>>> ScoreScratch(Compute& compute, const LayerScratch& scratch,
                                                       int64_t n_tokens, const LayerScorer& scorer);

// A cache for every KV head of the first `n_tokens` tokens of a scratch, heads in parallel. experts: one a KV
// head; where the heads share their tokens, the caches have other keep ratios with the same bytes. `scores`
// as ScoreScratch gives them; may be null, then they are made if an expert evicts. rotations: one a KV head.
Expected<std::vector<LayerCache>> CompressScratch(
    Compute& compute, const std::shared_ptr<Ledger>& ledger, const LayerScratch& scratch, int64_t n_tokens,
    std::span<const Expert> experts, const Protected& guard,
    std::span<const std::shared_ptr<const KeyRotations>> rotations, const LayerScorer& scorer,
    const std::vector<std::vector<float>>* scores);

// The caches of a sliding layer, one a KV head: the newest `window` of the first `n_tokens` tokens.
Expected<std::vector<LayerCache>> WindowCaches(Compute& compute, const std::shared_ptr<Ledger>& ledger,
                                               const LayerScratch& scratch, int64_t n_tokens, int64_t window);

// Adds the scratch's tokens to the caches of its KV heads, which already remember others.
Expected<void> AppendScratch(Compute& compute, std::span<LayerCache> heads, const LayerScratch& scratch);

// Evicts a head's cache back to its keep ratio. `observed`: its newest queries (may be empty); `queries`: as
// in LayerScorer.
// The first `prompt_tokens` were scored when they were read.
Expected<void> EvictExcess(LayerCache& cache, const Scorer& scorer, int64_t prompt_tokens,
                           const QueryRows& observed, const HeadQueries* queries);

}  // namespace moend
