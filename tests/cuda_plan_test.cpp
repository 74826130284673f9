#include "moend/attention/cuda/plan.h"

#include <gtest/gtest.h>

#include <random>

namespace moend::cuda {
namespace {

Stream StreamWith(int64_t head, int k_bits, int v_bits, int64_t pages, int64_t raw, int32_t rows = 4) {
  Stream s = StreamOf(MakePageLayout(head, k_bits, v_bits).value());
  s.n_pages = pages;
  s.n_raw = raw;
  s.rows = rows;
  s.group = rows;
  return s;
}

// Every page that is seen and every raw token of every row in exactly one item, in order, and all the tables
// consistent with each other.
void CheckPlan(const WorkPlan& plan, const std::vector<Stream>& streams, int64_t head, int64_t blocks,
               int64_t rows) {
  ASSERT_GE(plan.bins.size(), 2u);
  ASSERT_LE(plan.bins.size(), static_cast<size_t>(blocks) + 1);
  ASSERT_EQ(plan.bins.front(), 0);
  ASSERT_EQ(plan.bins.back(), static_cast<int32_t>(plan.items.size()));
  for (size_t b = 1; b < plan.bins.size(); ++b) ASSERT_LE(plan.bins[b - 1], plan.bins[b]);
  ASSERT_EQ(plan.n_slots, static_cast<int64_t>(plan.items.size()));
  ASSERT_EQ(plan.partial_floats, plan.n_slots * PartialFloats(plan.slot_rows, head));
  size_t at = 0, output = 0;
  for (size_t i = 0; i < streams.size(); ++i) {
    const Stream& s = streams[i];
    for (int32_t row = 0; row < s.rows; row += static_cast<int32_t>(rows), ++output) {
      ASSERT_LT(output, plan.outputs.size());
      ASSERT_EQ(plan.outputs[output].slot, static_cast<int64_t>(at));
      ASSERT_GE(plan.outputs[output].n_slots, 1);
      int64_t page = 0, raw = std::clamp<int64_t>(s.first_raw, 0, s.n_raw) / kRawUnitTokens * kRawUnitTokens;
      for (int64_t k = 0; k < plan.outputs[output].n_slots; ++k, ++at) {
        const Item& item = plan.items.at(at);
        ASSERT_EQ(item.stream, static_cast<int32_t>(i));
        ASSERT_EQ(item.output, static_cast<int32_t>(output));
        ASSERT_EQ(item.slot, static_cast<int64_t>(at));
        ASSERT_EQ(item.row_begin, row);
        ASSERT_EQ(item.row_count, std::min<int64_t>(rows, s.rows - row));
        ASSERT_LE(item.row_count, plan.slot_rows);
        ASSERT_EQ(item.page_begin, page);
        ASSERT_GE(item.page_end, page);
        ASSERT_EQ(item.raw_begin, raw);
        ASSERT_GE(item.raw_end, raw);
        if (item.raw_end > item.raw_begin) {
          ASSERT_EQ(item.raw_begin % kRawUnitTokens, 0);
        }
        page = item.page_end;
        raw = item.raw_end;
      }
      ASSERT_EQ(page, s.n_pages);
      ASSERT_EQ(raw, s.n_raw);
    }
  }
  ASSERT_EQ(at, plan.items.size());
  ASSERT_EQ(output, plan.outputs.size());
}

int64_t BytesOf(const WorkPlan& plan, const std::vector<Stream>& streams, int64_t head, size_t bin) {
  int64_t bytes = 0;
  for (int32_t i = plan.bins[bin]; i < plan.bins[bin + 1]; ++i) {
    const Item& item = plan.items[static_cast<size_t>(i)];
    const Stream& s = streams[static_cast<size_t>(item.stream)];
    bytes += int64_t{item.page_end - item.page_begin} * MakePageLayout(head, s.k_bits, s.v_bits)->bytes;
    bytes += int64_t{item.raw_end - item.raw_begin} * head * 4;
  }
  return bytes;
}

TEST(CudaPlan, CoversEverythingOnce) {
  std::mt19937 random(1);
  for (int round = 0; round < 300; ++round) {
    const int64_t head = 16 * static_cast<int64_t>(1 + random() % 16);
    std::vector<Stream> streams;
    for (size_t n = random() % 12; n-- > 0;) {
      streams.push_back(StreamWith(head, kBitWidths[random() % 5], kBitWidths[random() % 5],
                                   random() % 3 ? random() % 200 : random() % 2,
                                   random() % 2 ? random() % 300 : 0,
                                   static_cast<int32_t>(1 + random() % 200)));
      if (random() % 4 == 0) {
        streams.back().n_pages = 0;
        streams.back().first_raw = static_cast<int32_t>(random() % 400) - 100;
      }
    }
    const int64_t blocks = 1 + static_cast<int64_t>(random() % 300),
                  rows = 1 + static_cast<int64_t>(random() % 128);
    const auto plan = MakeWorkPlan(streams, head, blocks, rows);
    ASSERT_TRUE(plan) << plan.error().message;
    CheckPlan(*plan, streams, head, blocks, rows);
  }
}

TEST(CudaPlan, BalancesBytesOverStreamsOfAnyLength) {
  std::mt19937 random(2);
  std::vector<Stream> streams;
  for (int i = 0; i < 64; ++i)
    streams.push_back(StreamWith(128, i % 2 ? 4 : 8, i % 3 ? 4 : 2, 1 + random() % 2000, 48));
  const auto plan = MakeWorkPlan(streams, 128, 264, 64);
  ASSERT_TRUE(plan);
  CheckPlan(*plan, streams, 128, 264, 64);
  ASSERT_EQ(plan->bins.size(), 265u);
  int64_t total = 0, most = 0;
  for (size_t b = 0; b < 264; ++b) {
    const int64_t bytes = BytesOf(*plan, streams, 128, b);
    total += bytes;
    most = std::max(most, bytes);
  }
  EXPECT_LE(static_cast<double>(most), 1.1 * static_cast<double>(total) / 264);
  // One cut a block at most, beyond the streams' own ends.
  EXPECT_LE(plan->items.size(), 64u + 263u);
}

TEST(CudaPlan, EmptyStreamsGetAnItem) {
  const std::vector<Stream> streams = {StreamWith(64, 4, 4, 0, 0), StreamWith(64, 4, 4, 3, 0),
                                       StreamWith(64, 16, 16, 0, 0)};
  const auto plan = MakeWorkPlan(streams, 64, 100, 8);
  ASSERT_TRUE(plan);
  CheckPlan(*plan, streams, 64, 100, 8);
  EXPECT_EQ(plan->outputs[0].n_slots, 1);
  EXPECT_EQ(plan->outputs[2].n_slots, 1);
  const auto none = MakeWorkPlan({}, 64, 100, 8);
  ASSERT_TRUE(none);
  EXPECT_EQ(none->items.size(), 0u);
  EXPECT_EQ(none->bins, (std::vector<int32_t>{0, 0}));
}

TEST(CudaPlan, CountsIn64Bits) {
  const std::vector<Stream> streams = {StreamWith(256, 16, 16, int64_t{1} << 30, 0),
                                       StreamWith(256, 2, 2, int64_t{3} << 28, 0)};
  const auto plan = MakeWorkPlan(streams, 256, 528, 64);
  ASSERT_TRUE(plan);
  CheckPlan(*plan, streams, 256, 528, 64);
  EXPECT_GT(BytesOf(*plan, streams, 256, 0), int64_t{1} << 32);
}

TEST(CudaPlan, RefusesWhatNoStreamCanHave) {
  const auto code = [](Stream s, int64_t head = 128, int64_t blocks = 8, int64_t rows = 8) {
    const auto plan = MakeWorkPlan(std::vector<Stream>{s}, head, blocks, rows);
    return plan ? ErrorCode::kInternal : plan.error().code;
  };
  const Stream good = StreamWith(128, 4, 4, 3, 3);
  EXPECT_TRUE(MakeWorkPlan(std::vector<Stream>{good}, 128, 8, 8));
  for (auto change : std::initializer_list<void (*)(Stream&)>{
           [](Stream& s) { s.n_pages = -1; }, [](Stream& s) { s.n_pages = int64_t{1} << 40; },
           [](Stream& s) { s.n_raw = -1; }, [](Stream& s) { s.n_raw = int64_t{1} << 40; },
           [](Stream& s) { s.rows = 0; }, [](Stream& s) { s.rows = 1 << 20; }, [](Stream& s) { s.group = 0; },
           [](Stream& s) { s.own = 4; }, [](Stream& s) { s.first_raw = 0; }, [](Stream& s) { s.own = -1; },
           [](Stream& s) { s.k_bits = 5; }}) {
    Stream s = good;
    change(s);
    EXPECT_EQ(code(s), ErrorCode::kInvalidArgument);
  }
  EXPECT_EQ(code(good, 72), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code(good, 128, 0), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code(good, 128, 8, 0), ErrorCode::kInvalidArgument);
}

TEST(CudaPlan, PageIds) {
  EXPECT_EQ(PageId(0).value(), 0u);
  EXPECT_EQ(PageId(64 * int64_t{UINT32_MAX}).value(), UINT32_MAX);
  EXPECT_EQ(PageId(64 * (int64_t{UINT32_MAX} + 1)).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(PageId(-64).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(PageId(32).error().code, ErrorCode::kInvalidArgument);
}

TEST(CudaPlan, StreamsHaveTheLayoutsOffsets) {
  for (int k_bits : kBitWidths)
    for (int v_bits : kBitWidths) {
      const PageLayout layout = MakePageLayout(80, k_bits, v_bits).value();
      const Stream s = StreamOf(layout);
      EXPECT_EQ(s.k_bits, k_bits);
      EXPECT_EQ(s.v_bits, v_bits);
      EXPECT_EQ(s.k_codes, layout.k_codes);
      EXPECT_EQ(s.v_codes, layout.v_codes);
      EXPECT_EQ(s.k_min, std::max<int64_t>(layout.k_min, 0));
      EXPECT_EQ(s.v_scale, std::max<int64_t>(layout.v_scale, 0));
      EXPECT_EQ(s.v_min, std::max<int64_t>(layout.v_min, 0));
      EXPECT_EQ(layout.bytes % kPageUnit, 0);
    }
}

}  // namespace
}  // namespace moend::cuda
