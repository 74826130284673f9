#include "moend/solve/losses.h"

#include <algorithm>
#include <cmath>

namespace moend {
namespace {

bool AtLeast(const Expert& a, const Expert& b) {
  return a.keep >= b.keep && a.k_bits >= b.k_bits && a.v_bits >= b.v_bits;
}

std::vector<double> Monotone(const std::vector<Expert>& experts, const std::vector<double>& raw) {
  std::vector<double> clean(raw.size());
  for (std::size_t e = 0; e < raw.size(); ++e) {
    double least = raw[e], most = raw[e];
    for (std::size_t o = 0; o < raw.size(); ++o) {
      if (AtLeast(experts[e], experts[o])) least = std::min(least, raw[o]);
      if (AtLeast(experts[o], experts[e])) most = std::max(most, raw[o]);
    }
    clean[e] = 0.5 * (least + most);
  }
  return clean;
}

}  // namespace

Expected<std::vector<std::vector<double>>> CleanLosses(const Profile& profile, Metric metric, Rows rows) {
  const bool by_head = rows == Rows::kHeads;
  const char* row = by_head ? "KV head" : "layer";
  const auto& table = by_head ? profile.head_cells : profile.cells;
  if (by_head && table.empty())
    return Fail(ErrorCode::kInvalidArgument,
                "the profile does not measure KV heads; calibrate with --heads to route them");
  const int64_t wanted = profile.model.n_layers * (by_head ? profile.model.shape.n_kv_heads : 1);
  if (std::ssize(table) != wanted || profile.experts.empty())
    return Fail(ErrorCode::kInvalidArgument, "a profile of {} {}s and {} experts for a model of {} {}s",
                table.size(), row, profile.experts.size(), wanted, row);
  const auto any = [&](double ProfileCell::*member) {
    return std::any_of(table.begin(), table.end(), [&](const auto& cells) {
      return std::any_of(cells.begin(), cells.end(), [&](const ProfileCell& c) { return c.*member != 0; });
    });
  };
  if (metric == Metric::kKl && !any(&ProfileCell::kl) && any(&ProfileCell::l2))
    return Fail(ErrorCode::kInvalidArgument, "the profile did not measure the KL of anything; solve by l2");
  const auto noise_at = std::ranges::find(profile.experts, kNoiseExpert) - profile.experts.begin();
  const bool noisy = metric == Metric::kKl && profile.method == ProfileMethod::kLogits &&
                     noise_at < std::ssize(profile.experts);
  std::vector<std::vector<double>> losses;
  for (std::size_t l = 0; l < table.size(); ++l) {
    if (table[l].size() != profile.experts.size())
      return Fail(ErrorCode::kInvalidArgument, "{} {} of the profile has {} cells for {} experts", row, l,
                  table[l].size(), profile.experts.size());
    std::vector<double> raw;
    for (std::size_t e = 0; e < profile.experts.size(); ++e) {
      const double loss = metric == Metric::kKl ? table[l][e].kl : table[l][e].l2;
      if (!std::isfinite(loss)) {
        return Fail(ErrorCode::kInvalidArgument, "the {} of {} {} with expert {} of the profile is {}",
                    Name(metric), row, l, e, loss);
      }
      raw.push_back(std::max(loss, 0.0));
    }
    const double noise = noisy ? raw[static_cast<std::size_t>(noise_at)] : 0;
    for (double& loss : raw) loss = std::max(loss - noise, 0.0);
    losses.push_back(Monotone(profile.experts, raw));
  }
  return losses;
}

std::optional<double> LossAt(const std::vector<Expert>& experts, const std::vector<double>& losses,
                             const Expert& expert) {
  if (expert == Expert{}) return 0.0;
  // The neighbours below and above on the axis of keep ratios.
  std::optional<std::pair<double, double>> below, above;
  const auto offer = [&](double keep, double loss) {
    if (keep <= expert.keep && (!below || keep > below->first)) below = {keep, loss};
    if (keep >= expert.keep && (!above || keep < above->first)) above = {keep, loss};
  };
  for (std::size_t e = 0; e < experts.size(); ++e) {
    if (experts[e].k_bits == expert.k_bits && experts[e].v_bits == expert.v_bits)
      offer(experts[e].keep, losses[e]);
  }
  if (!below && !above) return std::nullopt;
  if (expert.k_bits == 16 && expert.v_bits == 16) offer(1.0, 0.0);
  if (!below || !above || below->first == above->first) return below ? below->second : above->second;
  const double share = (expert.keep - below->first) / (above->first - below->first);
  return below->second + share * (above->second - below->second);
}

}  // namespace moend
