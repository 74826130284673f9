// How far predictions are from those of the full cache, token by token, and what many tokens say together.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "moend/base/error.h"
#include "moend/engine/engine.h"

namespace moend::eval {

struct TokenLoss {
  double nll = 0;   // of the token that comes next, nats
  int32_t top = 0;  // the likeliest token
};
TokenLoss LossOf(std::span<const float> logits, int32_t next);

// KL(base || other) in nats, at least 0; NaN when there is one among the logits.
double KlDivergence(std::span<const float> base, std::span<const float> logits);

struct TokenDistance {
  double nll = 0, nll_base = 0, kld = 0;
  bool same_top = true;
};
// All of it in three passes over the logits instead of six.
TokenDistance DistanceOf(std::span<const float> base, std::span<const float> logits, int32_t next);

// Rows of predictions as hidden states (Session::Prefill, Session::DecodeBatch), f32 [next.size()][n_embd],
// and the tokens that come next. kInternal when a distance is not a number.
Expected<std::vector<TokenDistance>> Distances(Engine& engine, std::span<const float> base,
                                               std::span<const float> hidden, std::span<const int32_t> next);
// The same of rows of logits, f32 [next.size()][n_vocab].
Expected<std::vector<TokenDistance>> DistancesOfLogits(Engine& engine, std::span<const float> base,
                                                       std::span<const float> logits,
                                                       std::span<const int32_t> next);

// A mean with its standard error, values taken as independent.
struct MeanError {
  double mean = 0, error = 0;
};
MeanError MeanOf(std::span<const double> values);

// A quantile with the order statistics that enclose it with 95% confidence (binomial, normal approximation).
struct Quantile {
  double value = 0, low = 0, high = 0;
};
Quantile QuantileOf(std::span<const double> sorted, double share);  // ascending values

}  // namespace moend::eval
