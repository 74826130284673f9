// Values of kept tokens, moved so that attention to them alone gives what attention to all tokens gave: the
// linear part of Attention Matching (arXiv 2602.16284). With X the attention of n reference queries to the
// kept keys as they are stored, Y their outputs over the whole context and V the kept values, D minimizes
//     || Y - X (V + D) ||^2
// by conjugate gradients from D = 0, which no matrix of X is kept for: a step is one attention with D for
// values and one transposed (ColumnOutputsCausal). Every fourth reference token is held out; the steps end
// where its error no longer falls, and so a head whose queries say nothing about others keeps its values.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "moend/attention/params.h"
#include "moend/base/error.h"

namespace moend {

struct ValueRefit {
  std::vector<float> v;          // f32 [kept][head_size]; empty: the values are best left as they are
  double before = 0, after = 0;  // relative squared error of the held-out outputs
  int64_t steps = 0;
};

// full: the whole context. kept: ascending positions. keys: f32 [kept][head_size], those keys as stored.
// reference: scaled queries that come after the context; fewer than two rows a kept token refit nothing.
Expected<ValueRefit> RefitValues(const DenseView& full, std::span<const uint32_t> kept,
                                 std::span<const float> keys, const QueryRows& reference);

}  // namespace moend
