// Profiles and plans as text for a terminal.
#pragma once

#include <string>

#include "moend/plan/plan.h"

namespace moend {

struct TextStyle {
  bool color = false;  // ANSI colours (256); without, shades of ASCII characters
  int width = 100;     // columns of the widest line, at least 80
};

// Who it was measured for and how, then a heat map of layers x experts for both metrics (logarithmic, wrapped
// into panels where it is too wide), the least and largest loss, and how far the layers are apart. Ends in a
// newline.
std::string DescribeProfile(const Profile& profile, const TextStyle& style = {});

// A row a layer: keep ratio, tokens, bits, MiB and predicted loss at the plan's context length; then the
// totals: bytes, compression, bits an element. Ends in a newline.
std::string DescribePlan(const Plan& plan, const TextStyle& style = {});

}  // namespace moend
