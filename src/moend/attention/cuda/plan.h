// Who works on what: cuts the streams of a layer into items of about equal bytes, one bin of items a block of
// the kernel. Plain C++, no CUDA. Made anew when a stream gets or loses pages; work.h says what the parts
// are.
#pragma once

#include <span>
#include <vector>

#include "moend/attention/cuda/work.h"
#include "moend/base/error.h"
#include "moend/plan/layout.h"

namespace moend::cuda {

struct WorkPlan {
  std::vector<Item> items;
  std::vector<int32_t> bins;  // [blocks + 1]
  std::vector<Output> outputs;
  int64_t n_slots = 0;
  int32_t slot_rows = 0;       // most rows of an item
  int64_t partial_floats = 0;  // what Batch::partial needs
};

// Width and offsets of a layout's pages; everything else as by default. Offsets that a layout lacks are 0.
Stream StreamOf(const PageLayout& layout);

// The id of the page at `offset` bytes behind the pool's base. kInvalidArgument where a page cannot lie.
Expected<uint32_t> PageId(int64_t offset);

// `streams` need their counts (n_pages, n_raw, first_raw, rows, group, own) and page format; pointers are
// not looked at. `blocks`: those that the device runs at once (KernelInfo). `rows`: most rows of an item. A
// stream that holds nothing gets an item, for its output must become zeros. kInvalidArgument for counts that
// no stream can have.
Expected<WorkPlan> MakeWorkPlan(std::span<const Stream> streams, int64_t head_size, int64_t blocks,
                                int64_t rows);

}  // namespace moend::cuda
