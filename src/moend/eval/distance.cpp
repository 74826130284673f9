#include "moend/eval/distance.h"

#include <algorithm>
#include <cmath>

namespace moend::eval {
namespace {

// Rows that are turned into logits at a time: enough for one product to be worth it, few enough to stay small
// with a vocabulary of 150,000 tokens (38 MB).
constexpr int64_t kRows = 64;

// ln(sum(exp(x))) without overflow. Single exponentials are rounded to 24 bits, their sum is not.
double LogSumExp(std::span<const float> x, float top) {
  double sum = 0;
  for (const float v : x) sum += std::exp(v - top);
  return double{top} + std::log(sum);
}

int32_t TopOf(std::span<const float> logits) {
  return static_cast<int32_t>(std::ranges::max_element(logits) - logits.begin());
}

double Divergence(std::span<const float> base, double z_base, std::span<const float> logits, double z) {
  double sum = 0;
  for (std::size_t i = 0; i < base.size(); ++i) {
    const double ln_p = double{base[i]} - z_base;
    sum += double{std::exp(static_cast<float>(ln_p))} * (ln_p - (double{logits[i]} - z));
  }
  return sum < 0 ? 0 : sum;  // not std::max, which would take NaN for 0
}

std::span<const float> Row(std::span<const float> rows, int64_t i, int64_t width) {
  return rows.subspan(static_cast<std::size_t>(i * width), static_cast<std::size_t>(width));
}

Expected<std::vector<float>> Floats(int64_t n) {
  try {
    return std::vector<float>(static_cast<std::size_t>(n));
  } catch (const std::exception&) {
    return Fail(ErrorCode::kOutOfMemory, "no memory for {} logits", n);
  }
}

}  // namespace

TokenLoss LossOf(std::span<const float> logits, int32_t next) {
  const int32_t top = TopOf(logits);
  const double z = LogSumExp(logits, logits[static_cast<std::size_t>(top)]);
  return {z - double{logits[static_cast<std::size_t>(next)]}, top};
}

double KlDivergence(std::span<const float> base, std::span<const float> logits) {
  const double z_base = LogSumExp(base, base[static_cast<std::size_t>(TopOf(base))]);
  return Divergence(base, z_base, logits, LogSumExp(logits, logits[static_cast<std::size_t>(TopOf(logits))]));
}

TokenDistance DistanceOf(std::span<const float> base, std::span<const float> logits, int32_t next) {
  const auto at = static_cast<std::size_t>(next);
  const int32_t top_base = TopOf(base), top = TopOf(logits);
  const double z_base = LogSumExp(base, base[static_cast<std::size_t>(top_base)]);
  const double z = LogSumExp(logits, logits[static_cast<std::size_t>(top)]);
  return {z - double{logits[at]}, z_base - double{base[at]}, Divergence(base, z_base, logits, z),
          top == top_base};
}

Expected<std::vector<TokenDistance>> DistancesOfLogits(Engine& engine, std::span<const float> base,
                                                       std::span<const float> logits,
                                                       std::span<const int32_t> next) {
  const auto n = std::ssize(next);
  const int64_t n_vocab = engine.model().hparams().n_vocab;
  if (base.size() != logits.size() || static_cast<int64_t>(base.size()) != n * n_vocab)
    return Fail(ErrorCode::kInvalidArgument, "{} and {} logits are no {} rows of {}", base.size(),
                logits.size(), n, n_vocab);
  std::vector<TokenDistance> out(static_cast<std::size_t>(n));
  MOEND_TRY(engine.ParallelFor(n, [&](int64_t i, int) {
    const auto row = static_cast<std::size_t>(i);
    out[row] = DistanceOf(Row(base, i, n_vocab), Row(logits, i, n_vocab), next[row]);
  }));
  for (const TokenDistance& d : out)
    if (!std::isfinite(d.kld) || !std::isfinite(d.nll) || !std::isfinite(d.nll_base))
      return Fail(ErrorCode::kInternal, "the model's predictions are not numbers");
  return out;
}

Expected<std::vector<TokenDistance>> Distances(Engine& engine, std::span<const float> base,
                                               std::span<const float> hidden, std::span<const int32_t> next) {
  const auto n = std::ssize(next);
  const int64_t n_embd = engine.model().hparams().n_embd, n_vocab = engine.model().hparams().n_vocab;
  if (base.size() != hidden.size() || static_cast<int64_t>(base.size()) != n * n_embd)
    return Fail(ErrorCode::kInvalidArgument, "{} and {} hidden states are no {} rows of {}", base.size(),
                hidden.size(), n, n_embd);
  MOEND_ASSIGN(std::vector<float> base_logits, Floats(std::min(n, kRows) * n_vocab));
  MOEND_ASSIGN(std::vector<float> logits, Floats(std::min(n, kRows) * n_vocab));
  std::vector<TokenDistance> out;
  for (int64_t done = 0; done < n;) {
    const int64_t m = std::min(n - done, kRows);
    const auto rows = [&](std::span<const float> of) {
      return of.subspan(static_cast<std::size_t>(done * n_embd), static_cast<std::size_t>(m * n_embd));
    };
    const auto size = static_cast<std::size_t>(m * n_vocab);
    MOEND_TRY(engine.Logits(rows(base), std::span(base_logits).first(size)));
    MOEND_TRY(engine.Logits(rows(hidden), std::span(logits).first(size)));
    MOEND_ASSIGN(
        const auto part,
        DistancesOfLogits(engine, std::span(base_logits).first(size), std::span(logits).first(size),
                          next.subspan(static_cast<std::size_t>(done), static_cast<std::size_t>(m))));
    out.insert(out.end(), part.begin(), part.end());
    done += m;
  }
  return out;
}

MeanError MeanOf(std::span<const double> values) {
  if (values.empty()) return {};
  const double n = static_cast<double>(values.size());
  double sum = 0, squares = 0;
  for (const double v : values) sum += v;
  const double mean = sum / n;
  for (const double v : values) squares += (v - mean) * (v - mean);
  return {mean, n > 1 ? std::sqrt(squares / (n - 1) / n) : 0};
}

Quantile QuantileOf(std::span<const double> sorted, double share) {
  if (sorted.empty()) return {};
  const double last = static_cast<double>(sorted.size() - 1);
  const auto at = [&](double index) {  // between order statistics, linear
    index = std::clamp(index, 0.0, last);
    const auto below = static_cast<std::size_t>(index);
    const double part = index - std::floor(index);
    return part == 0 ? sorted[below] : sorted[below] + part * (sorted[below + 1] - sorted[below]);
  };
  const double half = 1.96 * std::sqrt(static_cast<double>(sorted.size()) * share * (1 - share));
  return {at(share * last), at(std::floor(share * last - half)), at(std::ceil(share * last + half))};
}

}  // namespace moend::eval
