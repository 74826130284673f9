// 3-bit codes: a plane of the low two bits (four rows in one), then a plane of the high bit (eight in one).
#pragma once

#include "moend/cache/rows.h"

namespace moend {

template <class Planes>
struct Rows3 {
  static constexpr int kMaxCode = 7;
  static void Pack(const uint8_t* rows, int64_t n_rows, uint8_t* packed) {
    Planes::template Join<2>(rows, n_rows, packed);
    Planes::template Join<1, 2>(rows, n_rows, packed + HighPlane(n_rows));
  }
  static void Unpack(const uint8_t* packed, int64_t n_rows, uint8_t* rows) {
    Planes::template Split<2>(packed, n_rows, rows);
    Planes::template Split<1, 2, true>(packed + HighPlane(n_rows), n_rows, rows);
  }

 private:
  static constexpr int64_t HighPlane(int64_t n_rows) { return n_rows / 4 * kRowBytes; }
};

}  // namespace moend
