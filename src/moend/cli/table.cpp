#include "moend/cli/table.h"

#include <fmt/format.h>

#include <algorithm>

namespace moend::cli {
namespace {

// Characters, not bytes: every byte but UTF-8's continuation bytes begins one.
int Length(std::string_view text) {
  return static_cast<int>(std::count_if(
      text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

// Bytes of the first `n` characters.
std::size_t Prefix(std::string_view text, int n) {
  std::size_t i = 0;
  while (i < text.size() && n-- > 0) {
    ++i;
    while (i < text.size() && (static_cast<unsigned char>(text[i]) & 0xC0) == 0x80) ++i;
  }
  return i;
}

}  // namespace

std::vector<std::string> Wrap(const std::string& text, int width) {
  std::vector<std::string> lines;
  std::string_view left = text;
  while (Length(left) > width) {
    const std::size_t end = Prefix(left, width);
    // A space right behind the line is as good a break as one inside it.
    std::size_t cut = left.substr(0, end + 1).rfind(' ');
    const bool at_space = cut != std::string_view::npos && cut > 0;
    if (!at_space) cut = end;
    lines.emplace_back(left.substr(0, cut));
    left.remove_prefix(cut + (at_space ? 1 : 0));
  }
  lines.emplace_back(left);
  return lines;
}

std::string Table(const std::vector<Column>& columns, const std::vector<std::vector<std::string>>& rows) {
  std::string out;
  const auto add_row = [&](const std::vector<std::string>& cells) {
    std::vector<std::vector<std::string>> wrapped;
    std::size_t height = 1;
    for (std::size_t c = 0; c < cells.size() && c < columns.size(); ++c) {
      wrapped.push_back(Wrap(cells[c], columns[c].width));
      height = std::max(height, wrapped.back().size());
    }
    for (std::size_t i = 0; i < height; ++i) {
      std::string line;
      for (std::size_t c = 0; c < wrapped.size(); ++c) {
        const std::string cell = i < wrapped[c].size() ? wrapped[c][i] : "";
        line += cell;
        line.append(static_cast<std::size_t>(std::max(0, columns[c].width - Length(cell)) + 2), ' ');
      }
      line.erase(line.find_last_not_of(' ') + 1);
      out += line + '\n';
    }
  };
  std::vector<std::string> titles;
  std::size_t total = 0;
  for (const Column& c : columns) {
    titles.push_back(c.title);
    total += static_cast<std::size_t>(c.width) + 2;
  }
  add_row(titles);
  out += std::string(total > 2 ? total - 2 : 0, '-') + '\n';
  for (const auto& row : rows) add_row(row);
  return out;
}

}  // namespace moend::cli
