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

Expected<std::vector<std::vector<double>>> CleanLosses(const Profile& profile, Metric metric) {
  if (static_cast<int64_t>(profile.cells.size()) != profile.model.n_layers || profile.experts.empty())
    return Fail(ErrorCode::kInvalidArgument, "a profile of {} layers and {} experts for a model of {} layers",
                profile.cells.size(), profile.experts.size(), profile.model.n_layers);
  std::vector<std::vector<double>> losses;
  for (std::size_t l = 0; l < profile.cells.size(); ++l) {
    if (profile.cells[l].size() != profile.experts.size())
      return Fail(ErrorCode::kInvalidArgument, "layer {} of the profile has {} cells for {} experts", l,
                  profile.cells[l].size(), profile.experts.size());
    std::vector<double> raw;
    for (std::size_t e = 0; e < profile.experts.size(); ++e) {
      const ProfileCell& cell = profile.cells[l][e];
      const double loss = metric == Metric::kKl ? cell.kl : cell.l2;
      if (!std::isfinite(loss)) {
        return Fail(ErrorCode::kInvalidArgument, "the {} of layer {} with expert {} of the profile is {}",
                    Name(metric), l, e, loss);
      }
      raw.push_back(std::max(loss, 0.0));
    }
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
