#include "moend/score/scorer.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>

#include "moend/plan/plan.h"
#include "moend/score/scorers.h"

namespace moend {
namespace {

struct Entry {
  std::string_view name;
  std::unique_ptr<Scorer> (*make)();
};

constexpr Entry kScorers[] = {
    {"reconstruct", MakeReconstruct},
    {"learned", MakeLearned},
    {"streaming", MakeStreaming},
    {"snapkv", MakeSnapKv},
    {"h2o", MakeH2o},
    {"tova", MakeTova},
    {"keydiff", MakeKeyDiff},
    {"expected", MakeExpectedAttention},
    {"trig", MakeTrigonometric},
    {"knorm", MakeKeyNorm},
    {"random", MakeRandom},
};

class ByLayer final : public Scorer {
 public:
  ByLayer(std::string_view name, std::vector<std::unique_ptr<Scorer>> layers)
      : name_(name), layers_(std::move(layers)) {}
  std::string_view name() const override { return name_; }
  ScorerNeeds needs() const override {
    ScorerNeeds all;
    for (const auto& scorer : layers_) all = Union(all, scorer->needs());
    return all;
  }
  void ScorePrefill(const PrefillScoreInput& in, std::span<float> scores) const override {
    layers_.front()->ScorePrefill(in, scores);
  }
  void ScoreCached(const CachedScoreInput& in, std::span<float> scores) const override {
    layers_.front()->ScoreCached(in, scores);
  }
  const Scorer& of_layer(int64_t layer) const override {
    return *layers_[static_cast<std::size_t>(std::clamp<int64_t>(layer, 0, std::ssize(layers_) - 1))];
  }
  int64_t layers() const override { return std::ssize(layers_); }

 private:
  std::string name_;
  std::vector<std::unique_ptr<Scorer>> layers_;
};

// Orders like (score, position), with NaN below everything; every key is unique.
uint64_t SortKey(float score, std::size_t position) {
  const auto bits = std::bit_cast<uint32_t>(score + 0.0f);  // -0 becomes +0
  const uint32_t ordered = std::isnan(score) ? 0 : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 32 | static_cast<uint32_t>(position);
}

}  // namespace

ScorerNeeds Union(const ScorerNeeds& a, const ScorerNeeds& b) {
  return {std::max(a.observed_queries, b.observed_queries),
          a.accumulated || b.accumulated,
          a.repetition || b.repetition,
          a.learned || b.learned,
          std::max(a.reference_tokens, b.reference_tokens),
          a.query_stats || b.query_stats};
}

Expected<std::unique_ptr<Scorer>> MakeScorer(std::string_view name) {
  if (const auto names = ScorersOf(name); names.size() > 1) {
    std::vector<std::unique_ptr<Scorer>> layers;
    for (const std::string_view one : names) {
      MOEND_ASSIGN(layers.emplace_back(), MakeScorer(one));
    }
    return std::make_unique<ByLayer>(name, std::move(layers));
  }
  for (const Entry& entry : kScorers) {
    if (entry.name == name) return entry.make();
  }
  return Fail(ErrorCode::kNotFound, "there is no scorer named \"{}\"; possible: {}", name,
              fmt::join(ScorerNames(), ", "));
}

std::vector<std::string> ScorerNames() {
  std::vector<std::string> names;
  for (const Entry& entry : kScorers) names.emplace_back(entry.name);
  return names;
}

std::string ShortScorerName(std::string_view name) {
  return std::string(ScorersOf(name).size() == 1 ? name : "mixed");
}

void MakeFinite(std::span<float> scores) {
  for (float& s : scores) {
    if (!std::isfinite(s)) s = std::numeric_limits<float>::lowest();
  }
}

std::vector<uint32_t> SelectKept(std::span<const float> scores, const Protected& guard, int64_t count) {
  const auto n = static_cast<int64_t>(scores.size());
  const int64_t sinks = std::clamp<int64_t>(guard.sinks, 0, n);
  const int64_t newest = std::max(sinks, n - std::max<int64_t>(guard.window, 0));  // the window starts here
  const int64_t wanted = std::clamp<int64_t>(count - sinks - (n - newest), 0, newest - sinks);

  // The smallest key that is kept of those between the sinks and the window.
  uint64_t limit = std::numeric_limits<uint64_t>::max();
  std::vector<uint64_t> keys;
  keys.reserve(static_cast<std::size_t>(newest - sinks));
  for (auto t = static_cast<std::size_t>(sinks); t < static_cast<std::size_t>(newest); ++t)
    keys.push_back(SortKey(scores[t], t));
  if (wanted > 0) {
    std::vector<uint64_t> order = keys;
    const auto last = order.begin() + static_cast<std::ptrdiff_t>(wanted - 1);
    std::nth_element(order.begin(), last, order.end(), std::greater<>());
    limit = *last;
  }
  std::vector<uint32_t> kept;
  kept.reserve(static_cast<std::size_t>(n - (newest - sinks) + wanted));
  for (int64_t t = 0; t < n; ++t) {
    const bool between = t >= sinks && t < newest;
    if (!between || keys[static_cast<std::size_t>(t - sinks)] >= limit)
      kept.push_back(static_cast<uint32_t>(t));
  }
  return kept;
}

}  // namespace moend
