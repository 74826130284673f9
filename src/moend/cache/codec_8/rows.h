// 8-bit codes: a byte each, rows are stored as they are.
#pragma once

#include "moend/cache/rows.h"

namespace moend {

template <class Planes>
struct Rows8 {
  static constexpr int kMaxCode = 255;
  static void Pack(const uint8_t* rows, int64_t n_rows, uint8_t* packed) {
    Planes::template Join<8>(rows, n_rows, packed);
  }
  static void Unpack(const uint8_t* packed, int64_t n_rows, uint8_t* rows) {
    Planes::template Split<8>(packed, n_rows, rows);
  }
};

}  // namespace moend
