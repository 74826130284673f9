#include "moend/eval/interval.h"

#include <algorithm>
#include <cmath>

namespace moend::eval {

Estimate Wilson(double mean, int64_t n) {
  if (n <= 0) return {};
  constexpr double z = 1.959963984540054;  // 97.5% point of the normal distribution
  const double count = static_cast<double>(n), p = std::clamp(mean, 0.0, 1.0);
  const double shrink = 1 + z * z / count;
  const double center = (p + z * z / (2 * count)) / shrink;
  const double half = z / shrink * std::sqrt(p * (1 - p) / count + z * z / (4 * count * count));
  // At 0 and 1 the bound is exact; rounding must not push it past the mean.
  return {p, std::clamp(center - half, 0.0, p), std::clamp(center + half, p, 1.0), n};
}

Estimate MeanOver(std::span<const Estimate> datasets) {
  double sum = 0, below = 0, above = 0, k = 0;
  int64_t n = 0;
  for (const Estimate& e : datasets) {
    if (e.n == 0) continue;
    sum += e.score;
    below += (e.score - e.low) * (e.score - e.low);
    above += (e.high - e.score) * (e.high - e.score);
    n += e.n;
    ++k;
  }
  if (n == 0) return {};
  const double mean = sum / k;
  return {mean, std::max(0.0, mean - std::sqrt(below) / k), std::min(1.0, mean + std::sqrt(above) / k), n};
}

}  // namespace moend::eval
