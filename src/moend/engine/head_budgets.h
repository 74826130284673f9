// Ada-KV (arXiv 2407.11550): the tokens that a layer may keep are not dealt out evenly to its KV heads but go
// where the scores are highest.
#pragma once

#include <span>
#include <vector>

#include "moend/plan/layout.h"

namespace moend {

// How many whole pages each KV head gets of the n_heads * KeptPages(keep) that an even split has: of the
// tokens with the highest scores of all heads together, so many as belong to it, but at least a fifth of the
// even share. scores: [KV head][n_tokens], comparable between heads.
std::vector<int64_t> SplitPages(std::span<const std::vector<float>> scores, double keep,
                                const Protected& guard);

// The keep ratios of such a split: together they never allocate more than `expert` does in every head.
Expected<std::vector<Expert>> SplitHeads(std::span<const std::vector<float>> scores, const Expert& expert,
                                         const Protected& guard, int64_t head_size, int64_t score_bytes);

}  // namespace moend
