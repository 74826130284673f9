#include <algorithm>
#include <limits>

#include "moend/attention/attention.h"
#include "moend/attention/simd/blocking.h"

namespace moend {

int64_t WorkspaceFloats(int64_t head_size, int64_t rows) {
  const int64_t block = std::min(rows, simd::kRowsPerBlock);
  const int64_t tiles = 2 * kPageTokens * head_size + block * kPageTokens;
  const int64_t fused = simd::FusedWorkspaceFloats(head_size, rows);
  return simd::RotatedFloats(head_size, rows) + std::max(tiles, fused);
}

void ResetState(SoftmaxState state, int64_t rows, int64_t head_size) {
  std::fill_n(state.out, rows * head_size, 0.0f);
  std::fill_n(state.max, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(state.sum, rows, 0.0f);
}

void InitState(SoftmaxState state, const QueryRows& q, int64_t head_size) {
  ResetState(state, q.rows, head_size);
  if (!q.sinks) return;
  for (int64_t r = 0; r < q.rows; ++r) state.max[r] = q.sinks[r % q.group];
  std::fill_n(state.sum, q.rows, 1.0f);
}

}  // namespace moend
