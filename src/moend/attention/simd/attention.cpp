// The entry points that choose between the fused and the tiled kernels, and those that need no K/V.
#include "moend/attention/attention.h"
#include "moend/attention/rotation.h"

#include "moend/attention/simd/decode.h"
#include "moend/attention/simd/prefill.h"
#include "moend/attention/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "moend/attention/simd/attention.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include "moend/attention/simd/common-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moend::simd {
namespace HWY_NAMESPACE {

void MergeStates(SoftmaxState into, SoftmaxState from, int64_t rows, int64_t head_size) {
  const DF df;
  for (int64_t r = 0; r < rows; ++r) {
    const float max = HWY_MAX(into.max[r], from.max[r]);
    const float base = max == -kInfinity ? 0.0f : max;
    const VF keep = Exp(hn::Set(df, into.max[r] - base));
    const VF add = Exp(hn::Set(df, from.max[r] - base));
    for (int64_t c = r * head_size; c < (r + 1) * head_size; c += kLanes) {
      const VF kept = hn::Mul(hn::LoadU(df, into.out + c), keep);
      hn::StoreU(hn::MulAdd(hn::LoadU(df, from.out + c), add, kept), df, into.out + c);
    }
    into.sum[r] = into.sum[r] * hn::GetLane(keep) + from.sum[r] * hn::GetLane(add);
    into.max[r] = max;
  }
}

void Finish(SoftmaxState state, int64_t rows, int64_t head_size) {
  const DF df;
  for (int64_t r = 0; r < rows; ++r) {
    const VF scale = hn::Set(df, state.sum[r] == 0.0f ? 0.0f : 1.0f / state.sum[r]);
    for (int64_t c = r * head_size; c < (r + 1) * head_size; c += kLanes)
      hn::StoreU(hn::Mul(hn::LoadU(df, state.out + c), scale), df, state.out + c);
  }
}

const char* TargetName() {
  return hwy::TargetName(HWY_TARGET);
}

}  // namespace HWY_NAMESPACE
}  // namespace moend::simd
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moend::simd {

HWY_EXPORT(MergeStates);
HWY_EXPORT(Finish);
HWY_EXPORT(TargetName);

void MergeStates(SoftmaxState into, SoftmaxState from, int64_t rows, int64_t head_size) {
  HWY_DYNAMIC_DISPATCH(MergeStates)(into, from, rows, head_size);
}

void Finish(SoftmaxState state, int64_t rows, int64_t head_size) {
  HWY_DYNAMIC_DISPATCH(Finish)(state, rows, head_size);
}

const char* TargetName() {
  return HWY_DYNAMIC_DISPATCH(TargetName)();
}

namespace {

// Rotated queries lie at the start of the workspace; the kernels get what is behind them.
QueryRows ForPages(const StreamView& kv, const QueryRows& q, float** workspace) {
  const int64_t head_size = kv.layout.head_size;
  RotateRows(q.q, q.rows, head_size, kv.rotation->inverse, *workspace);
  QueryRows rotated = q;
  rotated.q = *workspace;
  *workspace += RotatedFloats(head_size, q.rows);
  return rotated;
}

void AttendPlain(const StreamView& kv, int64_t page_begin, int64_t page_end, bool raw, const QueryRows& q,
                 SoftmaxState state, float* workspace) {
  if (q.rows <= MostFusedRows()) {
    AttendStreamFused(kv, page_begin, page_end, raw, q, state, workspace);
  } else {
    AttendStreamTiled(kv, page_begin, page_end, raw, q, state, workspace);
  }
}

}  // namespace

void AttendStream(const StreamView& kv, int64_t page_begin, int64_t page_end, bool raw, const QueryRows& q,
                  SoftmaxState state, float* workspace) {
  if (!kv.rotation) return AttendPlain(kv, page_begin, page_end, raw, q, state, workspace);
  if (page_begin < page_end) {
    float* behind = workspace;
    const QueryRows rotated = ForPages(kv, q, &behind);
    AttendPlain(kv, page_begin, page_end, false, rotated, state, behind);
  }
  if (raw) AttendPlain(kv, 0, 0, true, q, state, workspace);
}

void ColumnSumsStream(const StreamView& kv, const QueryRows& q, const float* max, const float* sum,
                      float* sums, float* workspace) {
  const QueryRows rows = kv.rotation ? ForPages(kv, q, &workspace) : q;
  if (rows.rows <= MostFusedRows()) {
    ColumnSumsStreamFused(kv, rows, max, sum, sums, workspace);
  } else {
    ColumnSumsStreamTiled(kv, rows, max, sum, sums, workspace);
  }
}

}  // namespace moend::simd
#endif  // HWY_ONCE
