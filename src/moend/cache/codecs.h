// All widths below 16 bits.
#pragma once

#include "moend/cache/codec_2/rows.h"
#include "moend/cache/codec_3/rows.h"
#include "moend/cache/codec_4/rows.h"
#include "moend/cache/codec_8/rows.h"

namespace moend {

// f(Rows<bits><Planes>())
template <class Planes, class F>
void WithRows(int bits, F f) {
  switch (bits) {
    case 8:
      return f(Rows8<Planes>());
    case 4:
      return f(Rows4<Planes>());
    case 3:
      return f(Rows3<Planes>());
    default:
      return f(Rows2<Planes>());
  }
}

}  // namespace moend
