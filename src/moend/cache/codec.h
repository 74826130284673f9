// Packs 64 tokens of one KV head into a page and unpacks them. The page format is in plan/layout.h. The
// scalar functions of namespace `reference` are the definition; the vectorized ones give the same bytes and
// values on every instruction set. Only in PackKeysFeedback() may codes differ, where values half way between
// two of them are rounded otherwise.
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

#define MOEND_DECLARE_CODEC                                                                                 \
  /* One side of a page. K is channel major here, [head_size][64], as a page's K groups are; */             \
  /* V is token major, [64][head_size]. */                                                                  \
  void PackKeys(const PageLayout& layout, const float* k, uint64_t live, uint8_t* page);                    \
  void PackValues(const PageLayout& layout, const float* v, uint64_t live, uint8_t* page);                  \
  /* PackKeys of 64 live tokens and less than 16 bits, each channel's rounding errors being passed on to */ \
  /* those behind it: k[j] -= factors[c][j] * error of k[c] (key_feedback.h). Scales are those of k as */   \
  /* given; k is lost. */                                                                                   \
  void PackKeysFeedback(const PageLayout& layout, float* k, const float* factors, uint8_t* page);           \
  void UnpackKeys(const PageLayout& layout, const uint8_t* page, float* k);                                 \
  void UnpackValues(const PageLayout& layout, const uint8_t* page, float* v);                               \
  /* Codes of less than 16 bits as bytes, in the rows that plan/layout.h describes: [head_size][64]. */     \
  void PackCodes(int bits, const uint8_t* rows, int64_t head_size, uint8_t* packed);                        \
  void UnpackCodes(int bits, const uint8_t* packed, int64_t head_size, uint8_t* rows);                      \
  /* Half floats to floats, and back with FloatToFiniteHalf(). */                                           \
  void HalvesToFloats(const uint16_t* halves, int64_t n, float* floats);                                    \
  void FloatsToHalves(const float* floats, int64_t n, uint16_t* halves);

MOEND_DECLARE_CODEC
namespace reference {
MOEND_DECLARE_CODEC
}

// Largest possible |x - unpack(pack(x))| of a group whose values span [low, high]: half a step plus the
// rounding of scale and min to half floats. For bits = 16: the rounding of a half float. V of 2 bits may get
// a scale that spans less (group.h), but only where this bound still holds.
double RoundTripBound(int bits, double low, double high);

}  // namespace moend
