// Gets rid of dead slots: runs of neighbouring pages whose dead slots add up to a page are re-packed into
// fewer pages, all others stay as they are.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "moend/base/error.h"
#include "moend/cache/page_table.h"

namespace moend {

// One page after compaction: an old page as it was, or tokens packed anew from the run of old pages that held
// them.
struct PlannedPage {
  int64_t tokens = 0;
  int64_t source = -1;  // old page, -1: packed anew
};

// live_counts: live slots of each page. The result holds the same tokens in the same order with fewer than 64
// dead slots in all. As long as there are 64, the shortest run that has them (the first of these) loses a
// page, so that few tokens are quantized again, and none of them twice.
std::vector<PlannedPage> PlanCompaction(std::span<const int> live_counts);

// Gives the table's pages the masks `live` (subsets of the present ones) and compacts. Pages of this table
// alone are re-packed in place; pages that other tables share are left to them. On an error nothing has
// changed. May throw std::bad_alloc, likewise.
Expected<void> Compact(PageTable& table, std::span<const uint64_t> live);

}  // namespace moend
