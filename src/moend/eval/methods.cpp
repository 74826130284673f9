#include "moend/eval/methods.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>

#include "moend/score/scorer.h"

namespace moend::eval {
namespace {

constexpr std::array<std::string_view, 13> kVariants = {
    "full",  "1d",      "2d_uniform", "2d", "2d_hetero", "2d_heads", "pyramid",
    "adakv", "kvtuner", "q8",         "q4", "q3",        "q2"};

std::optional<int> UniformBits(const std::string& variant) {
  if (variant.size() != 2 || variant[0] != 'q') return {};
  const int bits = variant[1] - '0';
  if (!IsBitWidth(bits)) return {};
  return bits;
}

bool HasScorer(const std::string& variant) {
  return NeedsProfile(variant) && variant != "kvtuner";
}

// Only the experts that keep every token.
Profile WithoutEviction(const Profile& profile) {
  Profile out = profile;
  out.experts.clear();
  out.head_cells.clear();
  for (auto& row : out.cells) row.clear();
  for (std::size_t e = 0; e < profile.experts.size(); ++e) {
    if (profile.experts[e].keep < 1) continue;
    out.experts.push_back(profile.experts[e]);
    for (std::size_t l = 0; l < out.cells.size(); ++l) out.cells[l].push_back(profile.cells[l][e]);
  }
  return out;
}

// PyramidKV: with a mean share of `mean`, the last layer keeps mean / beta and the first what makes up for
// it. Sliding layers are passed over.
std::vector<Expert> PyramidLayers(const Fingerprint& model, double mean) {
  constexpr double kBeta = 20;
  const double last = mean / kBeta, first = 2 * mean - last;
  std::vector<Expert> layers(static_cast<std::size_t>(model.n_layers));
  std::vector<std::size_t> full;
  for (std::size_t l = 0; l < layers.size(); ++l)
    if (model.window(static_cast<int64_t>(l)) == 0) full.push_back(l);
  for (std::size_t i = 0; i < full.size(); ++i) {
    const double at = full.size() > 1 ? static_cast<double>(i) / static_cast<double>(full.size() - 1) : 0.5;
    layers[full[i]] = {std::clamp(first + (last - first) * at, 1e-6, 1.0), 16, 16};
  }
  return layers;
}

class Maker {
 public:
  Maker(const Fingerprint& model, const Profile* profile, const MethodRequest& request)
      : model_(model), profile_(profile), request_(request) {}

  Expected<Plan> Make(const std::string& variant, double compression, const std::string& scorer) const {
    if (variant == "full") return FullPlan(model_, request_.context_length);
    if (const auto bits = UniformBits(variant)) {
      Plan plan = FullPlan(model_, request_.context_length);
      plan.variant = variant;
      CompressAlike(plan, Expert{1.0, *bits, *bits});
      if (profile_) plan.guard = profile_->guard;
      MOEND_ASSIGN(plan.bytes, PlanBytes(plan, request_.context_length, 0));
      plan.budget_bytes = plan.bytes;
      return plan;
    }
    MOEND_ASSIGN(const auto made, MakeScorer(scorer));
    SolveRequest solve;
    solve.solver = request_.solver;
    solve.metric = request_.metric;
    solve.context_length = request_.context_length;
    solve.compression = compression;
    solve.min_keep = request_.min_keep.value_or(kDefaultMinKeep);
    solve.floor_price = request_.min_keep ? 0 : kDefaultFloorPrice;
    solve.score_bytes = made->needs().accumulated ? 4 : 0;
    if (variant == "pyramid") return Pyramid(compression, scorer, solve.score_bytes);
    if (variant == "kvtuner") {
      const Profile kept = WithoutEviction(*profile_);
      if (kept.experts.empty())
        return Fail(ErrorCode::kBudget, "the profile has no expert that keeps every token");
      solve.variant = Variant::k2dHetero;
      solve.score_bytes = 0;
      return Named(Solve(kept, solve), variant, scorer);
    }
    if (variant == "adakv") {
      solve.variant = Variant::k1d;
      MOEND_ASSIGN(Plan plan, Named(Solve(*profile_, solve), variant, scorer));
      plan.adaptive_heads = true;
      return plan;
    }
    MOEND_ASSIGN(solve.variant, ParseVariant(variant));
    return Named(Solve(*profile_, solve), variant, scorer);
  }

 private:
  static Expected<Plan> Named(Expected<Solution> solution, const std::string& variant,
                              const std::string& scorer) {
    if (!solution) return Forward(solution);
    Plan plan = std::move(solution->plan);
    plan.variant = variant;
    plan.scorer = scorer;
    return plan;
  }

  // The largest mean share that fits the budget.
  Expected<Plan> Pyramid(double compression, const std::string& scorer, int64_t score_bytes) const {
    Plan plan = FullPlan(model_, request_.context_length);
    plan.variant = "pyramid";
    plan.scorer = scorer;
    plan.guard = profile_->guard;
    plan.queries = profile_->queries;
    const double full = static_cast<double>(FullBytes(model_, request_.context_length));
    plan.budget_bytes = static_cast<int64_t>(full / compression);
    double low = 0, high = 1;
    bool fits = false;
    for (int step = 0; step < 40; ++step) {
      const double mean = 0.5 * (low + high);
      plan.layers = PyramidLayers(model_, mean);
      MOEND_ASSIGN(const int64_t bytes, PlanBytes(plan, request_.context_length, score_bytes));
      (bytes <= plan.budget_bytes ? low : high) = mean;
      fits |= bytes <= plan.budget_bytes;
    }
    if (!fits) return Fail(ErrorCode::kBudget, "{:g}x is more than pyramid can reach", compression);
    plan.layers = PyramidLayers(model_, low);
    MOEND_ASSIGN(plan.bytes, PlanBytes(plan, request_.context_length, score_bytes));
    return plan;
  }

  const Fingerprint& model_;
  const Profile* profile_;
  const MethodRequest& request_;
};

Expected<void> Check(const Fingerprint& model, const Profile* profile, const MethodRequest& request) {
  for (const std::string& variant : request.variants) {
    if (std::ranges::find(kVariants, variant) == kVariants.end())
      return Fail(ErrorCode::kNotFound, "there is no variant \"{}\"; possible: {}", variant,
                  fmt::join(kVariants, ", "));
    if (!NeedsProfile(variant)) continue;
    if (!profile)
      return Fail(ErrorCode::kInvalidArgument, "the variant {} needs a profile (moend calibrate makes one)",
                  variant);
    if (request.compressions.empty())
      return Fail(ErrorCode::kInvalidArgument, "the variant {} needs a compression to reach", variant);
  }
  if (profile) MOEND_TRY(CheckSameModel(profile->model, model, "the profile"));
  return {};
}

}  // namespace

std::vector<std::string> MethodNames() {
  return {kVariants.begin(), kVariants.end()};
}

bool NeedsProfile(const std::string& variant) {
  return variant != "full" && !UniformBits(variant);
}

Expected<std::vector<Method>> MakeMethods(const Fingerprint& model, const Profile* profile,
                                          const MethodRequest& request, std::vector<std::string>& skipped) {
  MOEND_TRY(Check(model, profile, request));
  std::vector<std::string> scorers = request.scorers;
  if (scorers.empty()) scorers.push_back(profile ? profile->scorer : "snapkv");
  const Maker maker(model, profile, request);
  std::vector<Method> methods;
  for (const std::string& variant : request.variants) {
    const std::vector<double> none = {0};
    for (const double compression : NeedsProfile(variant) ? request.compressions : none) {
      for (const std::string& scorer : scorers) {
        auto plan = maker.Make(variant, compression, scorer);
        if (!plan && plan.error().code == ErrorCode::kBudget) {
          skipped.push_back(
              fmt::format("{} at {:g}x is left out: {}", variant, compression, plan.error().message));
          break;  // no scorer changes that
        }
        if (!plan) return Forward(plan);
        const bool evicts = Evicts(*plan);
        methods.push_back({variant, HasScorer(variant) ? scorer : "", compression, std::move(*plan)});
        if (!evicts) break;
      }
    }
  }
  return methods;
}

Method MethodOf(const Plan& plan, const std::string& scorer) {
  return {plan.variant, Evicts(plan) ? (scorer.empty() ? plan.scorer : scorer) : "", 0, plan};
}

bool Compresses(const Plan& plan) {
  const auto changed = [](const Expert& e) { return e != Expert{}; };
  // A plan that is routed by KV head says nothing with its layers.
  return std::ranges::any_of(plan.heads.empty() ? plan.layers : plan.heads, changed);
}

std::string LabelOf(const std::string& variant, const std::string& scorer, double compression) {
  std::string text = variant;
  if (!scorer.empty()) text += fmt::format("/{}", ShortScorerName(scorer));
  if (compression > 0) text += fmt::format(" {:g}x", compression);
  return text;
}

std::string LabelOf(const Method& method) {
  return LabelOf(method.variant, method.scorer, method.compression);
}

}  // namespace moend::eval
