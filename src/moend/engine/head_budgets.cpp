#include "moend/engine/head_budgets.h"

#include <algorithm>
#include <functional>
#include <utility>

namespace moend {
namespace {

constexpr int64_t kFloorDivisor = 5;    // a head gets at least this part of the even share
constexpr double kMostOfAHead = 0.999;  // 1 would mean that the head never evicts again

}  // namespace

std::vector<int64_t> SplitPages(std::span<const std::vector<float>> scores, double keep,
                                const Protected& guard) {
  const auto n_heads = static_cast<int64_t>(scores.size());
  const auto n = n_heads > 0 ? static_cast<int64_t>(scores[0].size()) : 0;
  const int64_t even = KeptPages(keep, guard, n);
  const auto most = static_cast<int64_t>(kMostOfAHead * static_cast<double>(n)) - guard.sinks - guard.window;
  const int64_t most_pages = std::max(even, most / kPageTokens);
  std::vector<int64_t> pages(scores.size(), even);
  if (even == 0 || most_pages == even) return pages;

  // All tokens that may go, best first; ties go to the newer token, then to the first head.
  struct Candidate {
    float score;
    int64_t token, head;
  };
  std::vector<Candidate> all;
  for (int64_t h = 0; h < n_heads; ++h)
    for (int64_t t = guard.sinks; t < n - guard.window; ++t)
      all.push_back({scores[static_cast<std::size_t>(h)][static_cast<std::size_t>(t)], t, h});
  const int64_t least = even / kFloorDivisor, total = even * n_heads;
  const auto wanted = std::min<std::ptrdiff_t>(std::ssize(all), total * kPageTokens);
  std::nth_element(all.begin(), all.begin() + wanted, all.end(), [](const Candidate& a, const Candidate& b) {
    if (a.score != b.score) return a.score > b.score;
    return a.token != b.token ? a.token > b.token : a.head < b.head;
  });
  std::vector<int64_t> tokens(scores.size(), 0);
  for (auto it = all.begin(); it != all.begin() + wanted; ++it) ++tokens[static_cast<std::size_t>(it->head)];

  // Whole pages, then one by one to the head that lacks most of its tokens.
  int64_t left = total;
  for (std::size_t h = 0; h < pages.size(); ++h) {
    pages[h] = std::clamp(tokens[h] / kPageTokens, least, most_pages);
    left -= pages[h];
  }
  const auto lacks = [&](std::size_t h) { return tokens[h] - pages[h] * kPageTokens; };
  while (left != 0) {
    std::size_t best = pages.size();
    for (std::size_t h = 0; h < pages.size(); ++h) {
      if (left > 0 ? pages[h] >= most_pages : pages[h] <= least) continue;
      if (best == pages.size() || (left > 0 ? lacks(h) > lacks(best) : lacks(h) < lacks(best))) best = h;
    }
    if (best == pages.size()) break;
    pages[best] += left > 0 ? 1 : -1;
    left += left > 0 ? -1 : 1;
  }
  return pages;
}

Expected<std::vector<Expert>> SplitHeads(std::span<const std::vector<float>> scores, const Expert& expert,
                                         const Protected& guard, int64_t head_size, int64_t score_bytes) {
  const auto n = scores.empty() ? 0 : static_cast<int64_t>(scores[0].size());
  std::vector<int64_t> pages = SplitPages(scores, expert.keep, guard);
  const KvShape shape{1, head_size};
  MOEND_ASSIGN(const int64_t each, LayerBytes(shape, expert, guard, n, score_bytes));
  for (;;) {
    std::vector<Expert> experts(scores.size(), expert);
    int64_t bytes = 0;
    for (std::size_t h = 0; h < experts.size(); ++h) {
      const int64_t tokens = guard.sinks + guard.window + pages[h] * kPageTokens;
      experts[h].keep = std::min(expert.keep < 1 ? kMostOfAHead : 1.0,
                                 static_cast<double>(tokens) / static_cast<double>(std::max<int64_t>(n, 1)));
      MOEND_ASSIGN(const int64_t b, LayerBytes(shape, experts[h], guard, n, score_bytes));
      bytes += b;
    }
    const auto largest = std::max_element(pages.begin(), pages.end());
    if (bytes <= each * std::ssize(scores) || *largest == 0) return experts;
    --*largest;  // page tables come in steps, which an uneven split may take one more of
  }
}

}  // namespace moend
