#include "moend/solve/solve.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iterator>
#include <limits>
#include <numeric>
#include <set>
#include <utility>

#include "moend/solve/losses.h"
#include "moend/solve/sum_up.h"

namespace moend {
namespace {

constexpr int64_t kMaxTokens = INT32_MAX;
constexpr int64_t kKeepSteps = 1'000'000;  // grid of the uniform keep ratio: six decimals

using Losses = std::vector<std::vector<double>>;

template <class T, std::size_t N>
Expected<T> Parse(const char* what, const std::string& name, const T (&values)[N]) {
  std::string names;
  for (const T value : values) {
    if (name == Name(value)) return value;
    names += (names.empty() ? "" : ", ") + std::string(Name(value));
  }
  return Fail(ErrorCode::kInvalidArgument, "there is no {} named \"{}\"; possible: {}", what, name, names);
}

Expected<void> Check(const Profile& profile, const SolveRequest& request) {
  if (profile.chunks <= 0) {
    return Fail(ErrorCode::kInvalidArgument,
                "the profile holds no finished chunk yet; continue its calibration first");
  }
  if (request.context_length < 1 || request.context_length > kMaxTokens)
    return Fail(ErrorCode::kInvalidArgument, "a context of {} tokens; possible: 1 to {}",
                request.context_length, kMaxTokens);
  if (!(request.min_keep >= 0 && request.min_keep <= 1))
    return Fail(ErrorCode::kInvalidArgument, "a smallest keep ratio of {}; possible: 0 to 1",
                request.min_keep);
  if (!(request.floor_price >= 0 && std::isfinite(request.floor_price)))
    return Fail(ErrorCode::kInvalidArgument, "a price of {} for the floor; it must be a number from 0 up",
                request.floor_price);
  if (request.variant == Variant::kFull) return {};
  const bool ratio = request.compression != 0, bytes = request.budget_bytes != 0;
  if (ratio == bytes)
    return Fail(ErrorCode::kInvalidArgument, "give either a compression or a budget in bytes");
  if (ratio && !(request.compression > 0 && std::isfinite(request.compression)))
    return Fail(ErrorCode::kInvalidArgument, "a compression of {}; it must be a number above 0",
                request.compression);
  if (request.budget_bytes < 0)
    return Fail(ErrorCode::kInvalidArgument, "a budget of {} bytes", request.budget_bytes);
  return {};
}

class Job {
 public:
  Job(const Profile& profile, const SolveRequest& request, const Losses& losses)
      : profile_(profile),
        request_(request),
        losses_(losses),
        full_bytes_(FullBytes(profile.model, request.context_length)) {
    Plan& plan = solution_.plan;
    std::ranges::copy_if(profile.experts, std::back_inserter(experts_),
                         [&](const Expert& e) { return e.keep >= request.min_keep; });
    plan.model = profile.model;
    plan.variant = Name(request.variant);
    plan.scorer = profile.scorer;
    plan.metric = Name(request.metric);
    plan.guard = profile.guard;
    const bool routed = request.variant == Variant::k2dHetero || request.variant == Variant::k2dHeads;
    plan.refit =
        request.refit && routed && (profile.scorer == kReconstructScorer || profile.scorer == kLearnedScorer);
    plan.queries = profile.queries;
    plan.learned = profile.learned;
    plan.context_length = request.context_length;
    plan.budget_bytes = request.budget_bytes;
    if (request.compression > 0) {
      const double bytes = static_cast<double>(full_bytes_) / request.compression;
      plan.budget_bytes = bytes < 0x1p62 ? static_cast<int64_t>(bytes) : int64_t{1} << 62;
    }
  }

  Expected<Solution> Run() {
    switch (request_.variant) {
      case Variant::kFull:
        MOEND_TRY(Full());
        break;
      case Variant::k1d:
        MOEND_TRY(Uniform(16, 16));
        break;
      case Variant::k2dUniform:
        MOEND_TRY(Uniform(8, 4));
        break;
      case Variant::k2d:
        MOEND_TRY(RoutedBits());
        break;
      case Variant::k2dHetero:
        MOEND_TRY(Routed(experts_));
        break;
      case Variant::k2dHeads:
        MOEND_TRY(Routed(experts_));
        MoveHeads();
        break;
    }
    MOEND_ASSIGN(solution_.plan.bytes, Bytes());
    solution_.min_keep = request_.min_keep;
    return std::move(solution_);
  }

 private:
  Expected<int64_t> Bytes() const {
    return PlanBytes(solution_.plan, request_.context_length, request_.score_bytes);
  }

  std::unexpected<Error> TooSmall(int64_t least) const {
    // Rounded down, so that asking for the ratio that is named here succeeds.
    const auto ratio = [this](int64_t bytes) {
      return bytes > 0
                 ? std::floor(100.0 * static_cast<double>(full_bytes_) / static_cast<double>(bytes)) / 100
                 : 0.0;
    };
    const int64_t budget = solution_.plan.budget_bytes;
    return Fail(
        ErrorCode::kBudget,
        "a budget of {} bytes ({}x) for {} tokens is below the smallest possible for {}{}: {} bytes ({}x)",
        budget, ratio(budget), request_.context_length, Name(request_.variant),
        request_.min_keep > 0 ? fmt::format(" that keeps {:g} of the tokens or more", request_.min_keep) : "",
        least, ratio(least));
  }

  // Gives every layer that can be compressed the expert and predicts its loss; a profile without such bits
  // predicts nothing.
  void SetAll(const Expert& expert) {
    Plan& plan = solution_.plan;
    plan.layers.assign(losses_.size(), Expert{});
    CompressAlike(plan, expert);
    plan.predicted.clear();
    solution_.loss = 0;
    for (std::size_t l = 0; l < losses_.size(); ++l) {
      const auto loss = LossAt(profile_.experts, losses_[l], plan.layers[l]);
      if (!loss) {
        plan.predicted.clear();
        solution_.loss = std::numeric_limits<double>::quiet_NaN();
        break;
      }
      plan.predicted.push_back(*loss);
      solution_.loss += *loss;
    }
    solution_.lower_bound = solution_.loss;
  }

  Expected<void> Full() {
    SetAll(Expert{});
    MOEND_ASSIGN(solution_.plan.budget_bytes, Bytes());
    return {};
  }

  // The largest keep ratio that fits, the same for all layers. Bytes grow with it, so it is found by halving.
  Expected<void> Uniform(int k_bits, int v_bits) {
    const auto smallest = static_cast<int64_t>(std::ceil(request_.min_keep * kKeepSteps));
    const int64_t none = std::max<int64_t>(smallest - 1, 0);
    int64_t fits = none, too_large = kKeepSteps + 1, least = 0;
    while (too_large - fits > 1) {
      // The full cache first: with room for it there is nothing to search.
      const int64_t steps = too_large > kKeepSteps ? kKeepSteps : (fits + too_large) / 2;
      SetAll({static_cast<double>(steps) / kKeepSteps, k_bits, v_bits});
      MOEND_ASSIGN(least, Bytes());
      (least <= solution_.plan.budget_bytes ? fits : too_large) = steps;
    }
    if (fits == none) return TooSmall(least);
    SetAll({static_cast<double>(fits) / kKeepSteps, k_bits, v_bits});
    return {};
  }

  // The window of the layer that a row of losses_ is about, 0 for a full one.
  int64_t Window(std::size_t row) const {
    return WindowOfRow(profile_.model, request_.variant == Variant::k2dHeads ? Rows::kHeads : Rows::kLayers,
                       row);
  }

  // What one row of losses_ is about: a layer, or one of its KV heads.
  KvShape RowShape() const {
    if (request_.variant != Variant::k2dHeads) return profile_.model.shape;
    return {1, profile_.model.shape.head_size};
  }

  // Routed() took KV heads for layers: puts them where they belong, and sums each layer up.
  void MoveHeads() {
    Plan& plan = solution_.plan;
    plan.heads = std::exchange(plan.layers, {});
    SumUpHeads(plan);
    const std::vector<double> losses = std::exchange(plan.predicted, {});
    const auto n = static_cast<std::ptrdiff_t>(profile_.model.shape.n_kv_heads);
    for (auto loss = losses.begin(); loss != losses.end(); loss += n)
      plan.predicted.push_back(std::accumulate(loss, loss + n, 0.0));
  }

  Expected<std::vector<int64_t>> ExpertBytes(const std::vector<Expert>& experts) const {
    std::vector<int64_t> bytes;
    for (const Expert& expert : experts) {
      MOEND_ASSIGN(const int64_t b, LayerBytes(RowShape(), expert, profile_.guard, request_.context_length,
                                               request_.score_bytes));
      bytes.push_back(b);
    }
    return bytes;
  }

  Expected<void> CheckFits(const std::vector<Expert>& experts) const {
    if (experts.empty())
      return Fail(ErrorCode::kInvalidArgument,
                  "no expert of the profile keeps {:g} of the tokens or more; its largest keep ratio is {:g}",
                  request_.min_keep, profile_.experts.back().keep);
    MOEND_ASSIGN(const std::vector<int64_t> bytes, ExpertBytes(experts));
    const int64_t least = *std::min_element(bytes.begin(), bytes.end());
    int64_t total = 0;
    for (std::size_t row = 0; row < losses_.size(); ++row) {
      int64_t of_row = least;
      if (const int64_t window = Window(row); window > 0) {
        MOEND_ASSIGN(of_row,
                     FixedBytes(profile_.model, window, RowShape().n_kv_heads, request_.context_length));
      }
      if (__builtin_add_overflow(total, of_row, &total)) total = INT64_MAX;
    }
    return total > solution_.plan.budget_bytes ? Expected<void>(TooSmall(total)) : Expected<void>();
  }

  // Any of `experts`, a part of the profile's, in any layer.
  Expected<void> Routed(const std::vector<Expert>& experts) {
    MOEND_TRY(CheckFits(experts));
    MOEND_ASSIGN(const std::vector<int64_t> bytes, ExpertBytes(experts));
    std::vector<std::size_t> column;  // of each expert in the profile
    for (const Expert& expert : experts) {
      const auto it = std::find(profile_.experts.begin(), profile_.experts.end(), expert);
      column.push_back(static_cast<std::size_t>(it - profile_.experts.begin()));
    }
    std::vector<std::vector<Choice>> items;
    for (std::size_t row = 0; row < losses_.size(); ++row) {
      auto& choices = items.emplace_back();
      if (const int64_t window = Window(row); window > 0) {  // nothing to choose
        MOEND_ASSIGN(const int64_t b,
                     FixedBytes(profile_.model, window, RowShape().n_kv_heads, request_.context_length));
        choices.push_back({b, 0});
        continue;
      }
      for (std::size_t e = 0; e < experts.size(); ++e) choices.push_back({bytes[e], losses_[row][column[e]]});
    }
    Plan& plan = solution_.plan;
    MOEND_ASSIGN(const std::vector<int> chosen,
                 SolveKnapsack(items, plan.budget_bytes, request_.solver, &solution_.lower_bound));
    plan.solver = Name(request_.solver);
    plan.layers.clear();
    plan.predicted.clear();
    solution_.loss = 0;
    for (std::size_t l = 0; l < items.size(); ++l) {
      const auto e = static_cast<std::size_t>(chosen[l]);
      plan.layers.push_back(Window(l) > 0 ? Expert{} : experts[e]);
      plan.predicted.push_back(items[l][e].loss);
      solution_.loss += items[l][e].loss;
    }
    solution_.lower_bound = std::min(solution_.lower_bound, solution_.loss);
    return {};
  }

  // One of the profile's keep ratios for all layers, any bits in each: the best over the ratios.
  Expected<void> RoutedBits() {
    MOEND_TRY(CheckFits(experts_));
    std::set<double> keeps;
    for (const Expert& expert : experts_) keeps.insert(expert.keep);
    std::optional<Solution> best;
    double lower_bound = std::numeric_limits<double>::infinity();
    for (const double keep : keeps) {
      std::vector<Expert> experts;
      std::copy_if(experts_.begin(), experts_.end(), std::back_inserter(experts),
                   [keep](const Expert& expert) { return expert.keep == keep; });
      if (!CheckFits(experts)) continue;
      MOEND_TRY(Routed(experts));
      lower_bound = std::min(lower_bound, solution_.lower_bound);
      if (!best || solution_.loss < best->loss) best = solution_;
    }
    solution_ = std::move(*best);
    solution_.lower_bound = lower_bound;
    return {};
  }

  const Profile& profile_;
  const SolveRequest& request_;
  const Losses& losses_;
  const int64_t full_bytes_;
  std::vector<Expert> experts_;  // of the profile's those that keep enough
  Solution solution_;
};

// The largest floor up to min_keep that is worth its price. A larger floor leaves fewer experts, so that
// losses grow with it.
Expected<Solution> WithAffordableFloor(const Profile& profile, const SolveRequest& request,
                                       const Losses& losses) {
  SolveRequest floored = request;
  floored.min_keep = 0;
  MOEND_ASSIGN(Solution best, Job(profile, floored, losses).Run());
  if (request.variant != Variant::k2dHetero && request.variant != Variant::k2dHeads) return best;
  const double lower_bound = best.lower_bound, most = best.loss * (1 + request.floor_price);
  for (const Expert& expert : profile.experts) {
    if (floored.min_keep >= request.min_keep) break;
    if (expert.keep <= floored.min_keep) continue;
    floored.min_keep = expert.keep;
    auto solution = Job(profile, floored, losses).Run();
    if (!solution || !(solution->loss <= most)) break;
    best = std::move(*solution);
  }
  best.lower_bound = lower_bound;
  return best;
}

}  // namespace

void CompressFullLayers(const Fingerprint& model, double compression, SolveRequest& request) {
  request.compression = model.windows.empty() ? compression : 0;
  request.budget_bytes = 0;
  if (model.windows.empty()) return;
  const int64_t n = request.context_length;
  int64_t windows = 0, full = 0;
  for (int64_t l = 0; l < model.n_layers; ++l) {
    const int64_t window = model.window(l);
    (window > 0 ? windows : full) += window > 0
                                         ? FixedBytes(model, window, model.shape.n_kv_heads, n).value_or(0)
                                         : FullLayerBytes(model.shape, n);
  }
  request.budget_bytes =
      std::max<int64_t>(1, windows + static_cast<int64_t>(static_cast<double>(full) / compression));
}

void SumUpHeads(Plan& plan) {
  const auto n = static_cast<std::ptrdiff_t>(plan.model.shape.n_kv_heads);
  const auto size = [](const Expert& e) { return e.keep * (e.k_bits + e.v_bits); };
  plan.layers.clear();
  for (auto begin = plan.heads.begin(); begin != plan.heads.end(); begin += n) {
    const auto end = begin + n;
    Expert layer = *std::max_element(begin, end, [&](auto& a, auto& b) { return size(a) < size(b); });
    layer.keep = std::accumulate(begin, end, 0.0, [](double s, const Expert& e) { return s + e.keep; }) /
                 static_cast<double>(n);
    plan.layers.push_back(layer);
  }
}

const char* Name(Solver solver) {
  return solver == Solver::kGreedy ? "greedy" : solver == Solver::kHull ? "hull" : "exact";
}

const char* Name(Metric metric) {
  return metric == Metric::kKl ? "kl" : "l2";
}

const char* Name(Variant variant) {
  switch (variant) {
    case Variant::kFull:
      return "full";
    case Variant::k1d:
      return "1d";
    case Variant::k2dUniform:
      return "2d_uniform";
    case Variant::k2d:
      return "2d";
    case Variant::k2dHeads:
      return "2d_heads";
    case Variant::k2dHetero:
      break;
  }
  return "2d_hetero";
}

Expected<Solver> ParseSolver(const std::string& name) {
  return Parse("solver", name, {Solver::kGreedy, Solver::kHull, Solver::kExact});
}

Expected<Metric> ParseMetric(const std::string& name) {
  return Parse("metric", name, {Metric::kKl, Metric::kL2});
}

Expected<Variant> ParseVariant(const std::string& name) {
  return Parse("variant", name,
               {Variant::kFull, Variant::k1d, Variant::k2dUniform, Variant::k2d, Variant::k2dHetero,
                Variant::k2dHeads});
}

Variant FinestVariant(const Profile& profile) {
  return profile.head_cells.empty() ? Variant::k2dHetero : Variant::k2dHeads;
}

Expected<Solution> Solve(const Profile& profile, const SolveRequest& request) {
  const auto start = std::chrono::steady_clock::now();
  MOEND_TRY(Check(profile, request));
  const Rows rows = request.variant == Variant::k2dHeads ? Rows::kHeads : Rows::kLayers;
  MOEND_ASSIGN(const Losses losses, CleanLosses(profile, request.metric, rows));
  MOEND_ASSIGN(Solution solution, request.floor_price > 0 ? WithAffordableFloor(profile, request, losses)
                                                          : Job(profile, request, losses).Run());
  solution.expected_kl = request.metric == Metric::kKl ? ExpectedKl(profile, solution.loss)
                                                       : std::numeric_limits<double>::quiet_NaN();
  solution.milliseconds =
      std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  return solution;
}

}  // namespace moend
