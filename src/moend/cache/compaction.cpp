#include "moend/cache/compaction.h"

#include <algorithm>
#include <array>
#include <bit>

#include "moend/cache/codec.h"
#include "moend/cache/value_transfer.h"

namespace moend {
namespace {

struct Run {
  std::size_t first = 0, size = 0;
};

// The shortest run of pages with at least kPageTokens dead slots; size 0 if there is none.
Run ShortestRun(const std::vector<PlannedPage>& pages) {
  Run best;
  int64_t dead = 0;
  std::size_t first = 0;
  for (std::size_t last = 0; last < pages.size(); ++last) {
    dead += kPageTokens - pages[last].tokens;
    while (dead - (kPageTokens - pages[first].tokens) >= kPageTokens)
      dead -= kPageTokens - pages[first++].tokens;
    const std::size_t size = last - first + 1;
    if (dead >= kPageTokens && (best.size == 0 || size < best.size)) best = {first, size};
  }
  return best;
}

// Goes through a plan: v.Keep(page) for an old page that stays; else v.Take(page, slot, i) for the i-th token
// of a page that is packed anew, v.Close(page) when nothing of an old page is needed any more, v.Emit(n) when
// the n tokens are complete.
template <class Visitor>
void Walk(const std::vector<PlannedPage>& plan, std::span<const uint64_t> live, Visitor& v) {
  std::size_t page = 0;
  uint64_t left = live.empty() ? 0 : live[0];
  const auto close = [&] {
    v.Close(page);
    if (++page < live.size()) left = live[page];
  };
  for (const PlannedPage& planned : plan) {
    if (planned.source >= 0) {
      while (page < static_cast<std::size_t>(planned.source)) close();
      v.Keep(page);
      if (++page < live.size()) left = live[page];
      continue;
    }
    for (int64_t i = 0; i < planned.tokens; ++i) {
      while (left == 0) close();
      v.Take(page, std::countr_zero(left), i);
      left &= left - 1;
    }
    if (left == 0) close();
    v.Emit(planned.tokens);
  }
  while (page < live.size()) close();
}

// How many pages must be there beforehand. A page packed anew goes to the memory of an old one that is
// closed, unless others share it; without sharing there always is one, for no old page holds more than a new
// one.
struct CountFresh {
  const std::vector<char>& shared;
  int64_t recycled = 0, fresh = 0;
  void Keep(std::size_t) {}
  void Take(std::size_t, int64_t, int64_t) {}
  void Close(std::size_t page) { recycled += !shared[page]; }
  void Emit(int64_t) {
    if (recycled > 0)
      --recycled;
    else
      ++fresh;
  }
};

// Builds the new content of the table.
struct Rebuild {
  const PageLayout& layout;
  std::vector<PageRef> old;        // references that the table gave away
  std::span<const uint64_t> live;  // of the old pages
  const std::vector<float>& old_scores;
  const std::vector<char>& shared;
  std::vector<PageRef> spare;  // pages to write to
  Buffer<float> from, to;      // K, [head_size][64]
  ValueTransfer values;
  PageTable& table;
  std::size_t open = SIZE_MAX;  // old page that `from` holds
  std::array<float, kPageTokens> scores = {};

  void Push(PageRef page, uint64_t mask, const float* slots) {
    table.Push(std::move(page), mask);
    if (float* out = table.scores()) std::copy_n(slots, kPageTokens, out + (table.size() - 1) * kPageTokens);
  }
  void Keep(std::size_t page) {
    Push(std::move(old[page]), live[page],
         old_scores.empty() ? scores.data() : old_scores.data() + page * kPageTokens);
  }
  void Take(std::size_t page, int64_t slot, int64_t i) {
    const int64_t hs = layout.head_size;
    if (open != page) {
      UnpackKeys(layout, old[page].data(), from.data());
      values.Open(old[page].data());
      open = page;
    }
    for (int64_t c = 0; c < hs; ++c) to[c * kPageTokens + i] = from[c * kPageTokens + slot];
    values.Move(slot, i);
    if (!old_scores.empty()) scores[i] = old_scores[page * kPageTokens + slot];
  }
  void Close(std::size_t page) {
    PageRef done = std::move(old[page]);
    if (!shared[page]) spare.push_back(std::move(done));  // within its reserved size
  }
  void Emit(int64_t n) {
    PageRef page = std::move(spare.back());
    spare.pop_back();
    PackKeys(layout, to.data(), FirstSlots(n), page.data());
    values.Flush(page.data());
    Restamp(layout, page.data());
    std::fill(scores.begin() + n, scores.end(), 0.0f);
    Push(std::move(page), FirstSlots(n), scores.data());
  }
};

}  // namespace

std::vector<PlannedPage> PlanCompaction(std::span<const int> live_counts) {
  std::vector<PlannedPage> pages;
  for (std::size_t i = 0; i < live_counts.size(); ++i)
    if (live_counts[i] > 0) pages.push_back({live_counts[i], static_cast<int64_t>(i)});
  for (Run run = ShortestRun(pages); run.size > 0; run = ShortestRun(pages)) {
    int64_t tokens = 0;
    for (std::size_t i = run.first; i < run.first + run.size; ++i) tokens += pages[i].tokens;
    for (std::size_t i = run.first; i + 1 < run.first + run.size; ++i) {
      pages[i] = {std::min(tokens, kPageTokens), -1};
      tokens -= pages[i].tokens;
    }
    pages.erase(pages.begin() + static_cast<std::ptrdiff_t>(run.first + run.size - 1));
  }
  return pages;
}

Expected<void> Compact(PageTable& table, std::span<const uint64_t> live) {
  const auto n = static_cast<std::size_t>(table.size());
  std::vector<int> counts(n);
  for (std::size_t i = 0; i < n; ++i) counts[i] = std::popcount(live[i]);
  const std::vector<PlannedPage> plan = PlanCompaction(counts);
  if (plan.size() == n) {
    std::copy_n(live.data(), n, table.live());
    return {};
  }

  // First everything that can fail.
  const PageLayout& layout = table.layout();
  std::vector<char> shared(n);
  for (std::size_t i = 0; i < n; ++i) shared[i] = IsShared(layout, table.pages()[i]);
  CountFresh count{shared};
  Walk(plan, live, count);
  std::vector<float> old_scores;
  if (table.scores()) old_scores.assign(table.scores(), table.scores() + table.size() * kPageTokens);
  MOEND_ASSIGN(auto from, Buffer<float>::Create(nullptr, layout.head_size * kPageTokens));
  MOEND_ASSIGN(auto to, Buffer<float>::Create(nullptr, layout.head_size * kPageTokens));
  std::fill_n(to.data(), to.size(), 0.0f);
  MOEND_ASSIGN(auto values, ValueTransfer::Create(layout));
  Rebuild rebuild{layout, {}, live, old_scores, shared, {}, std::move(from), std::move(to), std::move(values),
                  table};
  rebuild.old.reserve(n);
  rebuild.spare.reserve(n + static_cast<std::size_t>(count.fresh));
  for (int64_t i = 0; i < count.fresh; ++i) {
    MOEND_ASSIGN(auto page, PageRef::Create(table.ledger(), layout));
    rebuild.spare.push_back(std::move(page));
  }

  for (std::size_t i = 0; i < n; ++i)
    rebuild.old.push_back(PageRef::Adopt(table.ledger(), layout, table.pages()[i]));
  table.Truncate(0);
  Walk(plan, live, rebuild);
  return {};
}

}  // namespace moend
