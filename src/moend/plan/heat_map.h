// One metric of a profile as a heat map: a row a layer, a column an expert.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "moend/plan/describe.h"

namespace moend {

inline constexpr int kMinTextWidth = 80;

// Positive losses on a logarithmic scale, as steps of colour or of darkness.
class HeatScale {
 public:
  HeatScale(double least, double most, bool color);  // 0 < least <= most, or both 0

  std::string Cells(double loss, int width) const;  // `width` columns that show one loss
  std::string Legend() const;                       // all steps in their order

 private:
  int Step(double loss) const;
  std::string Paint(int step, int width) const;
  double least_, most_;
  bool color_;
};

// Experts are grouped by keep ratio; as many groups stand side by side as `style.width` allows. Lines end in
// newlines.
std::string HeatMap(const Profile& profile, double ProfileCell::*metric, std::string_view name,
                    const TextStyle& style);

}  // namespace moend
