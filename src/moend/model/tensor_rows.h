// Elements of a tensor as the file has them, whatever layout ggml may have copied it into.
#pragma once

#include <ggml.h>

#include <algorithm>
#include <cstdint>

#include "moend/model/gguf.h"

namespace moend {

// Elements [begin, begin + n) of row `row` of a matrix, as floats. begin is a multiple of the type's block
// size, and so is n, unless it ends where the row does.
inline void ReadElements(const GgufTensor& t, int64_t row, int64_t begin, int64_t n, float* to) {
  const ggml_type_traits* traits = ggml_get_type_traits(t.type);
  const uint8_t* from = t.data + row * (t.bytes / t.ne[1]) +
                        begin / traits->blck_size * static_cast<int64_t>(traits->type_size);
  if (t.type == GGML_TYPE_F32) {
    std::copy_n(reinterpret_cast<const float*>(from), n, to);
  } else {
    traits->to_float(from, to, n);
  }
}

}  // namespace moend
