// Values of kept tokens, moved so that attention to them alone gives what attention to all tokens gave: the
// linear part of Attention Matching (arXiv 2602.16284). With X the attention of n reference queries to the
// kept keys as they are stored, Y their outputs over the whole context and V the kept values, D minimizes
//     || Y - X (V + D) ||^2
// by conjugate gradients from D = 0, which no matrix of X is kept for: a step is one attention with D for
// values and one transposed (ColumnOutputsCausal). Every fourth reference token is held out; the steps end
// where its error no longer falls, and so a head whose queries say nothing about others keeps its values.
#pragma once

#include <cstdint>
#include <functional>
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

// Calls a function for 0 <= i < n, on several threads if it has them, which it numbers from 0.
struct Parallel {
  int n_threads = 1;
  std::function<Expected<void>(int64_t n, const std::function<void(int64_t i, int thread)>&)> run;
};

// full: the whole context. kept: positions, in the order of `keys`: f32 [kept][head_size], as they are
// stored. reference: scaled queries that come after the context; fewer than two rows a kept token refit
// nothing. The result does not depend on the number of threads.
Expected<ValueRefit> RefitValues(const DenseView& full, std::span<const uint32_t> kept,
                                 std::span<const float> keys, const QueryRows& reference,
                                 const Parallel& parallel);

}  // namespace moend
