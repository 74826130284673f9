// 2-bit codes: four rows in one.
#pragma once

#include "moend/cache/rows.h"

namespace moend {

template <class Planes>
struct Rows2 {
  static constexpr int kMaxCode = 3;
  static void Pack(const uint8_t* rows, int64_t n_rows, uint8_t* packed) {
    Planes::template Join<2>(rows, n_rows, packed);
  }
  static void Unpack(const uint8_t* packed, int64_t n_rows, uint8_t* rows) {
    Planes::template Split<2>(packed, n_rows, rows);
  }
};

}  // namespace moend
