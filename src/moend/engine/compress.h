// From what a layer's prefill left behind to its compressed cache: score, select, pack.
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

// Importance of the first `n_tokens` tokens of a scratch for every KV head: [head][token].
Expected<std::vector<std::vector<float>>> ScoreScratch(Compute& compute, const LayerScratch& scratch,
                                                       int64_t n_tokens, const Scorer& scorer);

// A cache of the first `n_tokens` tokens of a scratch. `scores` may be null when the expert keeps every
// token.
Expected<LayerCache> CompressScratch(const std::shared_ptr<Ledger>& ledger, const LayerScratch& scratch,
                                     int64_t n_tokens, const Expert& expert, const Protected& guard,
                                     const Scorer& scorer, const std::vector<std::vector<float>>* scores);

// Adds the scratch's tokens to a cache that already remembers others.
Expected<void> AppendScratch(LayerCache& cache, const LayerScratch& scratch);

// Evicts every head of a cache back to its keep ratio. `observed` returns the newest queries of a head (may
// be empty).
Expected<void> EvictExcess(LayerCache& cache, const Scorer& scorer,
                           const std::function<QueryRows(int64_t)>& observed);

}  // namespace moend
