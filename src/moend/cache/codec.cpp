#include "moend/cache/codec.h"

#include <array>

namespace moend {
namespace {

constexpr int64_t kMaxHeadSize = 256;
using ChannelMajor = std::array<float, kMaxHeadSize * kPageTokens>;

}  // namespace

void PackPage(const PageLayout& layout, const float* k, const float* v, uint64_t live, uint8_t* page) {
  ChannelMajor keys;
  for (int64_t t = 0; t < kPageTokens; ++t)
    for (int64_t c = 0; c < layout.head_size; ++c) keys[c * kPageTokens + t] = k[t * layout.head_size + c];
  PackKeys(layout, keys.data(), live, page);
  PackValues(layout, v, live, page);
}

void UnpackPage(const PageLayout& layout, const uint8_t* page, float* k, float* v) {
  if (k) {
    ChannelMajor keys;
    UnpackKeys(layout, page, keys.data());
    for (int64_t t = 0; t < kPageTokens; ++t)
      for (int64_t c = 0; c < layout.head_size; ++c) k[t * layout.head_size + c] = keys[c * kPageTokens + t];
  }
  if (v) UnpackValues(layout, page, v);
}

}  // namespace moend
