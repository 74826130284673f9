#include "moend/cache/value_transfer.h"

#include <algorithm>
#include <cstring>

#include "moend/cache/codec.h"

namespace moend {
namespace {

constexpr int64_t kHalfBytes = 2;

}  // namespace

Expected<ValueTransfer> ValueTransfer::Create(const PageLayout& layout) {
  ValueTransfer transfer(layout);
  const int64_t bytes = layout.head_size * kPageTokens * (layout.v_bits == 16 ? kHalfBytes : 1);
  for (Part* part : {&transfer.from_, &transfer.to_}) {
    MOEND_ASSIGN(part->values, Buffer<uint8_t>::Create(nullptr, bytes));
    if (layout.v_bits == 16) continue;
    MOEND_ASSIGN(part->scales, Buffer<uint16_t>::Create(nullptr, transfer.GroupCount()));
    MOEND_ASSIGN(part->mins, Buffer<uint16_t>::Create(nullptr, transfer.GroupCount()));
  }
  transfer.Clear();
  return transfer;
}

void ValueTransfer::Clear() {
  std::fill_n(to_.values.data(), to_.values.size(), uint8_t{0});
  if (layout_.v_bits == 16) return;
  std::fill_n(to_.scales.data(), GroupCount(), uint16_t{0});
  std::fill_n(to_.mins.data(), GroupCount(), uint16_t{0});
}

void ValueTransfer::Open(const uint8_t* page) {
  const uint8_t* codes = page + layout_.v_codes;
  if (layout_.v_bits == 16) {
    std::memcpy(from_.values.data(), codes, static_cast<std::size_t>(from_.values.size()));
    return;
  }
  UnpackCodes(layout_.v_bits, codes, layout_.head_size, from_.values.data());
  const auto bytes = static_cast<std::size_t>(GroupCount() * kHalfBytes);
  std::memcpy(from_.scales.data(), page + layout_.v_scale, bytes);
  std::memcpy(from_.mins.data(), page + layout_.v_min, bytes);
}

void ValueTransfer::Move(int64_t slot, int64_t to) {
  const int64_t hs = layout_.head_size;
  if (layout_.v_bits == 16) {
    std::copy_n(from_.values.data() + slot * hs * kHalfBytes, hs * kHalfBytes,
                to_.values.data() + to * hs * kHalfBytes);
    return;
  }
  // Channel cv * 16 + lane of a token is in row cv * 16 + token / 4, byte lane * 4 + token % 4.
  const uint8_t* source = from_.values.data() + slot / 4 * kPageTokens + slot % 4;
  uint8_t* target = to_.values.data() + to / 4 * kPageTokens + to % 4;
  for (int64_t row = 0; row < hs * kPageTokens; row += 16 * kPageTokens)
    for (int64_t byte = 0; byte < kPageTokens; byte += 4) target[row + byte] = source[row + byte];
  for (int64_t group = 0; group < GroupCount(); group += kPageTokens) {
    to_.scales[group + to] = from_.scales[group + slot];
    to_.mins[group + to] = from_.mins[group + slot];
  }
}

void ValueTransfer::Flush(uint8_t* page) {
  uint8_t* codes = page + layout_.v_codes;
  if (layout_.v_bits == 16) {
    std::memcpy(codes, to_.values.data(), static_cast<std::size_t>(to_.values.size()));
  } else {
    PackCodes(layout_.v_bits, to_.values.data(), layout_.head_size, codes);
    const auto bytes = static_cast<std::size_t>(GroupCount() * kHalfBytes);
    std::memcpy(page + layout_.v_scale, to_.scales.data(), bytes);
    std::memcpy(page + layout_.v_min, to_.mins.data(), bytes);
  }
  Clear();
}

}  // namespace moend
