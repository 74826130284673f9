// Scorers that ask which tokens the queries attended to.
#include <algorithm>
#include <bit>

#include "moend/attention/attention.h"
#include "moend/score/scorers.h"

namespace moend {
namespace {

// The last `tokens` tokens of the observed queries, fewer if there are fewer.
QueryRows Newest(const QueryRows& q, int64_t tokens, int64_t head_size) {
  const int64_t rows = std::min(q.rows / q.group, std::max<int64_t>(tokens, 0)) * q.group;
  QueryRows newest = q;
  newest.q = q.q + (q.rows - rows) * head_size;
  newest.rows = rows;
  return newest;
}

class OwnedState {
 public:
  OwnedState(const QueryRows& q, int64_t head_size)
      : values_(static_cast<std::size_t>(q.rows * (head_size + 2))) {
    state_ = {values_.data() + 2 * q.rows, values_.data(), values_.data() + q.rows};
    InitState(state_, q, head_size);
  }
  SoftmaxState get() const { return state_; }

 private:
  std::vector<float> values_;
  SoftmaxState state_;
};

// sums[t] = what tokens [0, end) of kv received from the newest queries, each query's share being 1.
// Returns the number of query tokens.
int64_t SumPrefill(const PrefillScoreInput& in, int64_t tokens, std::span<float> sums) {
  const int64_t n = in.kv.n_tokens, d = in.kv.head_size;
  const QueryRows q = Newest(in.observed, std::min(tokens, n), d);
  std::fill(sums.begin(), sums.end(), 0.0f);
  if (q.rows == 0) return 0;
  const int64_t first = n - q.rows / q.group;
  const OwnedState state(q, d);
  simd::AttendCausal(in.kv, first, q, state.get(), in.workspace);
  simd::ColumnSumsCausal(in.kv, first, 0, n, q, state.get().max, state.get().sum, sums.data(), in.workspace);
  return q.rows / q.group;
}

// The same over a cache. Tokens newer than a query are raw; that the older of the observed queries see them
// as well changes all paged tokens' shares alike.
void SumCached(const CachedScoreInput& in, int64_t tokens, std::span<float> sums) {
  const int64_t d = in.kv.layout.head_size;
  const QueryRows q = Newest(in.observed, tokens, d);
  std::fill(sums.begin(), sums.end(), 0.0f);
  if (q.rows == 0) return;
  const OwnedState state(q, d);
  simd::AttendStream(in.kv, 0, in.kv.n_pages, true, q, state.get(), in.workspace);
  simd::ColumnSumsStream(in.kv, q, state.get().max, state.get().sum, sums.data(), in.workspace);
}

// What the engine gathered; zeros where it gathered nothing.
void Copy(const float* gathered, std::span<float> scores) {
  if (gathered) {
    std::copy_n(gathered, scores.size(), scores.begin());
  } else {
    std::fill(scores.begin(), scores.end(), 0.0f);
  }
  MakeFinite(scores);
}

// SnapKV (arXiv 2404.14469): the attention of the newest queries, the maximum over neighbours so that whole
// phrases stay. With grouped queries, the sum over the group's query heads.
class SnapKv : public Scorer {
 public:
  std::string_view name() const override { return "snapkv"; }
  ScorerNeeds needs() const override { return {kWindow, false}; }

  void ScorePrefill(const PrefillScoreInput& in, std::span<float> scores) const override {
    std::vector<float> sums(scores.size());
    const auto window = static_cast<std::size_t>(SumPrefill(in, kWindow, sums));
    MakeFinite(sums);
    // The window itself is seen by its own tail only; as in the paper it stays, above any possible sum.
    const std::size_t prefix = scores.size() - window;
    for (std::size_t t = 0; t < prefix; ++t) {
      const std::size_t begin = t < kReach ? 0 : t - kReach, end = std::min(prefix, t + kReach + 1);
      scores[t] = *std::max_element(sums.data() + begin, sums.data() + end);
    }
    std::fill(scores.begin() + static_cast<std::ptrdiff_t>(prefix), scores.end(),
              static_cast<float>(in.observed.rows + 1));
  }

  void ScoreCached(const CachedScoreInput& in, std::span<float> scores) const override {
    std::vector<float> sums(scores.size());
    SumCached(in, kWindow, sums);
    MakeFinite(sums);
    std::copy(sums.begin(), sums.end(), scores.begin());
    // Neighbours are those in the text: evicted tokens leave gaps over which nothing is shared.
    std::vector<std::size_t> slots;
    for (int64_t p = 0; p < in.kv.n_pages; ++p) {
      for (uint64_t live = in.kv.live[p]; live != 0; live &= live - 1)
        slots.push_back(static_cast<std::size_t>(p * kPageTokens + std::countr_zero(live)));
    }
    const std::size_t n = std::min(slots.size(), in.positions.size());
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t j = i + 1; j < n && in.positions[j] - in.positions[i] <= kReach; ++j) {
        scores[slots[i]] = std::max(scores[slots[i]], sums[slots[j]]);
        scores[slots[j]] = std::max(scores[slots[j]], sums[slots[i]]);
      }
    }
  }

 private:
  static constexpr int64_t kWindow = 32;    // observed query tokens
  static constexpr std::size_t kReach = 3;  // neighbours on each side: pooling over 7
};

// TOVA (arXiv 2401.06104): the attention of the newest query alone, here per KV head (the sum over its query
// heads) instead of the mean over a layer's heads.
class Tova : public Scorer {
 public:
  std::string_view name() const override { return "tova"; }
  ScorerNeeds needs() const override { return {1, false}; }
  void ScorePrefill(const PrefillScoreInput& in, std::span<float> scores) const override {
    SumPrefill(in, 1, scores);
    MakeFinite(scores);
  }
  void ScoreCached(const CachedScoreInput& in, std::span<float> scores) const override {
    SumCached(in, 1, scores);
    MakeFinite(scores);
  }
};

// H2O (arXiv 2306.14048): the attention received from all queries so far, as a plain sum like in the paper.
// Older tokens were seen by more queries and are favoured; the paper balances this by giving half of the
// budget to the newest tokens, which is what Protected::window is for.
class H2o : public Scorer {
 public:
  std::string_view name() const override { return "h2o"; }
  ScorerNeeds needs() const override { return {0, true}; }
  void ScorePrefill(const PrefillScoreInput& in, std::span<float> scores) const override {
    Copy(in.accumulated, scores);
  }
  void ScoreCached(const CachedScoreInput& in, std::span<float> scores) const override {
    Copy(in.accumulated, scores);
  }
};

// After KVzip (arXiv 2505.23416): what the model needs to repeat the prompt, it will need for any
// question.
class Reconstruct : public Scorer {
 public:
  std::string_view name() const override { return "reconstruct"; }
  ScorerNeeds needs() const override { return {.repetition = true}; }
  void ScorePrefill(const PrefillScoreInput& in, std::span<float> scores) const override {
    Copy(in.needed, scores);
  }
  void ScoreCached(const CachedScoreInput& in, std::span<float> scores) const override {
    later_->ScoreCached(in, scores);
    // What was kept of the prompt was chosen with more knowledge: what came later goes first.
    std::size_t i = 0;
    for (int64_t p = 0; p < in.kv.n_pages; ++p) {
      for (uint64_t live = in.kv.live[p]; live != 0 && i < in.positions.size(); live &= live - 1, ++i)
        if (in.positions[i] < in.prompt_tokens)
          scores[static_cast<std::size_t>(p * kPageTokens + std::countr_zero(live))] += kAhead;
    }
  }

 private:
  static constexpr float kAhead = 4;  // more than keydiff's scores, -1 to 1, can be apart
  const std::unique_ptr<Scorer> later_ = MakeKeyDiff();
};

}  // namespace

std::unique_ptr<Scorer> MakeReconstruct() {
  return std::make_unique<Reconstruct>();
}

std::unique_ptr<Scorer> MakeSnapKv() {
  return std::make_unique<SnapKv>();
}

std::unique_ptr<Scorer> MakeTova() {
  return std::make_unique<Tova>();
}

std::unique_ptr<Scorer> MakeH2o() {
  return std::make_unique<H2o>();
}

}  // namespace moend
