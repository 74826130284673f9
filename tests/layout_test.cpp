#include "moend/plan/layout.h"

#include <gtest/gtest.h>

#include <random>
#include <utility>
#include <vector>

#include "moend/base/ledger.h"

namespace moend {
namespace {

TEST(PageLayout, PartsAreOnCacheLinesInOrderAndDoNotOverlap) {
  for (int64_t hs = 16; hs <= 256; hs += 16) {
    for (int k_bits : kBitWidths) {
      for (int v_bits : kBitWidths) {
        const auto made = MakePageLayout(hs, k_bits, v_bits);
        ASSERT_TRUE(made) << made.error().message;
        const PageLayout& l = *made;
        EXPECT_EQ(l.head_size, hs);
        EXPECT_EQ(l.k_bits, k_bits);
        EXPECT_EQ(l.v_bits, v_bits);
        EXPECT_EQ(hs % l.v_groups, 0);
        EXPECT_EQ(hs / l.v_groups, hs % 64 == 0 ? 64 : hs);
        std::vector<std::pair<int64_t, int64_t>> parts;  // offset, bytes; in order
        if (k_bits != 16) {
          parts.emplace_back(l.k_scale, hs * 2);
          parts.emplace_back(l.k_min, hs * 2);
        } else {
          EXPECT_EQ(l.k_scale, -1);
          EXPECT_EQ(l.k_min, -1);
        }
        if (v_bits != 16) {
          parts.emplace_back(l.v_scale, l.v_groups * 128);
          parts.emplace_back(l.v_min, l.v_groups * 128);
        } else {
          EXPECT_EQ(l.v_scale, -1);
          EXPECT_EQ(l.v_min, -1);
        }
        parts.emplace_back(l.k_codes, hs * 8 * k_bits);
        parts.emplace_back(l.v_codes, hs * 8 * v_bits);
        parts.emplace_back(l.refs, 4);
        int64_t end = 0;
        for (const auto& [offset, bytes] : parts) {
          EXPECT_EQ(offset, RoundUp(end, kCacheLine));
          end = offset + bytes;
        }
        EXPECT_EQ(l.bytes, RoundUp(end, kCacheLine));
      }
    }
  }
}

TEST(PageLayout, RefusesWhatNoKernelReads) {
  for (int64_t hs : {-16, 0, 8, 17, 72, 272, 1 << 20})
    EXPECT_EQ(MakePageLayout(hs, 4, 4).error().code, ErrorCode::kInvalidArgument) << hs;
  for (int bits : {-1, 0, 1, 5, 6, 7, 9, 15, 17, 32}) {
    EXPECT_FALSE(MakePageLayout(64, bits, 4)) << bits;
    EXPECT_FALSE(MakePageLayout(64, 4, bits)) << bits;
  }
}

TEST(KeptTokens, KeepsEverythingAtOne) {
  for (int64_t n : {0, 1, 31, 32, 33, 95, 96, 97, 1000, 16384}) EXPECT_EQ(KeptTokens(1.0, Protected{}, n), n);
  EXPECT_EQ(KeptPages(1.0, Protected{}, 32), 0);
  EXPECT_EQ(KeptPages(1.0, Protected{}, 33), 1);
  EXPECT_EQ(KeptPages(1.0, Protected{}, 96), 1);
  EXPECT_EQ(KeptPages(1.0, Protected{}, 97), 2);
  EXPECT_EQ(KeptPages(1.0, Protected{}, 16384), 256);
}

TEST(KeptTokens, NeverGoesBelowTheProtectedOnes) {
  const Protected guard{.sinks = 4, .window = 28};
  for (int64_t n = 0; n <= 32; ++n) EXPECT_EQ(KeptTokens(0.01, guard, n), n);
  EXPECT_EQ(KeptTokens(0.01, guard, 33), 32);
  EXPECT_EQ(KeptTokens(0.25, guard, 131), 32);
  EXPECT_EQ(KeptPages(0.25, guard, 131), 0);
}

TEST(KeptTokens, PagesThatArePaidForAreFilled) {
  const Protected guard{.sinks = 4, .window = 28};
  EXPECT_EQ(KeptTokens(0.25, guard, 132), 32 + 64);
  EXPECT_EQ(KeptTokens(0.25, guard, 1000), 32 + 4 * 64);  // 250 - 32 are 3.4 pages
  EXPECT_EQ(KeptPages(0.25, guard, 1000), 4);
  EXPECT_EQ(KeptTokens(0.95, guard, 100), 32 + 64);
  EXPECT_EQ(KeptTokens(0.95, guard, 90), 90) << "as many as there are";
  EXPECT_EQ(KeptPages(0.95, guard, 90), 1);
}

TEST(KeptTokens, RatiosThatBinaryCannotWriteAreExact) {
  EXPECT_EQ(ShareOf(0.29, 100), 29);
  EXPECT_EQ(ShareOf(0.7, 10), 7);
  EXPECT_EQ(ShareOf(0.1, 30), 3);
  EXPECT_EQ(ShareOf(0.3, 9), 2);
  EXPECT_EQ(KeptPages(0.29, Protected{0, 0}, 6400), 29);
}

TEST(KeptTokens, GrowsWithTokensAndWithKeep) {
  std::mt19937_64 random(1);
  for (int round = 0; round < 20000; ++round) {
    const Protected guard{.sinks = static_cast<int64_t>(random() % 20),
                          .window = static_cast<int64_t>(random() % 200)};
    const double keep = static_cast<double>(random() % 1000 + 1) / 1000;
    const int64_t n = static_cast<int64_t>(random() % 5000);
    const int64_t kept = KeptTokens(keep, guard, n);
    EXPECT_LE(kept, n);
    EXPECT_GE(kept, std::min(n, guard.sinks + guard.window));
    EXPECT_LT(static_cast<double>(kept), std::max(keep * static_cast<double>(n) + 1e-6 + kPageTokens,
                                                  static_cast<double>(guard.sinks + guard.window + 1)));
    EXPECT_LE(kept, KeptTokens(keep, guard, n + 1));
    EXPECT_LE(kept, KeptTokens(std::min(1.0, keep + 0.05), guard, n));
    EXPECT_GE(KeptPages(keep, guard, n) * kPageTokens, kept - guard.sinks - guard.window);
  }
}

TEST(LayerBytes, CountsEveryPartByHand) {
  const KvShape shape{.n_kv_heads = 2, .head_size = 64};
  const Expert expert{.keep = 0.5, .k_bits = 4, .v_bits = 2};
  // 1000 tokens: 500 stay, 468 unprotected, 8 pages; 48 raw.
  const int64_t page = 128 + 128 + 128 + 128 + 64 * 32 + 64 * 16 + 64;
  const int64_t head = 8 * page + 8 * 16 + 128 + 48 * 64 * 4;
  EXPECT_EQ(*LayerBytes(shape, expert, Protected{}, 1000, 0), 2 * head);
  EXPECT_EQ(*LayerBytes(shape, expert, Protected{}, 1000, 4), 2 * (head + 8 * 64 * 4));
  EXPECT_EQ(FullLayerBytes(shape, 1000), 1000 * 2 * 64 * 4);
}

TEST(LayerBytes, NothingSeenIsNothingAllocated) {
  EXPECT_EQ(*LayerBytes({2, 64}, {1.0, 16, 16}, {}, 0, 4), 0);
  EXPECT_EQ(*LayerBytes({1, 64}, {1.0, 16, 16}, {}, 1, 0), 64 * 4);
}

TEST(LayerBytes, GrowsWithTokensKeepAndBits) {
  std::mt19937_64 random(2);
  const KvShape shape{.n_kv_heads = 3, .head_size = 80};
  for (int round = 0; round < 5000; ++round) {
    const double keep = static_cast<double>(random() % 100 + 1) / 100;
    const int64_t n = static_cast<int64_t>(random() % 20000);
    for (int i = 0; i + 1 < static_cast<int>(kBitWidths.size()); ++i) {
      const Expert wide{keep, kBitWidths[i], kBitWidths[i]};
      const Expert narrow{keep, kBitWidths[i + 1], kBitWidths[i + 1]};
      EXPECT_GE(*LayerBytes(shape, wide, {}, n, 0), *LayerBytes(shape, narrow, {}, n, 0));
      EXPECT_GE(*LayerBytes(shape, wide, {}, n + 1, 0), *LayerBytes(shape, wide, {}, n, 0));
    }
  }
}

TEST(LayerBytes, RefusesNonsense) {
  const KvShape shape{2, 64};
  const Expert expert{0.5, 4, 4};
  EXPECT_TRUE(LayerBytes(shape, expert, {}, int64_t{1} << 31, 4));
  EXPECT_FALSE(LayerBytes(shape, expert, {}, (int64_t{1} << 31) + 1, 4));
  EXPECT_FALSE(LayerBytes(shape, expert, {}, -1, 4));
  EXPECT_FALSE(LayerBytes(shape, expert, {}, 10, 2));
  EXPECT_FALSE(LayerBytes({0, 64}, expert, {}, 10, 0));
  EXPECT_FALSE(LayerBytes({int64_t{1} << 40, 64}, expert, {}, 10, 0));
  EXPECT_FALSE(LayerBytes({2, 65}, expert, {}, 10, 0));
  for (double keep : {0.0, -0.5, 1.01, std::numeric_limits<double>::quiet_NaN()})
    EXPECT_EQ(LayerBytes(shape, {keep, 4, 4}, {}, 10, 0).error().code, ErrorCode::kInvalidArgument) << keep;
  EXPECT_FALSE(LayerBytes(shape, {0.5, 5, 4}, {}, 10, 0));
  EXPECT_FALSE(LayerBytes(shape, expert, {-1, 28}, 10, 0));
  EXPECT_FALSE(LayerBytes(shape, expert, {4, -28}, 10, 0));
  EXPECT_FALSE(LayerBytes(shape, expert, {4, INT64_MAX}, 10, 0));
}

}  // namespace
}  // namespace moend
