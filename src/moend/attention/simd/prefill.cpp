// Prefill: blocks of rows against pages of 64 tokens, as matrix products with an online softmax between.
// Rows share a page's conversion to float32 in blocks of RowsPerTile, and K or V stays in the first-level
// cache for kRowsPerBlock rows.
#include "moend/attention/simd/prefill.h"

#include <cmath>

#include "moend/attention/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "moend/attention/simd/prefill.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include "moend/attention/simd/pairs-inl.h"
#include "moend/attention/simd/softmax-inl.h"
#include "moend/attention/simd/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moend::simd {
namespace HWY_NAMESPACE {

// The workspace of the tiled path, cut up.
struct Tile {
  float* k;       // head_size x 64, in the order of KAt
  float* v;       // 64 x head_size, in the order of VAt
  float* scores;  // [block rows][64]
  int64_t head_size;

  Tile(float* workspace, int64_t n)
      : k(workspace), v(k + n * kPageTokens), scores(v + n * kPageTokens), head_size(n) {}
  // With other scores, [rows][64] as well.
  Tile(const Tile& o, float* other) : k(o.k), v(o.v), scores(other), head_size(o.head_size) {}
};

// Rows [from, from + rows) of q.
void ScoreTileRows(const Tile& tile, const QueryRows& q, int64_t from, int64_t rows) {
  const float* first = q.q + from * tile.head_size;
  for (int64_t t = 0; t < kPageTokens; t += kTileVectors * kLanes) {
    const float* k = tile.k + KAt(tile.head_size, 0, t);
    ForRowBlocks<kTileRows>(rows, [&](auto n, int64_t r) {
      ScoreTile<n()>(first + r * tile.head_size, k, tile.head_size, tile.scores + r * kPageTokens + t);
    });
  }
  if (q.soft_cap != 0) CapScores(tile.scores, rows * kPageTokens, q.soft_cap);
}

// out[rows][head_size] = out * factor[rows] + scores[rows][64] . V
void ValueTileRows(const Tile& tile, int64_t rows, int64_t tokens, const float* factor, float* out) {
  const int64_t head_size = tile.head_size;
  if constexpr (kSlab > 0) {
    for (int64_t c = 0; c < head_size; c += kSlab) {
      const float* v = tile.v + VAt(head_size, 0, c);
      ForRowBlocks<kTileRows>(rows, [&](auto n, int64_t r) {
        ValueTileChannels<n(), kTileVectors>(tile.scores + r * kPageTokens, v, tokens, head_size, factor + r,
                                             out + r * head_size + c);
      });
    }
  } else {
    ForRowBlocks<kTileRows>(rows, [&](auto n, int64_t r) {
      ValueTile<n()>(tile.scores + r * kPageTokens, tile.v, tokens, head_size, factor + r,
                     out + r * head_size);
    });
  }
}

// Rows [begin, end) of q against the tile; live(r) are the tokens that row r sees.
template <class Live>
HWY_INLINE void AttendTile(const Tile& tile, const QueryRows& q, int64_t begin, int64_t end, const Live& live,
                           SoftmaxState state) {
  float factor[kRowsPerBlock], peak[kRowsPerBlock];
  for (int64_t from = begin; from < end; from += kRowsPerBlock) {
    const int64_t rows = HWY_MIN(end - from, kRowsPerBlock);
    ScoreTileRows(tile, q, from, rows);
    int64_t tokens = 0;
    for (int64_t r = 0; r < rows; ++r) tokens = HWY_MAX(tokens, LiveEnd(live(from + r)));
    SoftmaxRows(
        tile.scores, rows, [&](int64_t r) { return live(from + r); }, state.max + from, state.sum + from,
        PageWeights{factor, peak});
    ValueTileRows(tile, rows, tokens, factor, state.out + from * tile.head_size);
  }
}

// First row that sees token `token` when row r sees the tokens [0, first + r / group].
int64_t FirstRowSeeing(int64_t token, int64_t first, int64_t group) {
  return HWY_MAX(token - first, int64_t{0}) * group;
}

// The oldest token that a row sees.
int64_t OldestSeen(const QueryRows& q, int64_t first, int64_t row) {
  return q.window == 0 ? 0 : HWY_MAX(first + row / q.group + 1 - q.window, int64_t{0});
}

// One past the last row that sees any of the 64 tokens from t on.
int64_t EndRowSeeing(const QueryRows& q, int64_t first, int64_t t) {
  if (q.window == 0) return q.rows;
  return HWY_MAX(HWY_MIN((t + kPageTokens - 1 + q.window - first) * q.group, q.rows), int64_t{0});
}

// Of the 64 tokens from t on, those that a row sees.
uint64_t LiveCausal(const QueryRows& q, int64_t first, int64_t row, int64_t t) {
  return FirstLive(first + row / q.group + 1 - t) & ~FirstLive(OldestSeen(q, first, row) - t);
}

void AttendCausal(const DenseView& kv, int64_t first, const QueryRows& q, SoftmaxState state,
                  float* workspace) {
  const Tile tile(workspace, kv.head_size);
  const int64_t step = RowsPerTile(tile.head_size);
  for (int64_t r0 = 0; r0 < q.rows; r0 += step) {
    const int64_t r1 = HWY_MIN(r0 + step, q.rows);
    const int64_t seen = HWY_MIN(first + (r1 - 1) / q.group + 1, kv.n_tokens);
    for (int64_t t = OldestSeen(q, first, r0) / kPageTokens * kPageTokens; t < seen; t += kPageTokens) {
      WidenK(kv.k + t * kv.head_size, kv.head_size, tile.k);
      WidenV(kv.v + t * kv.head_size, HWY_MIN(seen - t, kPageTokens), kv.head_size, tile.v);
      const int64_t begin = HWY_MAX(r0, FirstRowSeeing(t, first, q.group));
      const int64_t end = HWY_MIN(r1, EndRowSeeing(q, first, t));
      if (begin >= end) continue;
      if (HWY_MIN(first + begin / q.group + 1, kv.n_tokens) - t >= kPageTokens &&
          OldestSeen(q, first, end - 1) <= t) {
        AttendTile(
            tile, q, begin, end, [](int64_t) { return kAllLive; }, state);
      } else {
        const uint64_t there = FirstLive(kv.n_tokens - t);
        const auto live = [&](int64_t r) { return LiveCausal(q, first, r, t) & there; };
        AttendTile(tile, q, begin, end, live, state);
      }
    }
  }
}

// add(row, its scores of a page's tokens, which of them it sees, [64] so far) for every row of q that sees
// any of the tokens [begin, end); end_token(token, what came of it) for each of them.
template <class Add, class EndToken>
HWY_INLINE void ForColumns(const DenseView& kv, int64_t first, int64_t begin, int64_t end, const QueryRows& q,
                           float* workspace, const Add& add, const EndToken& end_token) {
  const Tile tile(workspace, kv.head_size);
  for (int64_t t = begin / kPageTokens * kPageTokens; t < end; t += kPageTokens) {
    const uint64_t wanted = FirstLive(end - t) & ~FirstLive(begin - t);
    WidenK(kv.k + t * kv.head_size, kv.head_size, tile.k);
    float page[kPageTokens] = {};
    const int64_t end_row = EndRowSeeing(q, first, t);
    for (int64_t r = FirstRowSeeing(t, first, q.group); r < end_row; r += kRowsPerBlock) {
      const int64_t rows = HWY_MIN(end_row - r, kRowsPerBlock);
      ScoreTileRows(tile, q, r, rows);
      for (int64_t i = 0; i < rows; ++i) {
        const uint64_t live = LiveCausal(q, first, r + i, t) & wanted;
        add(r + i, tile.scores + i * kPageTokens, live, page);
      }
    }
    const int64_t from = HWY_MAX(begin - t, int64_t{0});
    const int64_t to = HWY_MIN(end - t, kPageTokens);
    for (int64_t i = from; i < to; ++i) end_token(t + i, page[i]);
  }
}

void ColumnSumsCausal(const DenseView& kv, int64_t first, int64_t begin, int64_t end, const QueryRows& q,
                      const float* max, const float* sum, float* sums, float* workspace) {
  ForColumns(
      kv, first, begin, end, q, workspace,
      [&](int64_t r, const float* scores, uint64_t live, float* page) {
        AddWeights(scores, live, max[r], sum[r], page);
      },
      [&](int64_t t, float x) { sums[t] += x; });
}

void ColumnOutputsCausal(const DenseView& kv, int64_t first, const QueryRows& q, const float* max,
                         const float* sum, const float* in, float* out, float* workspace) {
  const int64_t n = kv.head_size;
  const Tile tile(workspace, n);
  // Query rows take the part of tokens, and tokens that of rows.
  HWY_ALIGN float weights[kPageTokens * kPageTokens];
  float ones[kPageTokens];
  for (float& x : ones) x = 1.0f;
  for (int64_t t = 0; t < kv.n_tokens; t += kPageTokens) {
    const int64_t tokens = HWY_MIN(kv.n_tokens - t, kPageTokens);
    WidenK(kv.k + t * n, n, tile.k);
    const int64_t end_row = EndRowSeeing(q, first, t);
    for (int64_t r = FirstRowSeeing(t, first, q.group); r < end_row; r += kRowsPerBlock) {
      const int64_t rows = HWY_MIN(end_row - r, kRowsPerBlock);
      ScoreTileRows(tile, q, r, rows);
      for (int64_t i = 0; i < rows; ++i) {
        const uint64_t live = LiveCausal(q, first, r + i, t) & FirstLive(tokens);
        StoreColumn(tile.scores + i * kPageTokens, live, max[r + i], sum[r + i], i, weights);
      }
      ArrangeV(in + r * n, rows, n, tile.v);
      ValueTileRows(Tile(tile, weights), tokens, rows, ones, out + t * n);
    }
  }
}

// body(rows, how many) for the rows that chose a page, up to kRowsPerBlock at a time.
template <class Body>
HWY_INLINE void ForChosenRows(const ChosenPages& chosen, int64_t page, int64_t rows, const Body& body) {
  const float* most = chosen.most + page * rows;
  int64_t of[kRowsPerBlock], n = 0;
  for (int64_t r = 0; r < rows; ++r) {
    of[n] = r;
    n += !(most[r] < chosen.least[r]);  // what is no number is not left out
    if (n < kRowsPerBlock) continue;
    body(of, n);
    n = 0;
  }
  if (n > 0) body(of, n);
}

void GatherRows(const float* HWY_RESTRICT from, const int64_t* of, int64_t n, int64_t width,
                float* HWY_RESTRICT to) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < width; c += kLanes)
      hn::StoreU(hn::LoadU(DF(), from + of[i] * width + c), DF(), to + i * width + c);
}

void ScatterRows(const float* HWY_RESTRICT from, const int64_t* of, int64_t n, int64_t width,
                 float* HWY_RESTRICT to) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < width; c += kLanes)
      hn::StoreU(hn::LoadU(DF(), from + i * width + c), DF(), to + of[i] * width + c);
}

#if MOEND_HAVE_PAIRS
void PageMaxima(const DenseView& kv, const QueryRows& q, float* most, float* workspace) {
  const int64_t d = kv.head_size, pairs = d / 2;
  auto* const queries =
      reinterpret_cast<int32_t*>(workspace);          // i16 [rows][d]: half of the rotated queries' room
  float* const lengths = workspace + q.rows * pairs;  // [rows], in the other half
  auto* const keys = reinterpret_cast<int32_t*>(workspace + RotatedFloats(d, q.rows));
  for (int64_t r = 0; r < q.rows; ++r)
    lengths[r] = RoundQuery(q.q + r * d, d, reinterpret_cast<int16_t*>(queries + r * pairs));
  for (int64_t t = 0; t < kv.n_tokens; t += kPageTokens, most += q.rows) {
    const float length = RoundKeys(kv.k + t * d, HWY_MIN(kv.n_tokens - t, kPageTokens), d, keys);
    ForRowBlocks<kTileRows>(q.rows, [&](auto n, int64_t r) {
      float high[kTileRows];
      for (float& x : high) x = -kInfinity;
      for (int64_t v = 0; v < kPageTokens; v += kTileVectors * kLanes)
        MaxPairs<n()>(queries + r * pairs, keys + v, pairs, high);
      for (int i = 0; i < n(); ++i) {
        const float x = high[i] * lengths[r + i] * length;
        most[r + i] = q.soft_cap == 0 ? x : q.soft_cap * std::tanh(x / q.soft_cap);
      }
    });
  }
}
#else
void PageMaxima(const DenseView& kv, const QueryRows& q, float* most, float* workspace) {
  const Tile tile(workspace, kv.head_size);
  for (int64_t t = 0; t < kv.n_tokens; t += kPageTokens, most += q.rows) {
    WidenK(kv.k + t * kv.head_size, kv.head_size, tile.k);
    for (int64_t r = 0; r < q.rows; r += kRowsPerBlock) {
      const int64_t rows = HWY_MIN(q.rows - r, kRowsPerBlock);
      ScoreTileRows(tile, q, r, rows);
      MaxRows(tile.scores, rows, FirstLive(kv.n_tokens - t), most + r);
    }
  }
}
#endif

void ChoosePages(const float* most, int64_t pages, int64_t rows, SoftmaxState state, float share,
                 float* least) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t n = HWY_MIN(rows - r, kLanes);
    const DF df;
    HWY_ALIGN float part[kLanes] = {};
    const auto load = [&](const float* from) {
      if (n == kLanes) return hn::LoadU(df, from);
      std::memcpy(part, from, static_cast<size_t>(n) * sizeof(float));
      return hn::Load(df, part);
    };
    const VF before = load(state.max + r), lowest = hn::Set(df, std::numeric_limits<float>::lowest());
    VF max = hn::Max(before, lowest);
    for (int64_t p = 0; p < pages; ++p) max = hn::Max(max, load(most + p * rows + r));
    VF sum = hn::Mul(load(state.sum + r), Exp(hn::Sub(before, max)));
    for (int64_t p = 0; p < pages; ++p) sum = hn::Add(sum, Exp(hn::Sub(load(most + p * rows + r), max)));
    HWY_ALIGN float sums[kLanes], bases[kLanes];
    hn::Store(sum, df, sums);
    hn::Store(max, df, bases);
    for (int64_t i = 0; i < n; ++i) least[r + i] = bases[i] + std::log(sums[i] * share);
  }
}

void AttendChosen(const DenseView& kv, const QueryRows& q, const ChosenPages& chosen, SoftmaxState state,
                  float* workspace) {
  const int64_t d = kv.head_size;
  const Tile tile(workspace + RotatedFloats(d, q.rows), d);
  QueryRows some = q;
  some.q = workspace;  // the rows at hand: first their queries, then their outputs
  float max[kRowsPerBlock], sum[kRowsPerBlock], factor[kRowsPerBlock], peak[kRowsPerBlock];
  for (int64_t t = 0; t < kv.n_tokens; t += kPageTokens) {
    const int64_t tokens = HWY_MIN(kv.n_tokens - t, kPageTokens);
    bool widened = false;
    ForChosenRows(chosen, t / kPageTokens, q.rows, [&](const int64_t* of, int64_t n) {
      if (!widened) WidenK(kv.k + t * d, d, tile.k), WidenV(kv.v + t * d, tokens, d, tile.v);
      widened = true;
      GatherRows(q.q, of, n, d, workspace);
      for (int64_t i = 0; i < n; ++i) max[i] = state.max[of[i]], sum[i] = state.sum[of[i]];
      ScoreTileRows(tile, some, 0, n);
      SoftmaxRows(
          tile.scores, n, [&](int64_t) { return FirstLive(tokens); }, max, sum, PageWeights{factor, peak});
      GatherRows(state.out, of, n, d, workspace);
      ValueTileRows(tile, n, tokens, factor, workspace);
      ScatterRows(workspace, of, n, d, state.out);
      for (int64_t i = 0; i < n; ++i) state.max[of[i]] = max[i], state.sum[of[i]] = sum[i];
    });
  }
}

void ColumnSquaresChosen(const DenseView& kv, const QueryRows& q, const ChosenPages& chosen, const float* max,
                         const float* sum, const float* weight, float* squares, float* workspace) {
  const int64_t d = kv.head_size;
  const Tile tile(workspace + RotatedFloats(d, q.rows), d);
  QueryRows some = q;
  some.q = workspace;
  for (int64_t t = 0; t < kv.n_tokens; t += kPageTokens) {
    const int64_t tokens = HWY_MIN(kv.n_tokens - t, kPageTokens);
    float page[kPageTokens] = {};
    bool widened = false;
    ForChosenRows(chosen, t / kPageTokens, q.rows, [&](const int64_t* of, int64_t n) {
      if (!widened) WidenK(kv.k + t * d, d, tile.k);
      widened = true;
      GatherRows(q.q, of, n, d, workspace);
      ScoreTileRows(tile, some, 0, n);
      for (int64_t i = 0; i < n; ++i)
        AddSquares(tile.scores + i * kPageTokens, FirstLive(tokens), max[of[i]], sum[of[i]], weight[of[i]],
                   page);
    });
    for (int64_t i = 0; i < tokens; ++i) squares[t + i] += page[i];
  }
}

// Raw tokens [begin, begin + n) as a tile; columns of absent blocks are left as they are and masked.
void WidenRaw(const StreamView& kv, int64_t begin, int64_t n, const Tile& tile) {
  for (int64_t i = 0; i * kRawBlockTokens < n; ++i) {
    const uint16_t* from = kv.raw_k + (begin + i * kRawBlockTokens) * tile.head_size;
    const int64_t stride = kv.RawStride(begin / kRawBlockTokens + i);
    for (int64_t c = 0; c < tile.head_size; ++c) {
      for (int64_t t = 0; t < kRawBlockTokens; t += kLanes) {
        const VF x = LoadHalf(from + c * stride + t);
        hn::StoreU(x, DF(), tile.k + KAt(tile.head_size, c, i * kRawBlockTokens + t));
      }
    }
  }
  WidenV(kv.raw_v + begin * tile.head_size, n, tile.head_size, tile.v);
}

void AttendStreamTiled(const StreamView& kv, int64_t page_begin, int64_t page_end, bool raw,
                       const QueryRows& q, SoftmaxState state, float* workspace) {
  const Tile tile(workspace, kv.layout.head_size);
  const int64_t step = RowsPerTile(tile.head_size);
  for (int64_t r0 = 0; r0 < q.rows; r0 += step) {
    const int64_t r1 = HWY_MIN(r0 + step, q.rows);
    for (int64_t i = page_begin; i < page_end; ++i) {
      if (kv.live[i] == 0) continue;
      UnpackK(kv.layout, kv.pages[i], tile.k);
      UnpackV(kv.layout, kv.pages[i], tile.v);
      AttendTile(
          tile, q, r0, r1, [&](int64_t) { return kv.live[i]; }, state);
    }
    if (!raw) continue;
    for (int64_t t = FirstRawPage(kv, q, r0); t < kv.n_raw; t += kPageTokens) {
      const int64_t n = HWY_MIN(kv.n_raw - t, kPageTokens);
      WidenRaw(kv, t, n, tile);
      if (q.window == 0) {
        AttendTile(
            tile, q, r0, r1, [n](int64_t) { return FirstLive(n); }, state);
      } else {
        const auto live = [&](int64_t r) { return FirstLive(n) & ~FirstLive(OldestRaw(kv, q, r) - t); };
        AttendTile(tile, q, r0, r1, live, state);
      }
    }
  }
}

void ColumnSumsStreamTiled(const StreamView& kv, const QueryRows& q, const float* max, const float* sum,
                           float* sums, float* workspace) {
  const Tile tile(workspace, kv.layout.head_size);
  for (int64_t i = 0; i < kv.n_pages; ++i) {
    if (kv.live[i] == 0) continue;
    UnpackK(kv.layout, kv.pages[i], tile.k);
    for (int64_t r = 0; r < q.rows; r += kRowsPerBlock) {
      const int64_t rows = HWY_MIN(q.rows - r, kRowsPerBlock);
      ScoreTileRows(tile, q, r, rows);
      for (int64_t j = 0; j < rows; ++j)
        AddWeights(tile.scores + j * kPageTokens, kv.live[i], max[r + j], sum[r + j], sums + i * kPageTokens);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace moend::simd
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moend::simd {

HWY_EXPORT(AttendCausal);
HWY_EXPORT(ColumnSumsCausal);
HWY_EXPORT(ColumnOutputsCausal);
HWY_EXPORT(PageMaxima);
HWY_EXPORT(ChoosePages);
HWY_EXPORT(AttendChosen);
HWY_EXPORT(ColumnSquaresChosen);
HWY_EXPORT(AttendStreamTiled);
HWY_EXPORT(ColumnSumsStreamTiled);

void AttendCausal(const DenseView& kv, int64_t first, const QueryRows& q, SoftmaxState state,
                  float* workspace) {
  HWY_DYNAMIC_DISPATCH(AttendCausal)(kv, first, q, state, workspace);
}

void ColumnSumsCausal(const DenseView& kv, int64_t first, int64_t begin, int64_t end, const QueryRows& q,
                      const float* max, const float* sum, float* sums, float* workspace) {
  HWY_DYNAMIC_DISPATCH(ColumnSumsCausal)(kv, first, begin, end, q, max, sum, sums, workspace);
}

void ColumnOutputsCausal(const DenseView& kv, int64_t first, const QueryRows& q, const float* max,
                         const float* sum, const float* in, float* out, float* workspace) {
  HWY_DYNAMIC_DISPATCH(ColumnOutputsCausal)(kv, first, q, max, sum, in, out, workspace);
}

void PageMaxima(const DenseView& kv, const QueryRows& q, float* most, float* workspace) {
  HWY_DYNAMIC_DISPATCH(PageMaxima)(kv, q, most, workspace);
}

void ChoosePages(const float* most, int64_t pages, int64_t rows, SoftmaxState state, float share,
                 float* least) {
  HWY_DYNAMIC_DISPATCH(ChoosePages)(most, pages, rows, state, share, least);
}

void AttendChosen(const DenseView& kv, const QueryRows& q, const ChosenPages& chosen, SoftmaxState state,
                  float* workspace) {
  HWY_DYNAMIC_DISPATCH(AttendChosen)(kv, q, chosen, state, workspace);
}

void ColumnSquaresChosen(const DenseView& kv, const QueryRows& q, const ChosenPages& chosen, const float* max,
                         const float* sum, const float* weight, float* squares, float* workspace) {
  HWY_DYNAMIC_DISPATCH(ColumnSquaresChosen)(kv, q, chosen, max, sum, weight, squares, workspace);
}

void AttendStreamTiled(const StreamView& kv, int64_t page_begin, int64_t page_end, bool raw,
                       const QueryRows& q, SoftmaxState state, float* workspace) {
  HWY_DYNAMIC_DISPATCH(AttendStreamTiled)(kv, page_begin, page_end, raw, q, state, workspace);
}

void ColumnSumsStreamTiled(const StreamView& kv, const QueryRows& q, const float* max, const float* sum,
                           float* sums, float* workspace) {
  HWY_DYNAMIC_DISPATCH(ColumnSumsStreamTiled)(kv, q, max, sum, sums, workspace);
}

}  // namespace moend::simd
#endif  // HWY_ONCE
