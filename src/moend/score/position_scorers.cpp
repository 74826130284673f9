// Scorers that look at nothing but the position.
#include <bit>

#include "moend/score/scorers.h"

namespace moend {
namespace {

// Writes score(position) for every live slot of the pages.
template <class F>
void ScoreByPosition(const CachedScoreInput& in, std::span<float> scores, F score) {
  std::size_t next = 0;
  for (int64_t p = 0; p < in.kv.n_pages; ++p) {
    for (uint64_t live = in.kv.live[p]; live != 0; live &= live - 1) {
      if (next == in.positions.size()) return;
      scores[static_cast<std::size_t>(p * kPageTokens + std::countr_zero(live))] =
          score(in.positions[next++]);
    }
  }
}

// StreamingLLM (arXiv 2309.17453): sinks and the newest tokens. The sinks are protected anyway.
class Streaming : public Scorer {
 public:
  std::string_view name() const override { return "streaming"; }
  ScorerNeeds needs() const override { return {}; }
  void ScorePrefill(const PrefillScoreInput&, std::span<float> scores) const override {
    for (std::size_t t = 0; t < scores.size(); ++t) scores[t] = static_cast<float>(t);
  }
  void ScoreCached(const CachedScoreInput& in, std::span<float> scores) const override {
    ScoreByPosition(in, scores, [](uint32_t position) { return static_cast<float>(position); });
  }
};

// A fixed hash of the position (the finalizer of SplitMix64): the same tokens in every run, layer and head.
// For tests, and for the paper's calibration by random eviction.
float Hash(uint64_t position) {
  uint64_t x = (position + 1) * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return static_cast<float>((x ^ (x >> 31)) >> 40) * 0x1p-24f;
}

class Random : public Scorer {
 public:
  std::string_view name() const override { return "random"; }
  ScorerNeeds needs() const override { return {}; }
  void ScorePrefill(const PrefillScoreInput&, std::span<float> scores) const override {
    for (std::size_t t = 0; t < scores.size(); ++t) scores[t] = Hash(t);
  }
  void ScoreCached(const CachedScoreInput& in, std::span<float> scores) const override {
    ScoreByPosition(in, scores, [](uint32_t position) { return Hash(position); });
  }
};

}  // namespace

std::unique_ptr<Scorer> MakeStreaming() {
  return std::make_unique<Streaming>();
}

std::unique_ptr<Scorer> MakeRandom() {
  return std::make_unique<Random>();
}

}  // namespace moend
