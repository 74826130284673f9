#include "moend/serve/prefix_split.h"

#include <algorithm>

namespace moend::serve {

std::vector<int64_t> GridLengths(int64_t low, int64_t high) {
  std::vector<int64_t> lengths;
  for (int64_t n = (std::max<int64_t>(low, 1) + kPrefixGrid - 1) / kPrefixGrid * kPrefixGrid; n <= high;
       n += kPrefixGrid)
    lengths.push_back(n);
  return lengths;
}

int64_t SplitLength(int64_t n_tokens, int64_t boundary, int64_t least) {
  // A last message that is itself a document with a question is cut inside, like a plain prompt.
  constexpr int64_t kLongMessage = 8 * kPrefixGrid;
  if (boundary < least || n_tokens - boundary > kLongMessage)
    boundary = std::max(boundary, (n_tokens - kPrefixGrid) / kPrefixGrid * kPrefixGrid);
  return boundary >= least && boundary < n_tokens ? boundary : 0;
}

int64_t CommonPrefix(std::span<const int32_t> a, std::span<const int32_t> b) {
  return std::ranges::mismatch(a, b).in1 - a.begin();
}

}  // namespace moend::serve
