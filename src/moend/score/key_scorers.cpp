// Scorers that look at the keys, and at most at statistics of the queries.
#include <algorithm>
#include <cmath>
#include <limits>

#include "moend/score/lanes.h"
#include "moend/score/scorers.h"

namespace moend {
namespace {

// out[t] = sum over channels of weight[c] * k[c][t]^2; weights of 1 where `weight` is null.
void SquaredDot(const float* weight, const float* k, int64_t d, LaneFloats& out) {
  out.fill(0);
  for (int64_t c = 0; c < d; ++c) {
    const float w = weight ? weight[c] : 1.0f;
    for (std::size_t t = 0; t < kLanes; ++t) {
      const float x = k[c * kPageTokens + static_cast<int64_t>(t)];
      out[t] += w * x * x;
    }
  }
}

// Scorers of this file differ from prefill to cache only in where the keys come from.
class KeyScorer : public Scorer {
 public:
  void ScorePrefill(const PrefillScoreInput& in, std::span<float> scores) const final {
    Run(in.kv, in.kv.head_size, in.observed, scores);
  }
  void ScoreCached(const CachedScoreInput& in, std::span<float> scores) const final {
    Run(in.kv, in.kv.layout.head_size, in.observed, scores);
  }

 protected:
  using Blocks = std::function<void(const KeyBlockVisitor&)>;
  virtual bool WantsValues() const { return false; }
  virtual void Score(const Blocks& blocks, int64_t head_size, const QueryRows& observed,
                     std::span<float> scores) const = 0;

 private:
  template <class View>
  void Run(const View& kv, int64_t head_size, const QueryRows& observed, std::span<float> scores) const {
    std::fill(scores.begin(), scores.end(), 0.0f);
    const bool want_v = WantsValues();
    Score([&](const KeyBlockVisitor& visit) { ForEachKeyBlock(kv, want_v, visit); }, head_size, observed,
          scores);
    MakeFinite(scores);
  }
};

// KeyDiff (arXiv 2504.15364): keys that resemble the mean of all (normalized) keys are redundant. Minus the
// cosine similarity to it.
class KeyDiff : public KeyScorer {
 public:
  std::string_view name() const override { return "keydiff"; }
  ScorerNeeds needs() const override { return {}; }

 protected:
  void Score(const Blocks& blocks, int64_t d, const QueryRows&, std::span<float> scores) const override {
    std::vector<float> mean(static_cast<std::size_t>(d), 0.0f);  // times the number of keys: only its
                                                                 // direction matters
    blocks([&](const KeyBlock& block) {
      const LaneFloats inverse = InverseLengths(block, d);
      for (int64_t c = 0; c < d; ++c) {
        float sum = 0;
        for (std::size_t t = 0; t < kLanes; ++t)
          sum += inverse[t] * block.k[c * kPageTokens + static_cast<int64_t>(t)];
        mean[static_cast<std::size_t>(c)] += sum;
      }
    });
    float length = 0;
    for (const float x : mean) length += x * x;
    if (!(length > 0)) return;
    for (float& x : mean) x /= std::sqrt(length);
    blocks([&](const KeyBlock& block) {
      const LaneFloats inverse = InverseLengths(block, d);
      LaneFloats dot;
      Dot(mean.data(), block.k, d, dot);
      ForEachScored(block, scores, [&](std::size_t at, std::size_t t) { scores[at] = -dot[t] * inverse[t]; });
    });
  }

 private:
  // 0 for lanes without a token, and for keys of zeros.
  static LaneFloats InverseLengths(const KeyBlock& block, int64_t d) {
    LaneFloats inverse;
    SquaredDot(nullptr, block.k, d, inverse);
    for (std::size_t t = 0; t < kLanes; ++t)
      inverse[t] = (block.live >> t & 1) && inverse[t] > 0 ? 1.0f / std::sqrt(inverse[t]) : 0.0f;
    return inverse;
  }
};

// "A Simple and Effective L2 Norm-Based Strategy" (arXiv 2406.11430): short keys attract attention.
class KeyNorm : public KeyScorer {
 public:
  std::string_view name() const override { return "knorm"; }
  ScorerNeeds needs() const override { return {}; }

 protected:
  void Score(const Blocks& blocks, int64_t d, const QueryRows&, std::span<float> scores) const override {
    blocks([&](const KeyBlock& block) {
      LaneFloats square;
      SquaredDot(nullptr, block.k, d, square);
      ForEachScored(block, scores,
                    [&](std::size_t at, std::size_t t) { scores[at] = -std::sqrt(square[t]); });
    });
  }
};

// After "Expected Attention" (arXiv 2510.00636): were future queries normally distributed with mean m and
// covariance S, a key k would get exp(m.k + k.S.k / 2) before the softmax's division. The score is this, as a
// share of all tokens, times the length of the value, averaged over the query heads of the group.
//
// Two approximations. The paper takes the statistics of queries before RoPE and turns them to the positions
// to come; here they are those of the newest queries as they are, so the future is taken to be as far away as
// the observed window is wide. And only the diagonal of S is used: turning makes the channels of high
// frequency independent of each other, and those of low frequency hardly vary over the window.
class ExpectedAttention : public KeyScorer {
 public:
  std::string_view name() const override { return "expected"; }
  ScorerNeeds needs() const override { return {128, false}; }

 protected:
  bool WantsValues() const override { return true; }
  void Score(const Blocks& blocks, int64_t d, const QueryRows& observed,
             std::span<float> scores) const override {
    const std::size_t n = scores.size();
    const auto heads = static_cast<std::size_t>(std::max<int64_t>(observed.group, 1));
    const std::vector<Statistics> queries = Observe(observed, heads, d);
    constexpr float kNothing = -std::numeric_limits<float>::infinity();
    std::vector<float> logits(heads * n, kNothing), lengths(n, 0.0f);
    blocks([&](const KeyBlock& block) {
      for (std::size_t g = 0; g < heads; ++g) {
        LaneFloats mean, half_variance;
        Dot(queries[g].mean.data(), block.k, d, mean);
        SquaredDot(queries[g].half_variance.data(), block.k, d, half_variance);
        ForEachScored(block, scores, [&](std::size_t at, std::size_t t) {
          logits[g * n + at] = mean[t] + half_variance[t];
          lengths[at] = block.v_length[t];
        });
      }
    });
    for (std::size_t g = 0; g < heads; ++g) {
      const std::span<const float> row(logits.data() + g * n, n);
      float highest = kNothing;
      for (const float x : row) highest = std::max(highest, x);
      if (!std::isfinite(highest)) continue;
      double sum = 0;
      for (const float x : row) sum += std::exp(x - highest);
      for (std::size_t t = 0; t < n; ++t)
        scores[t] += std::exp(row[t] - highest) / static_cast<float>(sum) * lengths[t];
    }
  }

 private:
  struct Statistics {
    std::vector<float> mean, half_variance;  // [head_size]
  };

  // Of each query head of the group. Without queries both are 0, and the values' lengths decide.
  static std::vector<Statistics> Observe(const QueryRows& q, std::size_t heads, int64_t d) {
    const auto size = static_cast<std::size_t>(d);
    std::vector<Statistics> all(heads, {std::vector<float>(size, 0.0f), std::vector<float>(size, 0.0f)});
    const int64_t tokens = q.group > 0 ? q.rows / q.group : 0;
    if (tokens == 0) return all;
    for (std::size_t g = 0; g < heads; ++g) {
      for (std::size_t c = 0; c < size; ++c) {
        double sum = 0, squares = 0;
        for (int64_t t = 0; t < tokens; ++t) {
          const double x = q.q[(t * q.group + static_cast<int64_t>(g)) * d + static_cast<int64_t>(c)];
          sum += x;
          squares += x * x;
        }
        const double mean = sum / static_cast<double>(tokens);
        all[g].mean[c] = static_cast<float>(mean);
        all[g].half_variance[c] =
            static_cast<float>(0.5 * std::max(0.0, squares / static_cast<double>(tokens) - mean * mean));
      }
    }
    return all;
  }
};

}  // namespace

std::unique_ptr<Scorer> MakeKeyDiff() {
  return std::make_unique<KeyDiff>();
}

std::unique_ptr<Scorer> MakeKeyNorm() {
  return std::make_unique<KeyNorm>();
}

std::unique_ptr<Scorer> MakeExpectedAttention() {
  return std::make_unique<ExpectedAttention>();
}

}  // namespace moend
