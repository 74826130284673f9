// Markdown tables that read well as plain text, too.
#pragma once

#include <string>
#include <vector>

namespace moend::eval {

// The first row is the head; the first `left` columns are aligned to the left, the others to the right. Rows
// are as long as the first one.
std::string MarkdownTable(const std::vector<std::vector<std::string>>& rows, std::size_t left);

}  // namespace moend::eval
