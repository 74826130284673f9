// The kernels of attention/cuda against the scalar reference. Without a device every test is skipped.
#include "moend/attention/cuda/attention.h"

#include <gtest/gtest.h>

#ifndef MOEND_HAVE_CUDA

TEST(CudaAttention, IsNotInThisBuild) {
  EXPECT_FALSE(moend::cuda::Compiled());
  EXPECT_FALSE(moend::cuda::Available());
  EXPECT_EQ(moend::cuda::DescribeKernel(128, 4).error().code, moend::ErrorCode::kUnsupported);
  GTEST_SKIP() << "built without CUDA";
}

#else

#include <cmath>
#include <random>

#include "moend/attention/attention.h"
#include "tests/support/cuda_layer.h"
#include "tests/support/packed_context.h"

namespace moend {
namespace {

using test::CudaLayer;
using test::HostStream;
using test::LayerOptions;
using test::PackedContext;
using test::Queries;

constexpr double kTolerance = 1e-3;  // relative L2 error of a stream's rows

class CudaAttention : public testing::Test {
 protected:
  void SetUp() override {
    if (!cuda::Available()) GTEST_SKIP() << "no NVIDIA GPU of compute capability 8.0 or newer";
  }
};

HostStream MakeStream(const PackedContext& context, int32_t rows, int32_t group, double gain, uint32_t seed) {
  HostStream s;
  s.kv = context.view();
  s.rows = rows;
  s.group = group;
  s.q = Queries(rows, s.kv.layout.head_size, gain, seed);
  return s;
}

// `sinks`: of the stream's query heads, or null.
std::vector<float> Reference(const HostStream& s, float soft_cap = 0, const float* sinks = nullptr) {
  const int64_t head = s.kv.layout.head_size;
  std::vector<float> out(static_cast<size_t>(s.rows * head)), max(static_cast<size_t>(s.rows)), sum(max);
  const SoftmaxState state{out.data(), max.data(), sum.data()};
  const QueryRows q{s.q.data(), s.rows, s.group, soft_cap, s.window, s.behind, sinks};
  InitState(state, q, head);
  reference::AttendStream(s.kv, 0, s.kv.n_pages, true, q, state, nullptr);
  reference::Finish(state, s.rows, head);
  return out;
}

double RelativeError(const float* got, const std::vector<float>& want) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += (double{got[i]} - want[i]) * (double{got[i]} - want[i]);
    norm += double{want[i]} * want[i];
  }
  if (std::isnan(error)) return INFINITY;
  return norm == 0 ? std::sqrt(error) : std::sqrt(error / norm);
}

// Runs all streams in one launch, twice, and compares each with the reference. Returns the largest error.
double Check(const std::vector<HostStream>& streams, int64_t head, const std::string& what,
             const LayerOptions& options = {}) {
  CudaLayer layer(streams, head, options);
  const std::vector<float> got = layer.Run();
  EXPECT_TRUE(layer.DoneIsClear()) << what;
  EXPECT_EQ(got, layer.Run()) << what << ": a second launch gives other bits";
  double worst = 0;
  int64_t row = 0;
  for (size_t i = 0; i < streams.size(); ++i) {
    const double error = RelativeError(got.data() + row * head, Reference(streams[i]));
    EXPECT_LE(error, kTolerance) << what << ", stream " << i << ": K " << streams[i].kv.layout.k_bits << " V "
                                 << streams[i].kv.layout.v_bits << ", " << streams[i].kv.n_pages << " pages, "
                                 << streams[i].kv.n_raw << " raw, " << streams[i].rows << " rows";
    worst = std::max(worst, error);
    row += streams[i].rows;
  }
  return worst;
}

TEST_F(CudaAttention, EveryPairOfWidthsAndHeadSizeInOneLaunch) {
  double worst = 0;
  for (int64_t head : {64, 80, 96, 128, 256, 16, 48, 112, 192}) {
    std::vector<PackedContext> contexts;
    std::vector<HostStream> streams;
    for (int k_bits : kBitWidths)
      for (int v_bits : kBitWidths)
        contexts.emplace_back(head, k_bits, v_bits, 1 + static_cast<int64_t>(contexts.size()) % 4,
                              static_cast<int64_t>(contexts.size()) * 5 % 40, 0.9,
                              static_cast<uint32_t>(head + static_cast<int64_t>(contexts.size())));
    for (const PackedContext& context : contexts)
      streams.push_back(MakeStream(context, 4, 4, 2.0, static_cast<uint32_t>(streams.size())));
    worst = std::max(worst, Check(streams, head, "head size " + std::to_string(head)));
  }
  RecordProperty("largest_relative_error", std::to_string(worst));
  std::printf("largest relative error %.2g\n", worst);
}

TEST_F(CudaAttention, AnyNumberOfRows) {
  for (int64_t head : {64, 128, 256})
    for (int32_t rows : {1, 3, 7, 8, 9, 16, 17, 31, 64, 65, 128, 150}) {
      const PackedContext a(head, 4, 2, 5, 20, 0.9, 3), b(head, 16, 8, 3, 70, 1.0, 4);
      Check({MakeStream(a, rows, rows, 2.0, 5), MakeStream(b, std::max(rows / 2, 1), 1, 2.0, 6)}, head,
            "head size " + std::to_string(head) + ", rows " + std::to_string(rows));
    }
}

TEST_F(CudaAttention, Lengths) {
  for (int bits : {16, 4}) {
    std::vector<PackedContext> contexts;
    for (auto [pages, raw] : {std::pair<int64_t, int64_t>{0, 0},
                              {0, 1},
                              {0, 15},
                              {0, 16},
                              {0, 17},
                              {0, 63},
                              {0, 64},
                              {0, 65},
                              {0, 131},
                              {1, 0},
                              {1, 1},
                              {3, 0},
                              {17, 33},
                              {70, 5}})
      contexts.emplace_back(128, bits, bits, pages, raw, 1.0, 5);
    std::vector<HostStream> streams;
    for (const PackedContext& context : contexts) streams.push_back(MakeStream(context, 4, 4, 2.0, 11));
    for (int64_t blocks : {0, 1, 2, 5, 14, 1000}) {
      LayerOptions options;
      options.blocks = blocks;
      Check(streams, 128, std::to_string(blocks) + " blocks", options);
    }
  }
}

TEST_F(CudaAttention, LiveMasksOfEveryDensity) {
  std::vector<PackedContext> contexts;
  for (double share : {0.0, 0.02, 0.5, 0.98})
    for (int64_t raw : {0, 3}) contexts.emplace_back(80, 8, 2, 6, raw, share, 9);
  std::vector<HostStream> streams;
  for (const PackedContext& context : contexts) streams.push_back(MakeStream(context, 4, 2, 2.0, 13));
  Check(streams, 80, "live masks");
}

TEST_F(CudaAttention, NothingSeenGivesZeros) {
  const PackedContext empty(96, 4, 4, 0, 0, 1.0, 21), evicted(96, 4, 4, 30, 0, 0.0, 21);
  CudaLayer layer({MakeStream(empty, 3, 3, 1.0, 1), MakeStream(evicted, 20, 5, 1.0, 2)}, 96);
  for (float x : layer.Run()) ASSERT_EQ(x, 0.0f);
}

// A page without a live token may hold anything.
TEST_F(CudaAttention, DeadPagesAreNotLookedAt) {
  for (int bits : kBitWidths) {
    const PackedContext context(128, bits, bits, 40, 5, 1.0, 33);
    HostStream s = MakeStream(context, 4, 4, 2.0, 34);
    std::vector<const uint8_t*> pages(s.kv.pages, s.kv.pages + s.kv.n_pages);
    std::vector<uint64_t> live(s.kv.live, s.kv.live + s.kv.n_pages);
    const std::vector<uint8_t> nan(static_cast<size_t>(s.kv.layout.bytes), 0xFF);
    for (size_t p : {size_t{0}, size_t{1}, size_t{7}, size_t{13}, size_t{14}, size_t{15}, size_t{39}}) {
      pages[p] = nan.data();
      live[p] = 0;
    }
    s.kv.pages = pages.data();
    s.kv.live = live.data();
    for (int64_t blocks : {1, 3, 0}) {
      LayerOptions options;
      options.blocks = blocks;
      Check({s}, 128, "dead pages, " + std::to_string(bits) + " bits", options);
    }
  }
}

TEST_F(CudaAttention, RotatedKeys) {
  for (int64_t head : {64, 80, 96, 128, 256}) {
    std::mt19937 random(7);
    std::uniform_real_distribution<float> uniform(0.3f, 3.0f);
    std::vector<float> balance(static_cast<size_t>(head)), inverse(balance);
    for (size_t c = 0; c < balance.size(); ++c) inverse[c] = 1.0f / (balance[c] = uniform(random));
    const KeyRotation rotation{balance.data(), inverse.data()};
    const PackedContext a(head, 2, 2, 9, 40, 0.9, 15), b(head, 4, 16, 4, 0, 0.9, 16),
        c(head, 8, 3, 0, 30, 1.0, 17);
    std::vector<HostStream> streams = {MakeStream(a, 4, 4, 2.0, 19), MakeStream(b, 7, 7, 2.0, 20),
                                       MakeStream(c, 2, 1, 2.0, 21)};
    for (HostStream& s : streams) s.kv.rotation = &rotation;
    Check(streams, head, "rotated, head size " + std::to_string(head));
  }
}

TEST_F(CudaAttention, LargeLogitsAndOutliers) {
  std::vector<PackedContext> contexts;
  for (int bits : kBitWidths)
    for (double outlier : {1.0, 100.0}) contexts.emplace_back(128, bits, bits, 3, 20, 0.9, 17, outlier);
  for (double gain : {2.0, 50.0}) {
    std::vector<HostStream> streams;
    for (const PackedContext& context : contexts) streams.push_back(MakeStream(context, 4, 4, gain, 19));
    Check(streams, 128, "gain " + std::to_string(gain));
  }
}

TEST_F(CudaAttention, ManyContexts) {
  std::mt19937 random(3);
  std::vector<PackedContext> contexts;
  for (int i = 0; i < 160; ++i)
    contexts.emplace_back(64, kBitWidths[random() % 5], kBitWidths[random() % 5], random() % 12,
                          random() % 50, 0.8, static_cast<uint32_t>(random()));
  std::vector<HostStream> streams;
  for (const PackedContext& context : contexts)
    streams.push_back(
        MakeStream(context, static_cast<int32_t>(1 + random() % 6), 1, 2.0, static_cast<uint32_t>(random())));
  Check(streams, 64, "160 streams");
}

// A bad query must not hide behind a finite answer, nor touch its neighbours.
TEST_F(CudaAttention, NonFiniteQueriesStayInTheirRow) {
  for (int bits : {16, 8, 2})
    for (float bad : {std::nanf(""), INFINITY}) {
      const PackedContext context(64, bits, bits, 2, 10, 0.9, 23);
      HostStream s = MakeStream(context, 6, 6, 1.0, 29);
      s.q[64 * 2 + 5] = bad;
      CudaLayer layer({s}, 64);
      const auto got = layer.Run();
      for (size_t i = 0; i < got.size(); ++i)
        ASSERT_EQ(std::isnan(got[i]), i / 64 == 2) << "at " << i << " bits " << bits << " " << bad;
    }
}

TEST_F(CudaAttention, PagesAndRowsBeyondTwoToThe31Elements) {
  size_t free = 0, total = 0;
  test::CudaCheck(cudaMemGetInfo(&free, &total), "memory");
  LayerOptions options;
  options.pool_offset = (int64_t{1} << 33) + 64 * 12345;
  options.row_offset = (int64_t{1} << 31) + 16;
  if (free < (size_t{30} << 30)) GTEST_SKIP() << "wants 30 GiB of device memory";
  const PackedContext a(128, 4, 4, 9, 20, 0.9, 3), b(128, 16, 2, 9, 20, 0.9, 4);
  Check({MakeStream(a, 4, 4, 2.0, 5), MakeStream(b, 4, 4, 2.0, 6)}, 128, "far", options);
}

// Soft cap and sinks of a layer, windows of its streams, in one launch.
TEST_F(CudaAttention, WindowSoftCapAndSinks) {
  for (float soft_cap : {0.0f, 3.0f})
    for (bool with_sinks : {false, true}) {
      const PackedContext paged(128, 4, 4, 6, 37, 0.9, 31), half(128, 16, 16, 2, 5, 0.9, 32),
          raw(128, 16, 16, 0, 300, 1.0, 33), few(128, 16, 16, 0, 7, 1.0, 34), none(128, 4, 4, 0, 0, 1.0, 35);
      std::vector<HostStream> streams;
      for (const PackedContext* context : {&paged, &half, &none})
        streams.push_back(MakeStream(*context, 4, 4, 2.0, 37));
      for (const PackedContext* context : {&raw, &few})
        for (int64_t window : {1, 15, 16, 17, 64, 285, 299, 300, 1000})
          for (int64_t behind : {0, 1, 20}) {
            streams.push_back(MakeStream(*context, 20, 4, 2.0, 38));  // five tokens of four heads
            streams.back().window = window;
            streams.back().behind = behind;
          }
      LayerOptions options;
      options.soft_cap = soft_cap;
      std::mt19937 random(39);
      std::normal_distribution<float> normal;
      for (size_t i = 0; with_sinks && i < 4 * streams.size(); ++i)
        options.sinks.push_back(2 * normal(random));
      for (int64_t blocks : {0, 1, 7}) {
        options.blocks = blocks;
        CudaLayer layer(streams, 128, options);
        const std::vector<float> got = layer.Run();
        size_t at = 0;
        for (size_t i = 0; i < streams.size(); ++i) {
          const auto want =
              Reference(streams[i], soft_cap, with_sinks ? options.sinks.data() + 4 * i : nullptr);
          EXPECT_LE(RelativeError(got.data() + at, want), kTolerance)
              << "stream " << i << ", window " << streams[i].window << " behind " << streams[i].behind
              << ", cap " << soft_cap << ", sinks " << with_sinks << ", blocks " << blocks;
          at += want.size();
        }
      }
    }
}

// Several tokens of which each sees its own past: as many streams, each with the raw tokens that it sees.
TEST_F(CudaAttention, TokensSeeTheirOwnPast) {
  for (int bits : {16, 4})
    for (int32_t own : {1, 5}) {
      const PackedContext context(128, bits, bits, 6, 37, 0.9, 31);
      HostStream s = MakeStream(context, 20, 4, 2.0, 37);  // five tokens of four heads
      s.own = own;
      CudaLayer layer({s}, 128);
      const std::vector<float> got = layer.Run();
      for (int32_t token = 0; token < 5; ++token) {
        HostStream one = MakeStream(context, 4, 4, 2.0, 37);
        one.q.assign(s.q.begin() + token * 4 * 128, s.q.begin() + (token + 1) * 4 * 128);
        one.kv.n_raw = std::min<int64_t>(37, 37 - own + 1 + token);
        EXPECT_LE(RelativeError(got.data() + token * 4 * 128, Reference(one)), kTolerance)
            << bits << " bits, " << own << " own, token " << token;
      }
    }
}

TEST_F(CudaAttention, NewTokensAreStoredAndSeen) {
  for (const int64_t head : {64, 128, 80}) {
    for (const int32_t n_new : {1, 2, 17}) {
      std::vector<PackedContext> contexts;
      for (const int64_t raw : {17, 18, 33, 160})
        contexts.emplace_back(head, 4, 2, raw % 3, raw, 0.9, static_cast<uint32_t>(raw));
      std::vector<HostStream> streams;
      for (const PackedContext& context : contexts)
        streams.push_back(MakeStream(context, 4 * n_new, 4, 2.0, static_cast<uint32_t>(streams.size())));
      LayerOptions options;
      options.n_new = n_new;
      Check(streams, head, std::to_string(n_new) + " new tokens", options);
      CudaLayer layer(streams, head, options);
      layer.Run();
      EXPECT_EQ(layer.Copied(), layer.new_k());
    }
  }
}

TEST_F(CudaAttention, SaysWhatIsWrong) {
  EXPECT_EQ(cuda::DescribeKernel(72, 4).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(cuda::DescribeKernel(512, 4).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(cuda::DescribeKernel(64, 0).error().code, ErrorCode::kInvalidArgument);
  for (int64_t head : {16, 64, 80, 96, 112, 128, 256})
    for (int64_t rows : {1, 4, 8, 9, 64, 1000}) {
      const auto info = cuda::DescribeKernel(head, rows);
      ASSERT_TRUE(info) << info.error().message;
      EXPECT_GE(info->blocks, 1) << head << " " << rows;
    }
}

}  // namespace
}  // namespace moend

#endif
