// TriAttention (arXiv 2604.04921): how much queries to come will look at a key, from what the model's queries
// are like before RoPE.
//
// As complex numbers, a pair f of channels of a query at position p is q_f exp(i w_f p), and the key in the
// cache has been turned likewise. With the mean E[q_f] in place of q_f the logit is the trigonometric series
//     sum over f of |E[q_f]| |k_f| cos(w_f (p - s) + phase of E[q_f] conj(k_f))
// in the distance p - s. Its mean over the distances to come is
//     sum over f of Re(a_f conj(turned k_f)),   a_f = E[q_f] * mean over p of exp(i w_f p),
// linear in the key as it lies in the cache: neither the key nor its position has to be known unturned.
// What queries scatter about their mean adds a term without direction,
//     sum over f of (E|q_f| - |E[q_f]|) |k_f|,   that is (1 - concentration) E|q_f| |k_f|.
// Scales differ from query head to query head: each one's scores are standardized over the keys, and a key
// gets the highest that a head of its group gives it.
#include <algorithm>
#include <cmath>
#include <complex>
#include <limits>

#include "moend/score/lanes.h"
#include "moend/score/scorers.h"

namespace moend {
namespace {

// Queries to come are expected 1, 2, 4, ... tokens after the newest token.
constexpr int kOffsets = 17;

struct HeadWeights {
  std::vector<float> direction;  // [head_size]
  std::vector<float> scatter;    // [pair]
};

// exp(i w p), its mean over the positions to come.
std::complex<double> MeanTurn(double rate, int64_t tokens_seen) {
  std::complex<double> sum = 0;
  for (int o = 0; o < kOffsets; ++o)
    sum += std::polar(1.0, rate * static_cast<double>(tokens_seen - 1 + (int64_t{1} << o)));
  return sum / static_cast<double>(kOffsets);
}

std::vector<HeadWeights> Weigh(const HeadQueries& queries, int64_t tokens_seen) {
  const auto n_pairs = queries.turns.size();
  std::vector<HeadWeights> all(static_cast<std::size_t>(queries.group),
                               {std::vector<float>(2 * n_pairs), std::vector<float>(n_pairs)});
  for (std::size_t f = 0; f < n_pairs; ++f) {
    const RopePair& turn = queries.turns[f];
    const std::complex<double> turned = MeanTurn(turn.rate, tokens_seen);
    for (std::size_t g = 0; g < all.size(); ++g) {
      const QueryPair& q = queries.pairs[g * n_pairs + f];
      const std::complex<double> mean(q.re, q.im), a = mean * turned;
      all[g].direction[static_cast<std::size_t>(turn.first)] = static_cast<float>(a.real());
      all[g].direction[static_cast<std::size_t>(turn.second)] = static_cast<float>(a.imag());
      all[g].scatter[f] = static_cast<float>(std::max(0.0, q.length - std::abs(mean)));
    }
  }
  return all;
}

// Subtracts the mean and divides by the standard deviation, over what is finite.
void Standardize(std::span<float> x) {
  double sum = 0, squares = 0, n = 0;
  for (const float v : x) {
    if (!std::isfinite(v)) continue;
    sum += v;
    squares += double{v} * v;
    ++n;
  }
  if (n == 0) return;
  const double mean = sum / n, variance = squares / n - mean * mean;
  const double scale = variance > 0 ? 1 / std::sqrt(variance) : 0;
  for (float& v : x)
    if (std::isfinite(v)) v = static_cast<float>((v - mean) * scale);
}

class Trigonometric : public Scorer {
 public:
  std::string_view name() const override { return "trig"; }
  ScorerNeeds needs() const override { return {.query_stats = true}; }
  void ScorePrefill(const PrefillScoreInput& in, std::span<float> scores) const override {
    Score(in.kv, in.kv.head_size, in.kv.n_tokens, in.queries, scores);
  }
  void ScoreCached(const CachedScoreInput& in, std::span<float> scores) const override {
    Score(in.kv, in.kv.layout.head_size, in.tokens_seen, in.queries, scores);
  }

 private:
  template <class View>
  static void Score(const View& kv, int64_t d, int64_t tokens_seen, const HeadQueries* queries,
                    std::span<float> scores) {
    std::fill(scores.begin(), scores.end(), 0.0f);
    if (!queries || std::ssize(queries->turns) * 2 != d)
      return;  // the engine refuses before it comes to this
    const std::vector<HeadWeights> heads = Weigh(*queries, tokens_seen);
    constexpr float kNothing = -std::numeric_limits<float>::infinity();
    const std::size_t n = scores.size();
    std::vector<float> rows(heads.size() * n, kNothing);         // [query head][token]
    std::vector<float> lengths(queries->turns.size() * kLanes);  // [pair][lane]
    ForEachKeyBlock(kv, false, [&](const KeyBlock& block) {
      if (block.first < 0) return;
      for (std::size_t f = 0; f < queries->turns.size(); ++f) {
        const float* first = block.k + queries->turns[f].first * kPageTokens;
        const float* second = block.k + queries->turns[f].second * kPageTokens;
        for (std::size_t t = 0; t < kLanes; ++t)
          lengths[f * kLanes + t] = std::sqrt(first[t] * first[t] + second[t] * second[t]);
      }
      for (std::size_t g = 0; g < heads.size(); ++g) {
        LaneFloats series, scatter;
        Dot(heads[g].direction.data(), block.k, d, series);
        Dot(heads[g].scatter.data(), lengths.data(), d / 2, scatter);
        ForEachScored(block, scores,
                      [&](std::size_t at, std::size_t t) { rows[g * n + at] = series[t] + scatter[t]; });
      }
    });
    std::fill(scores.begin(), scores.end(), kNothing);
    for (std::size_t g = 0; g < heads.size(); ++g) {
      const std::span<float> row(rows.data() + g * n, n);
      Standardize(row);
      for (std::size_t t = 0; t < n; ++t)
        if (std::isfinite(row[t])) scores[t] = std::max(scores[t], row[t]);
    }
    MakeFinite(scores);
  }
};

}  // namespace

std::unique_ptr<Scorer> MakeTrigonometric() {
  return std::make_unique<Trigonometric>();
}

}  // namespace moend
