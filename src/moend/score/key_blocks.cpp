#include "moend/score/key_blocks.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "moend/attention/rotation.h"
#include "moend/cache/codec.h"

namespace moend {
namespace {

// Branch free, so that loops over it vectorize. Exact for finite values, subnormals included; infinities and
// NaN become large finite numbers.
float ToFloat(uint16_t half) {
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFFu) << 13;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f) | sign);
}

void ToFloats(const uint16_t* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = ToFloat(from[i]);
}

float Length(const uint16_t* v, int64_t n) {
  float sum = 0;
  for (int64_t c = 0; c < n; ++c) sum += ToFloat(v[c]) * ToFloat(v[c]);
  return std::sqrt(sum);
}

float Length(const float* v, int64_t n) {
  float sum = 0;
  for (int64_t c = 0; c < n; ++c) sum += v[c] * v[c];
  return std::sqrt(sum);
}

uint64_t FirstLanes(int64_t n) {
  return n >= kPageTokens ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
}

std::vector<float> Lanes(int64_t rows) {
  return std::vector<float>(static_cast<std::size_t>(rows * kPageTokens), 0.0f);
}

// Page by page, keys as they were before rotation; dead slots hold whatever packing left there, so their keys
// are cleared.
void VisitPages(const StreamView& kv, bool want_v, const KeyBlockVisitor& visit) {
  const int64_t d = kv.layout.head_size;
  std::vector<float> k = Lanes(d), v = Lanes(want_v ? d : 0), length = Lanes(1);
  for (int64_t p = 0; p < kv.n_pages; ++p) {
    UnpackKeys(kv.layout, kv.pages[p], k.data());
    if (kv.rotation) simd::RotateLanes(k.data(), d, nullptr, kv.rotation->inverse);
    for (int64_t t = 0; t < kPageTokens; ++t) {
      if (kv.live[p] >> t & 1) continue;
      for (int64_t c = 0; c < d; ++c) k[static_cast<std::size_t>(c * kPageTokens + t)] = 0.0f;
    }
    if (want_v) {
      UnpackValues(kv.layout, kv.pages[p], v.data());
      for (int64_t t = 0; t < kPageTokens; ++t)
        length[static_cast<std::size_t>(t)] = Length(v.data() + t * d, d);
    }
    visit({k.data(), want_v ? length.data() : nullptr, kv.live[p], p * kPageTokens});
  }
}

void VisitRaw(const StreamView& kv, bool want_v, const KeyBlockVisitor& visit) {
  const int64_t d = kv.layout.head_size;
  std::vector<float> k = Lanes(d), length = Lanes(1);
  for (int64_t begin = 0; begin < kv.n_raw; begin += kRawBlockTokens) {
    const int64_t n = std::min(kRawBlockTokens, kv.n_raw - begin);
    const uint16_t* block = kv.raw_k + begin * d;
    const int64_t stride = kv.RawStride(begin / kRawBlockTokens);
    for (int64_t c = 0; c < d; ++c) ToFloats(block + c * stride, n, k.data() + c * kPageTokens);
    if (want_v) {
      for (int64_t t = 0; t < n; ++t)
        length[static_cast<std::size_t>(t)] = Length(kv.raw_v + (begin + t) * d, d);
    }
    visit({k.data(), want_v ? length.data() : nullptr, FirstLanes(n), -1});
  }
}

}  // namespace

void ForEachKeyBlock(const DenseView& kv, bool want_v, const KeyBlockVisitor& visit) {
  const int64_t d = kv.head_size;
  std::vector<float> k = Lanes(d), length = Lanes(1);
  for (int64_t begin = 0; begin < kv.n_tokens; begin += kPageTokens) {
    const int64_t n = std::min(kPageTokens, kv.n_tokens - begin);
    ToFloats(kv.k + begin * d, d * kPageTokens, k.data());
    if (want_v) {
      for (int64_t t = 0; t < n; ++t) length[static_cast<std::size_t>(t)] = Length(kv.v + (begin + t) * d, d);
    }
    visit({k.data(), want_v ? length.data() : nullptr, FirstLanes(n), begin});
  }
}

void ForEachKeyBlock(const StreamView& kv, bool want_v, const KeyBlockVisitor& visit) {
  VisitPages(kv, want_v, visit);
  VisitRaw(kv, want_v, visit);
}

}  // namespace moend
