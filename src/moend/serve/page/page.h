// The page at /: one HTML file with its style and script inside, built into the program.
#pragma once

#include <string>

namespace moend::serve {

const std::string& PageHtml();

}  // namespace moend::serve
