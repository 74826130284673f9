// What stands between the words a user typed and CLI11, which knows one-letter short flags only.
#pragma once

#include <string>
#include <vector>

#include "moend/base/error.h"

namespace moend::cli {

// Short flags of two letters as llama.cpp has them become the long flags that the commands declare
// (-np 4 -> --parallel 4). Those that moend has no use for are an error that says so, before CLI11 reads
// "-ngl 99" as "-n gl".
Expected<std::vector<std::string>> TranslateArguments(int argc, const char* const* argv);

// \n, \t, \r, \\, \', \" and \xHH as in C; other backslashes stay as they are.
std::string Unescape(const std::string& text);

}  // namespace moend::cli
