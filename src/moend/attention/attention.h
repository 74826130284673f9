// Attention over compressed and uncompressed K/V, one KV head at a time. Every entry point exists twice with
// the same meaning: `reference` (scalar, float64 accumulation) and `simd` (Highway, dispatched at run time).
// The functions read and update a SoftmaxState, so the parts of a context (packed pages, raw tokens, a new
// block of tokens, another thread's pages) are attended one after the other or merged.
#pragma once

#include <cstdint>

#include "moend/attention/params.h"

namespace moend {

// Scratch for one thread. The kernels of a call with `rows` rows need WorkspaceFloats(head_size, rows)
// floats, 64-byte aligned.
int64_t WorkspaceFloats(int64_t head_size, int64_t rows);

#define MOEND_DECLARE_ATTENTION                                                                              \
  /* Rows see every live token of pages [page_begin, page_end) and, if `raw`, every raw token, of which a    \
   * window leaves row r (token i = r / group) those less than window - behind - i from the newest one. A    \
   * stream that is seen through a window has no pages. */                                                   \
  void AttendStream(const StreamView& kv, int64_t page_begin, int64_t page_end, bool raw,                    \
                    const QueryRows& q, SoftmaxState state, float* workspace);                               \
  /* Causal: row r (token i = r / group) sees the tokens [0, first + i] of kv, as far as there are any, and  \
   * through a window the newest `window` of [0, first + i]. */                                              \
  void AttendCausal(const DenseView& kv, int64_t first, const QueryRows& q, SoftmaxState state,              \
                    float* workspace);                                                                       \
  /* sums[t] += for tokens t of kv in [begin, end): sum over rows of exp(s - max[r]) / sum[r], causal as     \
     above. max and sum are the final ones of the rows. Feeds H2O and SnapKV. `sums` is indexed by t, not by \
     t - begin. */                                                                                           \
  void ColumnSumsCausal(const DenseView& kv, int64_t first, int64_t begin, int64_t end, const QueryRows& q,  \
                        const float* max, const float* sum, float* sums, float* workspace);                  \
  /* out[t] += for tokens t of kv in [0, kv.n_tokens): sum over rows of exp(s - max[r]) / sum[r] * in[r],    \
     rows as above: the transpose of attention. in: f32 [rows][head_size]; out: f32 [n_tokens][head_size].   \
   */                                                                                                        \
  void ColumnOutputsCausal(const DenseView& kv, int64_t first, const QueryRows& q, const float* max,         \
                           const float* sum, const float* in, float* out, float* workspace);                 \
  /* Rows that come behind all of kv and see it without a window attend to what matters to them. First,      \
     most: [pages][rows], the largest score that a row has in a page, to some 1e-4 of |q| |k|. */            \
  void PageMaxima(const DenseView& kv, const QueryRows& q, float* most, float* workspace);                   \
  /* Then, least: [rows], so that what a row leaves out is at most `share` of its attention for each token,  \
     what `state` has seen before included. */                                                               \
  void ChoosePages(const float* most, int64_t pages, int64_t rows, SoftmaxState state, float share,          \
                   float* least);                                                                            \
  void AttendChosen(const DenseView& kv, const QueryRows& q, const ChosenPages& chosen, SoftmaxState state,  \
                    float* workspace);                                                                       \
  /* squares[t] += sum over the rows that chose t's page of weight[r] * (exp(s - max[r]) / sum[r])^2: what   \
     their outputs lose in squares without the token, but for its value. */                                  \
  void ColumnSquaresChosen(const DenseView& kv, const QueryRows& q, const ChosenPages& chosen,               \
                           const float* max, const float* sum, const float* weight, float* squares,          \
                           float* workspace);                                                                \
  /* ColumnSums over the paged part of a stream: sums[page * 64 + slot] += ...; evicted slots get 0 added.   \
   */                                                                                                        \
  void ColumnSumsStream(const StreamView& kv, const QueryRows& q, const float* max, const float* sum,        \
                        float* sums, float* workspace);                                                      \
  /* Adds what `from` saw to `into`, rows x head_size. */                                                    \
  void MergeStates(SoftmaxState into, SoftmaxState from, int64_t rows, int64_t head_size);                   \
  /* out /= sum; rows that saw nothing become zeros. */                                                      \
  void Finish(SoftmaxState state, int64_t rows, int64_t head_size);

namespace reference {
MOEND_DECLARE_ATTENTION
}
namespace simd {
MOEND_DECLARE_ATTENTION
// Name of the instruction set that the dispatch chose, as Highway calls it ("AVX3_ZEN4", "NEON", ...).
const char* TargetName();
}  // namespace simd

#undef MOEND_DECLARE_ATTENTION

// Sets every row to "nothing seen".
void ResetState(SoftmaxState state, int64_t rows, int64_t head_size);
// The same, or with sinks to "the sink seen". Where a context is attended in parts, one part has the sinks.
void InitState(SoftmaxState state, const QueryRows& q, int64_t head_size);

}  // namespace moend
