// Few rows, codes read as they are packed. Internal to the simd folder; attention.h has the meaning.
#pragma once

#include "moend/attention/attention.h"

namespace moend::simd {

// Above this many rows it is faster to unpack a page to float32 once and to multiply it as a matrix
// (prefill.h), unless the codes are multiplied as integers.
int64_t MostFusedRows();

void AttendStreamFused(const StreamView& kv, int64_t page_begin, int64_t page_end, bool raw,
                       const QueryRows& q, SoftmaxState state, float* workspace);
void ColumnSumsStreamFused(const StreamView& kv, const QueryRows& q, const float* max, const float* sum,
                           float* sums, float* workspace);

}  // namespace moend::simd
