// What tests of calibration share: texts, and the distance between two rows of logits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "tests/support/test_model.h"

namespace moend::test {

inline std::vector<std::vector<int32_t>> Chunks(int64_t count) {
  std::vector<std::vector<int32_t>> chunks;
  for (int64_t i = 0; i < count; ++i) chunks.push_back(RandomTokens(600, static_cast<uint64_t>(100 + i)));
  return chunks;
}

inline double Kl(std::span<const float> p, std::span<const float> q) {
  double pm = -INFINITY, qm = -INFINITY, ps = 0, qs = 0, kl = 0;
  for (std::size_t i = 0; i < p.size(); ++i) pm = std::max(pm, double{p[i]}), qm = std::max(qm, double{q[i]});
  for (std::size_t i = 0; i < p.size(); ++i) ps += std::exp(p[i] - pm), qs += std::exp(q[i] - qm);
  for (std::size_t i = 0; i < p.size(); ++i)
    kl += std::exp(p[i] - pm) / ps * ((p[i] - pm - std::log(ps)) - (q[i] - qm - std::log(qs)));
  return kl;
}

}  // namespace moend::test
