#include "moend/cache/key_feedback.h"

#include <algorithm>
#include <cmath>

#include "moend/attention/rotation.h"

namespace moend {
namespace {

constexpr double kDamping = 0.01;

using Matrix = std::vector<double>;  // [n][n]

// Lower triangle L with a = L L', in place; false when `a` is not positive definite.
bool Cholesky(Matrix& a, std::size_t n) {
  for (std::size_t j = 0; j < n; ++j) {
    double diagonal = a[j * n + j];
    for (std::size_t k = 0; k < j; ++k) diagonal -= a[j * n + k] * a[j * n + k];
    if (!(diagonal > 0) || !std::isfinite(diagonal)) return false;
    a[j * n + j] = std::sqrt(diagonal);
    for (std::size_t i = j + 1; i < n; ++i) {
      double sum = a[i * n + j];
      for (std::size_t k = 0; k < j; ++k) sum -= a[i * n + k] * a[j * n + k];
      a[i * n + j] = sum / a[j * n + j];
    }
    for (std::size_t i = 0; i < j; ++i) a[i * n + j] = 0;
  }
  return true;
}

// The rows of U / diagonal(U) without its diagonal, where inverse(m) = U' U. With channels numbered backwards
// a Cholesky factor of m is upper triangular, m = R R', and inverse(m) = inverse(R)' inverse(R): U is
// inverse(R).
bool Factors(const Matrix& m, std::size_t n, std::vector<float>& factors) {
  Matrix back(n * n);
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t j = 0; j < n; ++j) back[i * n + j] = m[(n - 1 - i) * n + (n - 1 - j)];
  if (!Cholesky(back, n)) return false;
  // Column by column of inverse(L), L x = e_j; turned around again, that is a column of U.
  Matrix u(n * n, 0.0);
  std::vector<double> x(n);
  for (std::size_t j = 0; j < n; ++j) {
    std::fill(x.begin(), x.end(), 0.0);
    for (std::size_t i = j; i < n; ++i) {
      double sum = i == j ? 1.0 : 0.0;
      for (std::size_t k = j; k < i; ++k) sum -= back[i * n + k] * x[k];
      x[i] = sum / back[i * n + i];
    }
    for (std::size_t i = j; i < n; ++i) u[(n - 1 - i) * n + (n - 1 - j)] = x[i];
  }
  for (std::size_t c = 0; c < n; ++c)
    for (std::size_t j = c + 1; j < n; ++j)
      factors[c * n + j] = static_cast<float>(u[c * n + j] / u[c * n + c]);
  return true;
}

}  // namespace

std::vector<float> FeedbackFactors(std::span<const float> moment, int64_t head_size,
                                   const KeyRotation* rotation) {
  const auto n = static_cast<std::size_t>(head_size);
  std::vector<float> turned(moment.begin(), moment.end()), factors(n * n, 0.0f);
  const auto transpose = [&] {
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t j = 0; j < i; ++j) std::swap(turned[i * n + j], turned[j * n + i]);
  };
  for (int side = 0; rotation && side < 2; ++side) {
    simd::RotateRows(turned.data(), head_size, head_size, rotation->inverse, turned.data());
    transpose();
  }
  double trace = 0;
  for (std::size_t i = 0; i < n; ++i) trace += turned[i * n + i];
  if (!(trace > 0) || !std::isfinite(trace)) return factors;
  Matrix m(n * n);
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t j = 0; j < n; ++j) m[i * n + j] = 0.5 * (double{turned[i * n + j]} + turned[j * n + i]);
  for (std::size_t i = 0; i < n; ++i) m[i * n + i] += kDamping * trace / static_cast<double>(n);
  if (!Factors(m, n, factors)) std::fill(factors.begin(), factors.end(), 0.0f);
  return factors;
}

}  // namespace moend
