#include "moend/eval/markdown.h"

#include <fmt/format.h>

#include <algorithm>

namespace moend::eval {
namespace {

// Characters, not bytes: "±" takes two.
std::size_t Width(const std::string& text) {
  return static_cast<std::size_t>(
      std::ranges::count_if(text, [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

}  // namespace

std::string MarkdownTable(const std::vector<std::vector<std::string>>& rows, std::size_t left) {
  std::vector<std::size_t> widths(rows[0].size(), 0);
  for (const auto& row : rows)
    for (std::size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], Width(row[c]));
  std::string out;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    for (std::size_t c = 0; c < rows[r].size(); ++c) {
      const std::string space(widths[c] - Width(rows[r][c]), ' ');
      out += c < left ? "| " + rows[r][c] + space + " " : "| " + space + rows[r][c] + " ";
    }
    out += "|\n";
    if (r > 0) continue;
    for (std::size_t c = 0; c < widths.size(); ++c)
      out += fmt::format("|{:-<{}}", "", widths[c] + 1) + (c < left ? "-" : ":");
    out += "|\n";
  }
  return out;
}

}  // namespace moend::eval
