// 16 bits: half floats, no scales. Values are made finite, so that one bad value cannot poison a page.
#pragma once

#include "moend/base/half.h"

namespace moend {

struct Halves {
  static uint16_t Encode(float x) { return FloatToFiniteHalf(x); }
  static float Decode(uint16_t h) { return HalfToFloat(h); }
};

}  // namespace moend
