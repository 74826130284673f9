// How the SIMD kernels cut their work into blocks, and the scratch that follows from it.
#pragma once

#include <cstdint>

#include "moend/plan/layout.h"

namespace moend::simd {

// Rows that the fused kernels, which read the packed codes directly, take at once.
inline constexpr int64_t kFusedRows = 48;

// Rows whose scores of one page are held at once: while K (or V) of a page stays in the first-level cache.
inline constexpr int64_t kRowsPerBlock = 48;

// Rows that share the conversion of a page to float32: their queries and outputs, about 512 KiB together,
// stay in the second-level cache. Rounded up, so that blocks of 512 tokens leave no small rest at common
// shapes.
constexpr int64_t RowsPerTile(int64_t head_size) {
  return (65536 / head_size + kRowsPerBlock - 1) / kRowsPerBlock * kRowsPerBlock;
}

// Scratch of the fused path, in floats: scores [rows][64], probabilities times V scale [rows][64], scaled
// queries [rows][head_size] and four numbers a row.
constexpr int64_t FusedWorkspaceFloats(int64_t head_size, int64_t rows) {
  return (rows < kFusedRows ? rows : kFusedRows) * (2 * kPageTokens + head_size + 4);
}

// Queries rotated for packed pages, [rows][head_size], at the start of a workspace; what follows stays
// aligned to cache lines.
constexpr int64_t RotatedFloats(int64_t head_size, int64_t rows) {
  return (rows * head_size + 15) / 16 * 16;
}

}  // namespace moend::simd
