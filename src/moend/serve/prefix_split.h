// Where a prompt is cut so that its first part can be kept and forked by later prompts. The cut depends on
// the prompt alone, never on what happens to be kept, so that the same prompt always gives the same cache.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace moend::serve {

// Cuts of plain prompts are multiples of this, and at least this far from the end: two prompts that differ
// only in a short question at the end share a cut.
inline constexpr int64_t kPrefixGrid = 128;

// Ascending multiples of the grid in [low, high].
std::vector<int64_t> GridLengths(int64_t low, int64_t high);

// `boundary`: tokens before a chat's last message, 0 for a plain prompt. Returns 0 when no part of at least
// `least` tokens is worth keeping.
int64_t SplitLength(int64_t n_tokens, int64_t boundary, int64_t least);

// Length of the common beginning.
int64_t CommonPrefix(std::span<const int32_t> a, std::span<const int32_t> b);

}  // namespace moend::serve
