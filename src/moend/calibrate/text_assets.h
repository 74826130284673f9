// Texts that the build puts into the library (cmake/EmbedText.cmake).
#pragma once

#include <string_view>

namespace moend::assets {

extern const std::string_view mixed_text;  // models/calibration-mixed.txt

}  // namespace moend::assets
