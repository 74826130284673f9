#include "moend/model/special_tokens.h"

#include <algorithm>
#include <utility>

namespace moend {

void SpecialTokens::Add(std::string text, int32_t token) {
  if (!text.empty()) entries_.push_back({std::move(text), token});
}

void SpecialTokens::Finish() {
  std::sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) { return a.text < b.text; });
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    auto& [begin, end] = first_[static_cast<unsigned char>(entries_[i].text[0])];
    if (end == 0) begin = static_cast<int32_t>(i);
    end = static_cast<int32_t>(i) + 1;
  }
}

std::vector<SpecialMatch> SpecialTokens::All(std::string_view text) const {
  std::vector<SpecialMatch> out;
  for (std::size_t at = 0; at < text.size(); ++at) {
    auto [low, high] = first_[static_cast<unsigned char>(text[at])];
    // The entries that agree with the text so far are a range, which each further byte narrows.
    for (std::size_t n = 1; low < high; ++n) {
      const Entry& shortest = entries_[static_cast<std::size_t>(low)];
      if (shortest.text.size() == n) {
        out.push_back({static_cast<int64_t>(at), static_cast<int64_t>(at + n), shortest.token});
        if (++low == high) break;
      }
      if (at + n >= text.size()) break;
      const auto byte = static_cast<unsigned char>(text[at + n]);
      const auto begin = entries_.begin() + low, end = entries_.begin() + high;
      const auto from = std::partition_point(
          begin, end, [&](const Entry& e) { return static_cast<unsigned char>(e.text[n]) < byte; });
      const auto to = std::partition_point(
          from, end, [&](const Entry& e) { return static_cast<unsigned char>(e.text[n]) == byte; });
      low = static_cast<int32_t>(from - entries_.begin());
      high = static_cast<int32_t>(to - entries_.begin());
    }
  }
  return out;
}

std::vector<SpecialMatch> SpecialTokens::Cut(std::string_view text, std::span<const int64_t> seams) const {
  std::vector<SpecialMatch> all = All(text);
  std::erase_if(all, [&](const SpecialMatch& m) {
    const auto seam = std::lower_bound(seams.begin(), seams.end(), m.begin);
    return seam != seams.end() && *seam < m.end;
  });
  const auto length = [](const SpecialMatch& m) { return m.end - m.begin; };
  std::stable_sort(all.begin(), all.end(),
                   [&](const SpecialMatch& a, const SpecialMatch& b) { return length(a) > length(b); });
  std::vector<bool> taken(text.size());
  std::vector<SpecialMatch> out;
  for (const SpecialMatch& m : all) {
    const auto begin = taken.begin() + m.begin, end = taken.begin() + m.end;
    // What was taken before is no shorter, so that it reaches one of the two ends.
    if (*begin || *(end - 1)) continue;
    std::fill(begin, end, true);
    out.push_back(m);
  }
  std::sort(out.begin(), out.end(),
            [](const SpecialMatch& a, const SpecialMatch& b) { return a.begin < b.begin; });
  return out;
}

}  // namespace moend
