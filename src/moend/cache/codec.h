// Packs 64 tokens of one KV head into a page and unpacks them. The page format is in plan/layout.h. The
// scalar versions in cache/codec_<bits>/ are the definition; vectorized ones must give the same bytes.
#pragma once

#include <cstdint>

#include "moend/plan/layout.h"

namespace moend {

// k: [64][head_size] float, v: [64][head_size] float, token major. `live` has bit t set where slot t holds a
// token; dead slots do not influence the scales and are stored as code 0. NaN counts as 0, values beyond the
// range of half floats as the largest of them. The page's reference count is left alone.
void PackPage(const PageLayout& layout, const float* k, const float* v, uint64_t live, uint8_t* page);

// Gives back all 64 slots (dead ones too, with whatever they hold), token major. Either output may be null.
void UnpackPage(const PageLayout& layout, const uint8_t* page, float* k, float* v);

// The definition: scalar, one value at a time.
namespace reference {
void PackPage(const PageLayout& layout, const float* k, const float* v, uint64_t live, uint8_t* page);
void UnpackPage(const PageLayout& layout, const uint8_t* page, float* k, float* v);
}  // namespace reference

// Largest possible |x - unpack(pack(x))| of a group whose values span [low, high]: half a step plus the
// rounding of scale and min to half floats. For bits = 16: the rounding of a half float.
double RoundTripBound(int bits, double low, double high);

}  // namespace moend
