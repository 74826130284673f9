#include "moend/cache/codec.h"

namespace moend {

void PackPage(const PageLayout& layout, const float* k, const float* v, uint64_t live, uint8_t* page) {
  reference::PackPage(layout, k, v, live, page);
}

void UnpackPage(const PageLayout& layout, const uint8_t* page, float* k, float* v) {
  reference::UnpackPage(layout, page, k, v);
}

}  // namespace moend
