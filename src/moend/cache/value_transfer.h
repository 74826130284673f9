// Moves V of single tokens from page to page as it is stored: a token brings its own scale, so nothing is
// quantized again. (K shares scales between tokens; it must be.)
#pragma once

#include <cstdint>

#include "moend/base/error.h"
#include "moend/base/ledger.h"
#include "moend/plan/layout.h"

namespace moend {

class ValueTransfer {
 public:
  static Expected<ValueTransfer> Create(const PageLayout& layout);

  // Reads a page; it may be overwritten afterwards.
  void Open(const uint8_t* page);
  // Token `slot` of the open page becomes token `to` of the next one.
  void Move(int64_t slot, int64_t to);
  // Writes the V part of a page; tokens that were not moved there are zeros, as are those of the next page.
  void Flush(uint8_t* page);

 private:
  // The V part of a page, spread out. 16 bits: `values` only, as bytes; else the code rows and the scales.
  struct Part {
    Buffer<uint8_t> values;
    Buffer<uint16_t> scales, mins;
  };
  explicit ValueTransfer(const PageLayout& layout) : layout_(layout) {}
  int64_t GroupCount() const { return layout_.v_groups * kPageTokens; }
  void Clear();

  PageLayout layout_;
  Part from_, to_;
};

}  // namespace moend
