// The definition: products with the matrix, whose entries are +1 or -1 by the parity of the common bits of
// row and column.
#include "moend/attention/rotation.h"

#include <cmath>
#include <vector>

#include "moend/plan/layout.h"

namespace moend::reference {
namespace {

// x = H x
void Rotate(std::vector<double>& x) {
  const auto n = static_cast<int64_t>(x.size()), block = RotationBlock(n);
  std::vector<double> out(x.size());
  for (int64_t i = 0; i < n; ++i) {
    const int64_t begin = i / block * block;
    double sum = 0;
    for (int64_t j = 0; j < block; ++j) {
      const bool odd = std::popcount(static_cast<uint64_t>((i - begin) & j)) % 2 != 0;
      const double value = x[static_cast<std::size_t>(begin + j)];
      sum += odd ? -value : value;
    }
    out[static_cast<std::size_t>(i)] = sum / std::sqrt(static_cast<double>(block));
  }
  x = out;
}

}  // namespace

void RotateRows(const float* q, int64_t rows, int64_t head_size, const float* factor, float* out) {
  std::vector<double> x(static_cast<std::size_t>(head_size));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < head_size; ++c)
      x[static_cast<std::size_t>(c)] = double{q[r * head_size + c]} * factor[c];
    Rotate(x);
    for (int64_t c = 0; c < head_size; ++c)
      out[r * head_size + c] = static_cast<float>(x[static_cast<std::size_t>(c)]);
  }
}

void RotateLanes(float* k, int64_t head_size, const float* before, const float* after) {
  std::vector<double> x(static_cast<std::size_t>(head_size));
  for (int64_t t = 0; t < kPageTokens; ++t) {
    for (int64_t c = 0; c < head_size; ++c)
      x[static_cast<std::size_t>(c)] = k[c * kPageTokens + t] * (before ? double{before[c]} : 1.0);
    Rotate(x);
    for (int64_t c = 0; c < head_size; ++c)
      k[c * kPageTokens + t] =
          static_cast<float>(x[static_cast<std::size_t>(c)] * (after ? double{after[c]} : 1.0));
  }
}

}  // namespace moend::reference
