#include "moend/engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace moend {
namespace {

// A number that is none must not win, nor break the strict order that sorting needs.
float Usable(float logit) {
  return std::isnan(logit) ? -std::numeric_limits<float>::infinity() : logit;
}

// Uniform in [0, 1) from the top 53 bits: the same sequence with every standard library.
double Uniform(std::mt19937_64& random) {
  return static_cast<double>(random() >> 11) * 0x1p-53;
}

}  // namespace

Sampler::Sampler(const SamplerOptions& options) : options_(options), random_(options.seed) {}

int32_t Sampler::Sample(std::span<const float> logits) {
  const auto n = static_cast<int64_t>(logits.size());
  if (!(options_.temperature > 0) || options_.top_k == 1) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; ++i)
      if (Usable(logits[static_cast<std::size_t>(i)]) > Usable(logits[static_cast<std::size_t>(best)]))
        best = i;
    return static_cast<int32_t>(best);
  }

  candidates_.resize(logits.size());
  for (int64_t i = 0; i < n; ++i)
    candidates_[static_cast<std::size_t>(i)] = {static_cast<int32_t>(i),
                                                Usable(logits[static_cast<std::size_t>(i)])};
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
  };
  const int64_t k = options_.top_k > 0 ? std::min(options_.top_k, n) : n;
  std::partial_sort(candidates_.begin(), candidates_.begin() + k, candidates_.end(), better);
  candidates_.resize(static_cast<std::size_t>(k));
  if (candidates_.empty() || !std::isfinite(candidates_[0].logit))
    return candidates_.empty() ? 0 : candidates_[0].token;
  if (options_.typical_p < 1) KeepTypical();

  const float top = candidates_[0].logit;
  if (options_.top_p < 1) {
    double total = 0;
    for (const Candidate& c : candidates_) total += std::exp(double{c.logit} - top);
    const double wanted = total * std::max(options_.top_p, 0.0f);
    double sum = 0;
    std::size_t kept = 0;
    while (kept < candidates_.size() && (kept == 0 || sum < wanted))
      sum += std::exp(double{candidates_[kept++].logit} - top);
    candidates_.resize(kept);
  }
  if (options_.min_p > 0) {
    const double lowest = double{top} + std::log(std::min(double{options_.min_p}, 1.0));
    while (candidates_.size() > 1 && candidates_.back().logit < lowest) candidates_.pop_back();
  }

  const auto weight = [&](const Candidate& c) {
    return std::exp((double{c.logit} - top) / double{options_.temperature});
  };
  double total = 0;
  for (const Candidate& c : candidates_) total += weight(c);
  double left = Uniform(random_) * total;
  for (const Candidate& c : candidates_) {
    left -= weight(c);
    if (left < 0) return c.token;
  }
  return candidates_[0].token;  // rounding ate the last sliver
}

// Locally typical sampling (Meister et al., 2022): the tokens whose surprise is nearest to the expected one,
// until their probabilities exceed typical_p.
void Sampler::KeepTypical() {
  struct Ranked {
    double distance, p;
    Candidate candidate;
  };
  std::vector<Ranked> ranked;
  ranked.reserve(candidates_.size());
  const double top = candidates_[0].logit;
  double total = 0, entropy = 0;
  for (const Candidate& c : candidates_) total += std::exp(double{c.logit} - top);
  for (const Candidate& c : candidates_) {
    const double p = std::exp(double{c.logit} - top) / total;
    if (p > 0) entropy -= p * std::log(p);
    ranked.push_back({0, p, c});
  }
  for (Ranked& r : ranked)
    r.distance = r.p > 0 ? std::abs(-std::log(r.p) - entropy) : std::numeric_limits<double>::infinity();
  std::ranges::stable_sort(ranked, {}, &Ranked::distance);
  double sum = 0;
  std::size_t kept = 0;
  while (kept < ranked.size() && (kept == 0 || sum <= double{options_.typical_p})) sum += ranked[kept++].p;
  candidates_.clear();
  for (std::size_t i = 0; i < kept; ++i) candidates_.push_back(ranked[i].candidate);
  std::ranges::sort(candidates_, [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
  });
}

// To look at one token takes microseconds, at all of a large vocabulary a tenth of a second; and mostly the
// model keeps to the grammar by itself.
Expected<std::optional<int32_t>> SampleAllowed(Sampler& sampler, Grammar& grammar,
                                               std::span<const float> logits) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  const int32_t token = sampler.Sample(logits);
  MOEND_ASSIGN(const auto one, grammar.Allows({&token, 1}));
  if (one[0] && logits[static_cast<std::size_t>(token)] > kNever) return token;
  MOEND_ASSIGN(const auto all, grammar.AllowsOfAll());
  std::vector<float> allowed(logits.begin(), logits.end());
  for (std::size_t i = 0; i < allowed.size(); ++i)
    if (!all[i]) allowed[i] = kNever;
  if (std::ranges::none_of(allowed, [](float x) { return x > kNever; })) return std::optional<int32_t>();
  return sampler.Sample(allowed);
}

}  // namespace moend
