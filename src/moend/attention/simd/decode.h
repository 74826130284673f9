// Few rows, codes read as they are packed. Internal to the simd folder; attention.h has the meaning.
#pragma once

#include "moend/attention/attention.h"

namespace moend::simd {

// q.rows <= kFusedRows
void AttendStreamFused(const StreamView& kv, int64_t page_begin, int64_t page_end, bool raw,
                       const QueryRows& q, SoftmaxState state, float* workspace);
void ColumnSumsStreamFused(const StreamView& kv, const QueryRows& q, const float* max, const float* sum,
                           float* sums, float* workspace);

}  // namespace moend::simd
