// Files of the report page, put into the program at build time (cmake/MoendReport.cmake).
#pragma once

#include <string_view>

namespace moend::eval::assets {

extern const std::string_view page;    // HTML with {{style}}, {{plots}}, {{data}} and {{script}}
extern const std::string_view style;   // CSS
extern const std::string_view script;  // ours
extern const std::string_view plots;   // D3 and Observable Plot; empty when the build had no copy

}  // namespace moend::eval::assets
