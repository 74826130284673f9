// Rounding K so that what its channels lose cancels in q.k, as GPTQ does with weights (arXiv 2210.17323, sec.
// 3.3): channel by channel, the rounding error goes to the channels that are not rounded yet, weighed by how
// the queries to come use them together. With M = E[q q'] and U the upper triangle with inverse(M) = U' U,
//     error_c = (k_c - rounded k_c) / U_cc,    k_j -= error_c U_cj  for j > c
// minimizes E[(q.(k - rounded k))^2] greedily. At 2 bits that halves the loss that rotation leaves
// (docs/quantizers.md). It costs nothing but time while packing.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "moend/attention/params.h"

namespace moend {

// F with F[c][j] = U_cj / U_cc for j > c, f32 [head_size][head_size]; entries with j <= c are 0. moment:
// [head_size][head_size], any positive multiple of E[q q'] of the queries that share the KV head, before
// `rotation` (which may be null) turns them. 1 % of its mean diagonal is added to the diagonal, so that a
// moment of few queries does. A moment that holds no number, or nothing but zeros, gives zeros: plain
// rounding.
std::vector<float> FeedbackFactors(std::span<const float> moment, int64_t head_size,
                                   const KeyRotation* rotation);

}  // namespace moend
