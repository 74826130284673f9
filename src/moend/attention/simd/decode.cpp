// Decode: all query rows of a KV head share one pass over its packed codes.
#include "moend/attention/simd/decode.h"

#include "moend/attention/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "moend/attention/simd/decode.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include "moend/attention/simd/score_pass-inl.h"
#include "moend/attention/simd/softmax-inl.h"
#include "moend/attention/simd/value_pass-inl.h"
#include "moend/attention/simd/vnni-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moend::simd {
namespace HWY_NAMESPACE {

// The workspace of the fused path, cut up.
struct Scratch {
  float* scores;    // [rows][64]
  float* scaled_p;  // [rows][64]
  float* scaled_q;  // [rows][head_size]
  float* constant;  // [rows]
  float* factor;    // [rows]
  float* peak;      // [rows]
  float* scale;     // [rows]

  Scratch(float* workspace, int64_t rows, int64_t head_size)
      : scores(workspace),
        scaled_p(scores + rows * kPageTokens),
        scaled_q(scaled_p + rows * kPageTokens),
        constant(scaled_q + rows * head_size),
        factor(constant + rows),
        peak(factor + rows),
        scale(peak + rows) {}
};

// live(r): of row r.
template <class Live>
HWY_INLINE void SoftmaxPage(const Live& live, const QueryRows& q, const Scratch& s, SoftmaxState state) {
  if (q.soft_cap != 0) CapScores(s.scores, q.rows * kPageTokens, q.soft_cap);
  SoftmaxRows(s.scores, q.rows, live, state.max, state.sum, PageWeights{s.factor, s.peak});
}

// The part of a page that the score pass reads, to be brought near during another pass of `steps` steps.
Ahead AheadK(const PageLayout& layout, const uint8_t* page, int64_t steps) {
  return Ahead(page, page + layout.v_codes, steps);
}

Ahead AheadV(const PageLayout& layout, const uint8_t* page, int64_t steps) {
  return Ahead(page + layout.v_codes, page + layout.bytes, steps);
}

// Steps that ScorePage and ValuePage take at least, each a call of Ahead::Next().
int64_t ScoreSteps(const PageLayout& layout) {
  return layout.k_bits == 16 ? layout.head_size : layout.head_size / 4;
}

int64_t ValueSteps(const PageLayout& layout) {
  const int64_t blocks = (layout.head_size + kValueVectors * kLanes - 1) / (kValueVectors * kLanes);
  return blocks * (layout.v_bits == 16 ? kPageTokens : kPageTokens / 4);
}

void ScorePage(const PageLayout& layout, const uint8_t* page, const QueryRows& q, Ahead ahead,
               const Scratch& s) {
  if (layout.k_bits == 16) {
    const HalfK k = PageHalfK(AsHalves(page + layout.k_codes));
    ScoreHalfRows(k, layout.head_size, q.q, q.rows, ahead, s.scores);
    return;
  }
#if MOEND_HAVE_VNNI
  ScorePageFixed(layout, page, q.q, q.rows, s.scaled_q, s.scale, s.constant, ahead, s.scores);
#else
  ScorePageCodes(layout, page, q.q, q.rows, s.scaled_q, s.constant, ahead, s.scores);
#endif
}

void ValuePage(const PageLayout& layout, const uint8_t* page, int64_t rows, Ahead ahead, const Scratch& s,
               float* out) {
  if (layout.v_bits == 16) {
    for (int64_t r = 0; r < rows; ++r) s.constant[r] = 0.0f;
    const ValueRows block{s.scores, s.factor, s.constant, out, layout.head_size};
    ValueHalfRows(AsHalves(page + layout.v_codes), kPageTokens, block, rows, ahead);
    return;
  }
#if MOEND_HAVE_VNNI
  ValuePageFixed(layout, page, s.scores, PageWeights{s.factor, s.peak}, rows, s.scaled_p, s.scale, s.constant,
                 ahead, out);
#else
  ValuePageCodes(layout, page, s.scores, s.factor, rows, s.scaled_p, s.constant, ahead, out);
#endif
}

// scores[rows][64] = q . k of up to 64 raw tokens from token `begin` on; those of lanes without a token are
// of no use.
void ScoreRaw(const StreamView& kv, int64_t begin, const QueryRows& q, float* scores) {
  const int64_t head_size = kv.layout.head_size, last = (kv.n_raw - 1) / kRawBlockTokens;
  const bool cut = kv.raw_tail < kRawBlockTokens;  // the last block is narrower
  const int64_t first = begin / kRawBlockTokens, last_whole = cut ? last - 1 : last;
  const auto block = [&](int64_t i) { return kv.raw_k + i * head_size * kRawBlockTokens; };
  if (first <= last_whole) {
    HalfK k{{}, kRawBlockTokens};
    for (int64_t i = 0; i < 4; ++i) k.tokens16[i] = block(HWY_MIN(first + i, last_whole));
    ScoreHalfRows(k, head_size, q.q, q.rows, Ahead(), scores);
  }
  if (cut && last < first + 4) {
    const uint16_t* tail = block(last);
    ScoreHalfBlock(HalfK{{tail, tail, tail, tail}, kv.raw_tail}, last - first, head_size, q.q, q.rows,
                   scores);
  }
}

// 64 raw tokens at a time, from token `begin`. Through a window row r of `q`, which is row first_row + r of
// its call, sees those from OldestRaw() on.
void AttendRaw(const StreamView& kv, int64_t begin, const QueryRows& q, int64_t first_row, SoftmaxState state,
               const Scratch& s) {
  const int64_t head_size = kv.layout.head_size;
  const int64_t n = HWY_MIN(kv.n_raw - begin, kPageTokens);
  ScoreRaw(kv, begin, q, s.scores);
  if (q.window == 0) {
    SoftmaxPage([n](int64_t) { return FirstLive(n); }, q, s, state);
  } else {
    SoftmaxPage([&](int64_t r) { return FirstLive(n) & ~FirstLive(OldestRaw(kv, q, first_row + r) - begin); },
                q, s, state);
  }
  for (int64_t r = 0; r < q.rows; ++r) s.constant[r] = 0.0f;
  ValueHalfRows(kv.raw_v + begin * head_size, n,
                ValueRows{s.scores, s.factor, s.constant, state.out, head_size}, q.rows, Ahead());
}

// q: at most kFusedRows rows, from row first_row of the call on.
void AttendStreamBlock(const StreamView& kv, int64_t page_begin, int64_t page_end, bool raw,
                       const QueryRows& q, int64_t first_row, SoftmaxState state, float* workspace) {
  const PageLayout& layout = kv.layout;
  const Scratch s(workspace, q.rows, layout.head_size);
  for (int64_t i = page_begin; i < page_end; ++i) {
    if (kv.live[i] == 0) continue;
    const uint8_t* page = kv.pages[i];
    ScorePage(layout, page, q, AheadV(layout, page, ScoreSteps(layout)), s);
    SoftmaxPage([live = kv.live[i]](int64_t) { return live; }, q, s, state);
    Ahead next;
    if (i + 1 < page_end) next = AheadK(layout, kv.pages[i + 1], ValueSteps(layout));
    ValuePage(layout, page, q.rows, next, s, state.out);
  }
  if (!raw) return;
  for (int64_t t = FirstRawPage(kv, q, first_row); t < kv.n_raw; t += kPageTokens)
    AttendRaw(kv, t, q, first_row, state, s);
}

QueryRows RowBlock(const QueryRows& q, int64_t begin, int64_t head_size) {
  QueryRows block = q;
  block.q = q.q + begin * head_size;
  block.rows = HWY_MIN(q.rows - begin, kFusedRows);
  return block;
}

void AttendStreamFused(const StreamView& kv, int64_t page_begin, int64_t page_end, bool raw,
                       const QueryRows& q, SoftmaxState state, float* workspace) {
  const int64_t head_size = kv.layout.head_size;
  for (int64_t r = 0; r < q.rows; r += kFusedRows) {
    AttendStreamBlock(kv, page_begin, page_end, raw, RowBlock(q, r, head_size), r,
                      SoftmaxState{state.out + r * head_size, state.max + r, state.sum + r}, workspace);
  }
}

void ColumnSumsStreamFused(const StreamView& kv, const QueryRows& q, const float* max, const float* sum,
                           float* sums, float* workspace) {
  const int64_t head_size = kv.layout.head_size;
  for (int64_t begin = 0; begin < q.rows; begin += kFusedRows) {
    const QueryRows block = RowBlock(q, begin, head_size);
    const Scratch s(workspace, block.rows, head_size);
    for (int64_t i = 0; i < kv.n_pages; ++i) {
      if (kv.live[i] == 0) continue;
      Ahead next;
      if (i + 1 < kv.n_pages) next = AheadK(kv.layout, kv.pages[i + 1], ScoreSteps(kv.layout));
      ScorePage(kv.layout, kv.pages[i], block, next, s);
      if (q.soft_cap != 0) CapScores(s.scores, block.rows * kPageTokens, q.soft_cap);
      for (int64_t r = 0; r < block.rows; ++r) {
        AddWeights(s.scores + r * kPageTokens, kv.live[i], max[begin + r], sum[begin + r],
                   sums + i * kPageTokens);
      }
    }
  }
}

int64_t MostFusedRows() {
  if (MOEND_HAVE_VNNI) return std::numeric_limits<int64_t>::max();
  return kLanes == 16 ? 24 : 12;
}

}  // namespace HWY_NAMESPACE
}  // namespace moend::simd
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moend::simd {

HWY_EXPORT(AttendStreamFused);
HWY_EXPORT(ColumnSumsStreamFused);
HWY_EXPORT(MostFusedRows);

void AttendStreamFused(const StreamView& kv, int64_t page_begin, int64_t page_end, bool raw,
                       const QueryRows& q, SoftmaxState state, float* workspace) {
  HWY_DYNAMIC_DISPATCH(AttendStreamFused)(kv, page_begin, page_end, raw, q, state, workspace);
}

void ColumnSumsStreamFused(const StreamView& kv, const QueryRows& q, const float* max, const float* sum,
                           float* sums, float* workspace) {
  HWY_DYNAMIC_DISPATCH(ColumnSumsStreamFused)(kv, q, max, sum, sums, workspace);
}

int64_t MostFusedRows() {
  return HWY_DYNAMIC_DISPATCH(MostFusedRows)();
}

}  // namespace moend::simd
#endif  // HWY_ONCE
