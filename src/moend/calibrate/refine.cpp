// Local search around a plan, on measured text.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <optional>

#include "moend/calibrate/trials.h"
#include "moend/solve/relaxation.h"
#include "moend/solve/sum_up.h"

namespace moend {
namespace {

constexpr std::ptrdiff_t kReach = 2;       // neighbours of a row's expert on each side
constexpr std::size_t kMostExchanges = 6;  // that are measured before a round gives up
constexpr double kNoise = 1;               // standard errors that an improvement must exceed

double Mean(std::span<const double> x) {
  return x.empty() ? 0 : std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
}

// Whether `other` is below `base`, token by token, by more than chance.
bool IsLower(std::span<const double> other, std::span<const double> base) {
  std::vector<double> d(base.size());
  for (std::size_t i = 0; i < d.size(); ++i) d[i] = other[i] - base[i];
  const double mean = Mean(d), n = static_cast<double>(d.size());
  double squares = 0;
  for (const double x : d) squares += (x - mean) * (x - mean);
  return n > 1 && mean < 0 && -mean > kNoise * std::sqrt(squares / (n - 1) / n);
}

class Search {
 public:
  Search(Trials& trials, const Profile& profile, const RefineOptions& options, int64_t budget,
         const Progress& progress)
      : trials_(trials), profile_(profile), options_(options), budget_(budget), progress_(progress) {}

  Expected<void> Prepare(const Plan& plan) {
    const bool by_head = options_.rows == Rows::kHeads;
    const Metric metric = plan.metric == "l2" ? Metric::kL2 : Metric::kKl;
    MOEND_ASSIGN(const auto losses, CleanLosses(profile_, metric, options_.rows));
    const std::vector<Expert>& experts = by_head ? plan.heads : plan.layers;
    if (experts.size() != losses.size())
      return Fail(ErrorCode::kMismatch, "the plan has {} rows, the profile {}", experts.size(),
                  losses.size());
    const KvShape shape{by_head ? 1 : profile_.model.shape.n_kv_heads, profile_.model.shape.head_size};
    for (const Expert& e : profile_.experts) {
      MOEND_ASSIGN(const int64_t b,
                   LayerBytes(shape, e, profile_.guard, plan.context_length, options_.score_bytes));
      bytes_.push_back(b);
    }
    fixed_.assign(losses.size(), 0);
    for (std::size_t row = 0; row < losses.size(); ++row) {
      if (const int64_t window = WindowOfRow(profile_.model, options_.rows, row); window > 0) {
        // One rung, which no expert stands for.
        MOEND_ASSIGN(fixed_[row], FixedBytes(profile_.model, window, shape.n_kv_heads, plan.context_length));
        ladder_.push_back({0});
        at_.push_back(0);
        continue;
      }
      const auto found = std::find(profile_.experts.begin(), profile_.experts.end(), experts[row]);
      if (found == profile_.experts.end())
        return Fail(ErrorCode::kInvalidArgument,
                    "row {} of the plan has an expert that the profile did not measure; only plans of its "
                    "experts can be refined",
                    row);
      const auto own = static_cast<std::size_t>(found - profile_.experts.begin());
      std::vector<Choice> choices;
      std::vector<std::size_t> allowed;
      for (std::size_t e = 0; e < profile_.experts.size(); ++e) {
        if (profile_.experts[e].keep < options_.min_keep) continue;
        choices.push_back({bytes_[e], losses[row][e]});
        allowed.push_back(e);
      }
      // What the solver would choose from, in order of bytes, and the plan's own.
      std::vector<std::size_t>& options = ladder_.emplace_back();
      for (const Item& item : Undominated(choices))
        options.push_back(allowed[static_cast<std::size_t>(item.choice)]);
      if (std::find(options.begin(), options.end(), own) == options.end()) {
        const auto at = std::find_if(options.begin(), options.end(),
                                     [&](std::size_t e) { return bytes_[e] >= bytes_[own]; });
        options.insert(at, own);
      }
      at_.push_back(
          static_cast<std::size_t>(std::find(options.begin(), options.end(), own) - options.begin()));
    }
    return {};
  }

  Expected<Refinement> Run() {
    Refinement result;
    MOEND_ASSIGN(current_, Measure(at_));
    result.before = Mean(current_);
    while (!result.finished && !late_) {
      MOEND_ASSIGN(const bool better, Round());
      if (better) ++result.accepted;
      result.finished = !better && !late_;
    }
    result.after = Mean(current_);
    result.measured = measured_;
    return result;
  }

  std::vector<Expert> experts() const { return ExpertsAt(at_); }

 private:
  using Rungs = std::vector<std::size_t>;  // of each row, an index into its ladder

  std::vector<Expert> ExpertsAt(const Rungs& at) const {
    std::vector<Expert> experts;
    for (std::size_t row = 0; row < at.size(); ++row)
      experts.push_back(fixed_[row] > 0 ? Expert{} : profile_.experts[ladder_[row][at[row]]]);
    return experts;
  }

  int64_t BytesAt(const Rungs& at) const {
    int64_t total = 0;
    for (std::size_t row = 0; row < at.size(); ++row) total += RungBytes(row, at[row]);
    return total;
  }

  int64_t RungBytes(std::size_t row, std::size_t rung) const {
    return fixed_[row] > 0 ? fixed_[row] : bytes_[ladder_[row][rung]];
  }

  // Empty when the time is up.
  Expected<std::vector<double>> Measure(const Rungs& at) {
    const double spent = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    late_ = measured_ > 0 && spent > options_.seconds;
    if (late_) return std::vector<double>();
    if (progress_ && !progress_(std::min(1.0, spent / std::max(options_.seconds, 1e-9))))
      return Fail(ErrorCode::kCancelled, "the refinement was stopped");
    ++measured_;
    return trials_.Kl(ExpertsAt(at));
  }

  // Moves there if that is measurably better.
  Expected<bool> Try(const Rungs& at) {
    MOEND_ASSIGN(auto kl, Measure(at));
    if (kl.empty() || !IsLower(kl, current_)) return false;
    at_ = at;
    current_ = std::move(kl);
    return true;
  }

  Expected<bool> Round() {
    // delta[row][i]: what the mean KL changes by when the row alone moves to rung first[row] + i.
    std::vector<std::vector<double>> delta(at_.size());
    Rungs first(at_.size());
    const double base = Mean(current_);
    for (std::size_t row = 0; row < at_.size(); ++row) {
      const auto own = static_cast<std::ptrdiff_t>(at_[row]);
      const auto last = std::min(std::ssize(ladder_[row]) - 1, own + kReach);
      first[row] = static_cast<std::size_t>(std::max<std::ptrdiff_t>(0, own - kReach));
      for (auto rung = static_cast<std::ptrdiff_t>(first[row]); rung <= last; ++rung) {
        if (rung == own) {
          delta[row].push_back(0);
          continue;
        }
        Rungs moved = at_;
        moved[row] = static_cast<std::size_t>(rung);
        MOEND_ASSIGN(const auto kl, Measure(moved));
        if (kl.empty()) return false;
        delta[row].push_back(Mean(kl) - base);
      }
    }
    MOEND_ASSIGN(const Rungs solved, Solved(delta, first));
    if (solved != at_) {
      MOEND_ASSIGN(const bool better, Try(solved));
      if (better || late_) return better;
    }
    for (const Rungs& exchange : Exchanges(delta, first)) {
      MOEND_ASSIGN(const bool better, Try(exchange));
      if (better || late_) return better;
    }
    return false;
  }

  // The best within reach if the differences added up.
  Expected<Rungs> Solved(const std::vector<std::vector<double>>& delta, const Rungs& first) const {
    std::vector<std::vector<Choice>> items;
    for (std::size_t row = 0; row < delta.size(); ++row) {
      const double least = *std::min_element(delta[row].begin(), delta[row].end());
      auto& choices = items.emplace_back();
      for (std::size_t i = 0; i < delta[row].size(); ++i)
        choices.push_back({RungBytes(row, first[row] + i), delta[row][i] - least});
    }
    MOEND_ASSIGN(const std::vector<int> chosen, SolveKnapsack(items, budget_, Solver::kExact, nullptr));
    Rungs at(chosen.size());
    for (std::size_t row = 0; row < at.size(); ++row)
      at[row] = first[row] + static_cast<std::size_t>(chosen[row]);
    return at;
  }

  // Moves of one row or of two that fit the budget and promise a gain, the most promising ones first.
  std::vector<Rungs> Exchanges(const std::vector<std::vector<double>>& delta, const Rungs& first) const {
    std::vector<std::pair<double, Rungs>> found;
    for (std::size_t a = 0; a < delta.size(); ++a) {
      for (std::size_t i = 0; i < delta[a].size(); ++i) {
        if (first[a] + i == at_[a]) continue;
        Rungs one = at_;
        one[a] = first[a] + i;
        if (delta[a][i] < 0 && BytesAt(one) <= budget_) found.emplace_back(delta[a][i], one);
        for (std::size_t b = a + 1; b < delta.size(); ++b) {
          for (std::size_t j = 0; j < delta[b].size(); ++j) {
            if (first[b] + j == at_[b] || delta[a][i] + delta[b][j] >= 0) continue;
            Rungs two = one;
            two[b] = first[b] + j;
            if (BytesAt(two) <= budget_) found.emplace_back(delta[a][i] + delta[b][j], two);
          }
        }
      }
    }
    std::stable_sort(found.begin(), found.end(),
                     [](const auto& x, const auto& y) { return x.first < y.first; });
    std::vector<Rungs> best;
    for (std::size_t i = 0; i < std::min(found.size(), kMostExchanges); ++i) best.push_back(found[i].second);
    return best;
  }

  Trials& trials_;
  const Profile& profile_;
  const RefineOptions& options_;
  const int64_t budget_;
  const Progress& progress_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::vector<int64_t> bytes_;                    // [expert], of one row
  std::vector<std::vector<std::size_t>> ladder_;  // [row]: experts, bytes ascending
  std::vector<int64_t> fixed_;                    // [row]: bytes of a sliding layer's, 0 for others
  Rungs at_;
  std::vector<double> current_;  // KL of at_, token by token
  int64_t measured_ = 0;
  bool late_ = false;
};

}  // namespace

Expected<Refinement> Refine(Trials& trials, const Profile& profile, const Plan& plan,
                            const RefineOptions& options, const Progress& progress) {
  Search search(trials, profile, options, plan.budget_bytes, progress);
  MOEND_TRY(search.Prepare(plan));
  MOEND_ASSIGN(Refinement result, search.Run());
  result.plan = plan;
  if (options.rows == Rows::kHeads) {
    result.plan.heads = search.experts();
    SumUpHeads(result.plan);
  } else {
    result.plan.layers = search.experts();
  }
  if (result.accepted > 0) result.plan.predicted.clear();  // of the plan before
  MOEND_ASSIGN(result.plan.bytes, PlanBytes(result.plan, plan.context_length, options.score_bytes));
  return result;
}

}  // namespace moend
