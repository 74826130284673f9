// Plain parameter structs of the attention kernels. Policy (which tokens, which layer, who owns the memory)
// is made elsewhere; a kernel knows only what stands here. All pointers are borrowed. f16 values are IEEE
// half bits (uint16_t).
#pragma once

#include <cstdint>

#include "moend/plan/layout.h"

namespace moend {

// How one KV head's K was turned before it was packed (rotation.h). Both have head_size positive numbers.
struct KeyRotation {
  const float* balance = nullptr;
  const float* inverse = nullptr;  // 1 / balance
};

// What one KV head of one layer remembers: packed pages, then raw (unquantized) tokens. Token order is
// ascending by original position within each part, but raw tokens include the sinks, so it is not ascending
// over both.
struct StreamView {
  PageLayout layout;
  const uint8_t* const* pages = nullptr;  // [n_pages]
  const uint64_t* live = nullptr;         // [n_pages] bit t: slot t holds a token (evicted slots are 0)
  int64_t n_pages = 0;
  // Null: K of the pages is as it was. Never set for pages of 16 bit K. Raw tokens are never rotated.
  const KeyRotation* rotation = nullptr;
  const uint16_t* raw_k = nullptr;  // f16 [ceil(n_raw / 16)][head_size][16], but for the last block
  const uint16_t* raw_v = nullptr;  // f16 [n_raw][head_size]
  int64_t n_raw = 0;
  // The last block of raw_k is [head_size][raw_tail]: a short cache has no room for tokens that are not there
  // yet. 16 numbers from any of a block's rows on can be read all the same, and are finite.
  int64_t raw_tail = kRawBlockTokens;

  // What lies between two channels of a block of raw_k.
  int64_t RawStride(int64_t block) const {
    return block == (n_raw - 1) / kRawBlockTokens ? raw_tail : kRawBlockTokens;
  }
};

// Uncompressed K/V of one KV head: the prefill scratch. K pages as in a 16-bit page, so that positions are
// block * 64 + t.
struct DenseView {
  int64_t head_size = 0;
  const uint16_t* k =
      nullptr;  // f16 [ceil(n_tokens / 64)][head_size][64]; unused columns of the last block are finite
  const uint16_t* v = nullptr;  // f16 [n_tokens][head_size]
  int64_t n_tokens = 0;
};

// Running softmax state of `rows` query rows: out = sum of exp(s - max) * V, sum = sum of exp(s - max).
// "Nothing seen" is max = -inf, sum = 0, out = 0. Finish() divides; a row that saw nothing becomes zeros.
struct SoftmaxState {
  float* out = nullptr;  // [rows][head_size]
  float* max = nullptr;  // [rows]
  float* sum = nullptr;  // [rows]
};

// Query rows that share a KV head: row r = token * group + g; queries are already multiplied by the softmax
// scale. Below that, what some models' attention has beside the softmax; what is off costs nothing.
struct QueryRows {
  const float* q = nullptr;  // [rows][head_size]
  int64_t rows = 0;
  int64_t group = 1;             // query heads per KV head (GQA); rows is a multiple of it
  float soft_cap = 0;            // a score s counts as soft_cap * tanh(s / soft_cap); 0: as it is
  int64_t window = 0;            // a row sees the newest `window` tokens up to its own only; 0: all
  int64_t behind = 0;            // of a stream, with a window: its newest token is so many before row 0's
  const float* sinks = nullptr;  // f32 [group]: a score that takes its share and adds no value (InitState)
};

// Which pages of 64 tokens each row attends to: those that have a score of at least least[row] for it.
struct ChosenPages {
  const float* most = nullptr;   // [pages][rows]: a row's largest score of a page (PageMaxima)
  const float* least = nullptr;  // [rows] (ChoosePages)
};

// What the queries of a layer have in common, as QueryRows wants it; `sinks` are of all query heads.
struct AttentionStyle {
  float scale = 1;  // of the softmax, which queries are multiplied by
  float soft_cap = 0;
  int64_t window = 0;
  const float* sinks = nullptr;  // f32 [n_heads], or null

  // Of KV head `head`, whose `group` query heads are neighbours; q is scaled already.
  QueryRows Rows(const float* q, int64_t rows, int64_t group, int64_t head) const {
    return {q, rows, group, soft_cap, window, 0, sinks ? sinks + head * group : nullptr};
  }
};

}  // namespace moend
