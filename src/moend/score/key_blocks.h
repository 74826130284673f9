// Keys (and the lengths of values) of one KV head in floats, 64 tokens at a time, whatever they are stored
// as.
#pragma once

#include <cstdint>
#include <functional>

#include "moend/attention/params.h"

namespace moend {

struct KeyBlock {
  const float* k = nullptr;         // [head_size][64], channel major; lanes that hold no token are finite
  const float* v_length = nullptr;  // [64] Euclidean lengths of the values; null unless asked for
  uint64_t live = 0;                // bit t: lane t holds a token
  int64_t first = 0;                // index of lane 0's score; -1 for raw tokens, which are not scored
};

using KeyBlockVisitor = std::function<void(const KeyBlock&)>;

void ForEachKeyBlock(const DenseView& kv, bool want_v, const KeyBlockVisitor& visit);

// Pages in order, then the raw tokens.
void ForEachKeyBlock(const StreamView& kv, bool want_v, const KeyBlockVisitor& visit);

}  // namespace moend
