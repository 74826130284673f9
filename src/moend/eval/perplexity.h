// How much the model's predictions change: perplexity of a text, and the KL divergence of every predicted
// token's distribution from the one that the full cache gives. In llama.cpp's terms (tools/perplexity): the
// text is cut into chunks of n_ctx tokens; the first half of a chunk is read, and the second half is
// predicted one token after the other. Here the first half is compressed before, and eviction goes on while
// reading.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "moend/base/error.h"
#include "moend/engine/engine.h"
#include "moend/plan/plan.h"

namespace moend::eval {

// A mean with its standard error, tokens taken as independent.
struct MeanError {
  double mean = 0, error = 0;
};

// A quantile with the order statistics that enclose it with 95% confidence (binomial, normal approximation).
struct Quantile {
  double value = 0, low = 0, high = 0;
};

struct PerplexityResult {
  int64_t chunks = 0, tokens = 0;  // predicted tokens
  MeanError nll, ppl;              // of the compressed cache; nats a token, and exp of it
  // Against the full cache, all zero when there was no plan to compare.
  MeanError nll_base, ppl_base;
  MeanError ln_ratio;  // ln(PPL / PPL of the full cache), token by token
  MeanError kld;       // KL(full || compressed), nats a token
  double kld_max = 0;
  Quantile kld_999, kld_99, kld_95, kld_median;
  MeanError same_top;                       // share of tokens whose likeliest prediction is the same, 0 to 1
  int64_t kv_bytes = 0, kv_bytes_full = 0;  // after the first half, mean over the chunks
};

struct PerplexityOptions {
  int64_t n_ctx = 512;  // tokens of a chunk, at least 8
  int64_t chunks = 0;   // at most so many; 0: all that the text gives
  std::string scorer;   // empty: the plan's
};

struct PerplexityProgress {
  double share = 0;
  int64_t chunk = 0, chunks = 0;
  double ppl = 0;  // so far; 0 before the first token
};

// kInvalidArgument when the text has less than one chunk. A plan that compresses nothing measures the
// perplexity alone. Returning false from `progress` stops with kCancelled.
Expected<PerplexityResult> Perplexity(std::shared_ptr<Engine> engine, std::span<const int32_t> tokens,
                                      const Plan& plan, const PerplexityOptions& options,
                                      const std::function<bool(const PerplexityProgress&)>& progress = {});

// For the caller that has logits already.
struct TokenLoss {
  double nll = 0;
  int32_t top = 0;
};
TokenLoss LossOf(std::span<const float> logits, int32_t next);
double KlDivergence(std::span<const float> base,
                    std::span<const float> logits);  // nats, >= 0; NaN where a logit is not finite
MeanError MeanOf(std::span<const double> values);
Quantile QuantileOf(std::span<const double> sorted, double share);  // ascending values

std::string FormatPerplexity(const PerplexityResult& result);

}  // namespace moend::eval
