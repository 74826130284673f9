#include "moend/cache/codec.h"

#include <array>

namespace moend {
namespace {

constexpr int64_t kMaxHeadSize = 256;
using ChannelMajor = std::array<float, kMaxHeadSize * kPageTokens>;

}  // namespace

void PackKeys(const PageLayout& layout, const float* k, uint64_t live, uint8_t* page) {
  reference::PackKeys(layout, k, live, page);
}
void PackValues(const PageLayout& layout, const float* v, uint64_t live, uint8_t* page) {
  reference::PackValues(layout, v, live, page);
}
void UnpackKeys(const PageLayout& layout, const uint8_t* page, float* k) {
  reference::UnpackKeys(layout, page, k);
}
void UnpackValues(const PageLayout& layout, const uint8_t* page, float* v) {
  reference::UnpackValues(layout, page, v);
}
void HalvesToFloats(const uint16_t* halves, int64_t n, float* floats) {
  reference::HalvesToFloats(halves, n, floats);
}
void FloatsToHalves(const float* floats, int64_t n, uint16_t* halves) {
  reference::FloatsToHalves(floats, n, halves);
}

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
