#include "moend/attention/cuda/plan.h"

#include <algorithm>

#include "moend/base/ledger.h"

namespace moend::cuda {
namespace {

constexpr int64_t kMaxPages = int64_t{1} << 30, kMaxRaw = int64_t{1} << 24, kMaxRows = 4096;

// Beyond its bytes a page costs what does not shrink with its bits: softmax, the products of scales.
constexpr int64_t kUnitCost = 2048;

struct Cost {
  int64_t page = 0, raw = 0;     // of a page, of kRawUnitTokens raw tokens
  int64_t pages = 0, units = 0;  // pages, pages and raw units
  int64_t first_raw = 0;         // token of the first of these units
  int64_t total() const { return pages * page + (units - pages) * raw; }
};

Expected<Cost> CostOf(const Stream& s, int64_t head_size) {
  if (s.n_pages < 0 || s.n_pages > kMaxPages)
    return Fail(ErrorCode::kInvalidArgument, "a stream of {} pages; 0 to {} are possible", s.n_pages,
                kMaxPages);
  if (s.n_raw < 0 || s.n_raw > kMaxRaw)
    return Fail(ErrorCode::kInvalidArgument, "a stream of {} raw tokens; 0 to {} are possible", s.n_raw,
                kMaxRaw);
  if (s.rows < 1 || s.rows > kMaxRows || s.group < 1)
    return Fail(ErrorCode::kInvalidArgument, "{} query rows in groups of {}; 1 to {} rows are possible",
                s.rows, s.group, kMaxRows);
  if (s.own < 0 || s.own > s.n_raw)
    return Fail(ErrorCode::kInvalidArgument, "{} raw tokens of the queries' own, of {} in all", s.own,
                s.n_raw);
  if (s.first_raw != kNoWindow && s.n_pages > 0)
    return Fail(ErrorCode::kInvalidArgument,
                "a stream of {} pages is seen through a window; only raw tokens are", s.n_pages);
  MOEND_ASSIGN(const PageLayout layout, MakePageLayout(head_size, s.k_bits, s.v_bits));
  Cost cost;
  cost.page = layout.bytes + kUnitCost;
  cost.raw = head_size * kRawUnitTokens * 4 + kUnitCost;
  cost.pages = s.n_pages;
  cost.first_raw = std::clamp<int64_t>(s.first_raw, 0, s.n_raw) / kRawUnitTokens * kRawUnitTokens;
  cost.units = cost.pages + RoundUp(s.n_raw - cost.first_raw, kRawUnitTokens) / kRawUnitTokens;
  return cost;
}

// Units before which `bytes` of a stream lie.
int64_t UnitsWithin(const Cost& cost, int64_t bytes) {
  const int64_t page_bytes = cost.pages * cost.page;
  if (bytes < page_bytes) return (bytes + cost.page / 2) / cost.page;
  return std::min(cost.units, cost.pages + (bytes - page_bytes + cost.raw / 2) / cost.raw);
}

}  // namespace

Stream StreamOf(const PageLayout& layout) {
  const auto offset = [](int64_t at) { return static_cast<int32_t>(std::max<int64_t>(at, 0)); };
  Stream s;
  s.k_bits = layout.k_bits;
  s.v_bits = layout.v_bits;
  s.k_min = offset(layout.k_min);
  s.v_scale = offset(layout.v_scale);
  s.v_min = offset(layout.v_min);
  s.k_codes = offset(layout.k_codes);
  s.v_codes = offset(layout.v_codes);
  return s;
}

Expected<uint32_t> PageId(int64_t offset) {
  if (offset < 0 || offset % kPageUnit != 0 || offset / kPageUnit > int64_t{UINT32_MAX})
    return Fail(ErrorCode::kInvalidArgument,
                "a page cannot lie at byte {} of a pool; it must be a multiple of {} below {}", offset,
                kPageUnit, (int64_t{UINT32_MAX} + 1) * kPageUnit);
  return static_cast<uint32_t>(offset / kPageUnit);
}

Expected<WorkPlan> MakeWorkPlan(std::span<const Stream> streams, int64_t head_size, int64_t blocks,
                                int64_t rows) {
  if (blocks < 1 || blocks > (1 << 20) || rows < 1)
    return Fail(ErrorCode::kInvalidArgument, "{} blocks of {} rows cannot share work", blocks, rows);
  std::vector<Cost> costs;
  int64_t total = 0, units = 0;
  for (const Stream& s : streams) {
    MOEND_ASSIGN(const Cost cost, CostOf(s, head_size));
    costs.push_back(cost);
    const int64_t parts = RoundUp(s.rows, rows) / rows;
    total += parts * cost.total();
    units += parts * std::max<int64_t>(cost.units, 1);
  }
  WorkPlan plan;
  const int64_t n_bins = std::max<int64_t>(1, std::min(blocks, units));
  std::vector<int32_t> bin_of;
  int64_t before = 0;  // cost of what has been cut already
  // Where a bin ends, in steps that do not overflow.
  const auto end_of = [&](int64_t bin) {
    return total / n_bins * (bin + 1) + total % n_bins * (bin + 1) / n_bins;
  };
  int64_t bin = 0;
  for (size_t i = 0; i < streams.size(); ++i) {
    const Stream& s = streams[i];
    const Cost& cost = costs[i];
    for (int64_t row = 0; row < s.rows; row += rows) {
      const auto row_count = static_cast<int32_t>(std::min<int64_t>(rows, s.rows - row));
      plan.slot_rows = std::max(plan.slot_rows, row_count);
      Output output{plan.n_slots, 0};
      int64_t done = 0;
      do {
        while (bin + 1 < n_bins && end_of(bin) <= before) ++bin;
        int64_t upto = bin + 1 < n_bins ? UnitsWithin(cost, end_of(bin) - before) : cost.units;
        // What is left of a bin may be less than half a unit.
        if (upto <= done && cost.units > done) {
          if (bin + 1 < n_bins) {
            ++bin;
            continue;
          }
          upto = cost.units;
        }
        upto = std::min(upto, cost.units);
        Item item;
        item.stream = static_cast<int32_t>(i);
        item.output = static_cast<int32_t>(plan.outputs.size());
        const auto raw_at = [&](int64_t units_done) {
          const int64_t raw = std::max<int64_t>(units_done - cost.pages, 0) * kRawUnitTokens;
          return static_cast<int32_t>(std::min(s.n_raw, cost.first_raw + raw));
        };
        item.page_begin = static_cast<int32_t>(std::min(done, cost.pages));
        item.page_end = static_cast<int32_t>(std::min(upto, cost.pages));
        item.raw_begin = raw_at(done);
        item.raw_end = raw_at(upto);
        item.slot = plan.n_slots++;
        item.row_begin = static_cast<int32_t>(row);
        item.row_count = row_count;
        plan.items.push_back(item);
        bin_of.push_back(static_cast<int32_t>(bin));
        ++output.n_slots;
        done = upto;
        if (done < cost.units && bin + 1 < n_bins) ++bin;
      } while (done < cost.units);
      before += cost.total();
      plan.outputs.push_back(output);
    }
  }
  plan.bins.assign(static_cast<size_t>(n_bins) + 1, 0);
  for (const int32_t b : bin_of) ++plan.bins[static_cast<size_t>(b) + 1];
  for (size_t b = 1; b < plan.bins.size(); ++b) plan.bins[b] += plan.bins[b - 1];
  plan.partial_floats = plan.n_slots * PartialFloats(plan.slot_rows, head_size);
  return plan;
}

}  // namespace moend::cuda
