// Plain text tables for a terminal.
#pragma once

#include <string>
#include <vector>

namespace moend::cli {

struct Column {
  std::string title;
  int width = 20;  // cells are wrapped to it
};

// Columns two spaces apart, a rule below the titles, cells wrapped at words. Rows may be shorter than the
// columns.
std::string Table(const std::vector<Column>& columns, const std::vector<std::vector<std::string>>& rows);

// `text` in lines of at most `width` characters, broken at spaces where there are some. At least one line.
std::vector<std::string> Wrap(const std::string& text, int width);

}  // namespace moend::cli
