// Inner products in an order that compilers vectorize, the same on every machine.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace moend {

inline float Dot(const float* a, const float* b, int64_t n) {
  constexpr int64_t kLanes = 16;
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) sums[j] += a[i + j] * b[i + j];
  float sum = 0;
  for (; i < n; ++i) sum += a[i] * b[i];
  for (const float s : sums) sum += s;
  return sum;
}

// 1 / the root mean square of n numbers; that of zeros is large, and finite.
inline float InverseRms(const float* x, int64_t n) {
  return 1 / std::sqrt(std::max(Dot(x, x, n) / static_cast<float>(n), 1e-30f));
}

}  // namespace moend
