#include "moend/plan/heat_map.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace moend {
namespace {

// From what costs nothing to what hurts: dark to bright, as numbers of the 256-colour palette.
constexpr std::array<int, 12> kColors = {17, 18, 54, 90, 126, 161, 197, 203, 209, 215, 221, 229};
constexpr std::string_view kShades = " .:-=+*#%@";
constexpr double kRange = 1e4;  // what loses that much less than the worst is as good as nothing
constexpr int kLabel = 11;      // "layer 1023 "

struct Group {
  std::size_t begin = 0, end = 0;  // experts of one keep ratio
  std::string title;
};

std::vector<Group> GroupsByKeep(const std::vector<Expert>& experts) {
  std::vector<Group> groups;
  for (std::size_t e = 0; e < experts.size(); ++e) {
    if (groups.empty() || experts[e].keep != experts[groups.back().begin].keep)
      groups.push_back({e, e, fmt::format("{:.3g}%", 100 * experts[e].keep)});
    groups.back().end = e + 1;
  }
  return groups;
}

int Width(const Group& group, int cell) {
  return std::max(static_cast<int>(group.end - group.begin) * cell, static_cast<int>(group.title.size()));
}

// Two columns a cell look square; one is the way to fit.
int CellWidth(const std::vector<Group>& groups, int room) {
  int width = 0;
  for (const Group& group : groups) width += Width(group, 2) + 1;
  return width <= room ? 2 : 1;
}

char BitsDigit(int bits) {
  return bits == 16 ? 'f' : static_cast<char>('0' + bits % 10);
}

// One line of the panel: text(expert) for the columns of each group, padded to the group's width.
template <class F>
std::string Line(std::string_view label, std::span<const Group> groups, int cell, F text) {
  std::string line = fmt::format("{:<{}}", label, kLabel);
  for (const Group& group : groups) {
    for (std::size_t e = group.begin; e < group.end; ++e) line += text(e);
    const int used = static_cast<int>(group.end - group.begin) * cell;
    line += std::string(static_cast<std::size_t>(Width(group, cell) - used + 1), ' ');
  }
  line.erase(line.find_last_not_of(' ') + 1);
  return line + "\n";
}

std::string Panel(const Profile& profile, std::span<const Group> groups, int cell, const HeatScale& scale,
                  double ProfileCell::*metric) {
  std::string out = fmt::format("{:<{}}", "keep", kLabel);
  for (const Group& group : groups) out += fmt::format("{:<{}} ", group.title, Width(group, cell));
  out.erase(out.find_last_not_of(' ') + 1);
  out += "\n";
  const auto digit = [&](int bits) { return fmt::format("{:<{}}", BitsDigit(bits), cell); };
  out += Line("K bits", groups, cell, [&](std::size_t e) { return digit(profile.experts[e].k_bits); });
  out += Line("V bits", groups, cell, [&](std::size_t e) { return digit(profile.experts[e].v_bits); });
  for (std::size_t l = 0; l < profile.cells.size(); ++l) {
    const auto& row = profile.cells[l];
    if (const int64_t window = profile.model.window(static_cast<int64_t>(l)); window > 0) {
      out += fmt::format("{:<{}}{}\n", fmt::format("layer {}", l), kLabel,
                         window == Fingerprint::kHoldsState
                             ? "holds a state"
                             : fmt::format("sees the newest {} tokens only", window));
      continue;
    }
    out += Line(fmt::format("layer {}", l), groups, cell, [&](std::size_t e) {
      return e < row.size() ? scale.Cells(row[e].*metric, cell)
                            : std::string(static_cast<std::size_t>(cell), ' ');
    });
  }
  return out;
}

struct Extreme {
  double loss = 0;
  std::size_t layer = 0, expert = 0;
};

std::string Where(const Profile& profile, const Extreme& x) {
  const Expert& e = profile.experts[x.expert];
  return fmt::format("{:.3g} (layer {}, keep {:.3g}%, K {}, V {})", x.loss, x.layer, 100 * e.keep, e.k_bits,
                     e.v_bits);
}

}  // namespace

HeatScale::HeatScale(double least, double most, bool color) : least_(least), most_(most), color_(color) {}

int HeatScale::Step(double loss) const {
  const int steps = static_cast<int>(color_ ? kColors.size() : kShades.size());
  if (!(loss > least_) || !(most_ > least_)) return loss > 0 && loss >= most_ ? steps - 1 : 0;
  const double share = std::log(loss / least_) / std::log(most_ / least_);
  return std::clamp(static_cast<int>(share * steps), 0, steps - 1);
}

std::string HeatScale::Paint(int step, int width) const {
  const auto columns = static_cast<std::size_t>(width);
  const auto at = static_cast<std::size_t>(step);
  if (!color_) return std::string(columns, kShades[at]);
  return fmt::format("\x1b[48;5;{}m{}\x1b[0m", kColors[at], std::string(columns, ' '));
}

std::string HeatScale::Cells(double loss, int width) const {
  return Paint(Step(loss), width);
}

std::string HeatScale::Legend() const {
  std::string out;
  const int steps = static_cast<int>(color_ ? kColors.size() : kShades.size());
  for (int s = 0; s < steps; ++s) out += Paint(s, color_ ? 2 : 1);
  return out;
}

std::string HeatMap(const Profile& profile, double ProfileCell::*metric, std::string_view name,
                    const TextStyle& style) {
  Extreme least, most;
  for (std::size_t l = 0; l < profile.cells.size(); ++l) {
    for (std::size_t e = 0; e < std::min(profile.cells[l].size(), profile.experts.size()); ++e) {
      const double loss = profile.cells[l][e].*metric;
      if (loss > 0 && (least.loss == 0 || loss < least.loss)) least = {loss, l, e};
      if (loss > most.loss) most = {loss, l, e};
    }
  }
  const double from = std::max(least.loss, most.loss / kRange);
  const HeatScale scale(from, most.loss, style.color);
  const std::vector<Group> groups = GroupsByKeep(profile.experts);
  const int room = std::max(style.width, kMinTextWidth) - kLabel;
  const int cell = CellWidth(groups, room);
  std::string out = fmt::format("{}\n", name);
  for (std::size_t begin = 0; begin < groups.size();) {
    std::size_t end = begin;
    for (int width = 0; end < groups.size(); ++end) {
      width += Width(groups[end], cell) + (end > begin ? 1 : 0);
      if (width > room && end > begin) break;
    }
    out += Panel(profile, std::span(groups).subspan(begin, end - begin), cell, scale, metric) + "\n";
    begin = end;
  }
  if (most.loss == 0) return out + "nothing is lost anywhere\n";
  out += fmt::format("least  {}\n", Where(profile, least));
  out += fmt::format("most   {}\n", Where(profile, most));
  out += fmt::format("scale  {:.2g} [{}] {:.2g}, logarithmic; f: 16 bit\n", least.loss, scale.Legend(),
                     most.loss);
  return out;
}

}  // namespace moend
