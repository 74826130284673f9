// Windows, soft caps and sinks: the reference against the definition, the kernels against the reference.
#include <gtest/gtest.h>
#include <hwy/aligned_allocator.h>

#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "moend/attention/attention.h"
#include "tests/support/each_target.h"
#include "tests/support/packed_context.h"

namespace moend {
namespace {

using test::ForEachTarget;
using test::FromHalf;
using test::PackedContext;
using test::ToHalf;

struct State {
  State(const QueryRows& q, int64_t head)
      : out(static_cast<size_t>(q.rows * head)),
        max(static_cast<size_t>(q.rows)),
        sum(static_cast<size_t>(q.rows)) {
    InitState(view(), q, head);
  }
  SoftmaxState view() { return {out.data(), max.data(), sum.data()}; }
  std::vector<float> out, max, sum;
};

hwy::AlignedFreeUniquePtr<float[]> Workspace(int64_t head, int64_t rows) {
  return hwy::AllocateAligned<float>(static_cast<size_t>(WorkspaceFloats(head, rows)));
}

class Random {
 public:
  explicit Random(uint32_t seed) : random_(seed) {}
  int64_t Below(int64_t n) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(n)); }
  std::vector<float> Normal(int64_t n, double deviation) {
    std::normal_distribution<double> normal(0, deviation);
    std::vector<float> out(static_cast<size_t>(n));
    for (float& x : out) x = static_cast<float>(normal(random_));
    return out;
  }

 private:
  std::mt19937_64 random_;
};

struct Dense {
  Dense(int64_t n_head, int64_t n, Random& random) : head(n_head), tokens(n) {
    k16.assign(static_cast<size_t>((n + 63) / 64 * 64 * head), ToHalf(1000.0));
    v16.resize(static_cast<size_t>(n * head));
    const auto k = random.Normal(n * head, 1), v = random.Normal(n * head, 1);
    for (int64_t t = 0; t < n; ++t)
      for (int64_t c = 0; c < head; ++c) {
        k16[static_cast<size_t>(t / 64 * 64 * head + c * 64 + t % 64)] =
            ToHalf(k[static_cast<size_t>(t * head + c)]);
        v16[static_cast<size_t>(t * head + c)] = ToHalf(v[static_cast<size_t>(t * head + c)]);
      }
  }
  double K(int64_t t, int64_t c) const {
    return FromHalf(k16[static_cast<size_t>(t / 64 * 64 * head + c * 64 + t % 64)]);
  }
  double V(int64_t t, int64_t c) const { return FromHalf(v16[static_cast<size_t>(t * head + c)]); }
  DenseView view() const { return {head, k16.data(), v16.data(), tokens}; }
  int64_t head, tokens;
  std::vector<uint16_t> k16, v16;
};

// Queries with whatever a model may ask of its attention.
struct Asked {
  Asked(int64_t head, int64_t rows, int64_t group, Random& random)
      : q(random.Normal(rows * head, 3 / std::sqrt(static_cast<double>(head)))),
        sinks(random.Normal(group, 2)) {
    query = {q.data(), rows, group};
    if (random.Below(3) > 0) query.soft_cap = static_cast<float>(1 + random.Below(20)) / 2;
    if (random.Below(2) > 0) query.sinks = sinks.data();
  }
  std::vector<float> q, sinks;
  QueryRows query;
};

void ExpectNear(const std::vector<float>& got, const std::vector<float>& want, double tolerance,
                const std::string& what) {
  ASSERT_EQ(got.size(), want.size());
  double worst = 0, size = 1;
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_FALSE(std::isnan(got[i])) << what << " at " << i;
    if (std::isinf(want[i])) {
      ASSERT_EQ(got[i], want[i]) << what << " at " << i;
      continue;
    }
    worst = std::max(worst, std::fabs(double{got[i]} - want[i]));
    size = std::max(size, std::fabs(double{want[i]}));
  }
  EXPECT_LE(worst, tolerance * size) << what;
}

std::string Describe(const QueryRows& q, int64_t head, int64_t tokens, int64_t first) {
  return fmt::format("{} rows of {}, head {}, {} tokens from {}, window {}, behind {}, cap {}{}", q.rows,
                     q.group, head, tokens, first, q.window, q.behind, q.soft_cap, q.sinks ? ", sinks" : "");
}

// What the parameters mean, written down once more.
std::vector<float> Definition(const Dense& kv, const QueryRows& q, int64_t first) {
  std::vector<float> out(static_cast<size_t>(q.rows * kv.head), 0.0f);
  for (int64_t r = 0; r < q.rows; ++r) {
    const int64_t own = first + r / q.group;
    double sum = q.sinks ? std::exp(double{q.sinks[r % q.group]}) : 0;
    std::vector<double> mean(static_cast<size_t>(kv.head), 0.0);
    for (int64_t t = 0; t < kv.tokens; ++t) {
      if (t > own || (q.window > 0 && t <= own - q.window)) continue;
      double s = 0;
      for (int64_t c = 0; c < kv.head; ++c) s += double{q.q[r * kv.head + c]} * kv.K(t, c);
      if (q.soft_cap != 0) s = q.soft_cap * std::tanh(s / q.soft_cap);
      sum += std::exp(s);
      for (int64_t c = 0; c < kv.head; ++c) mean[static_cast<size_t>(c)] += std::exp(s) * kv.V(t, c);
    }
    for (int64_t c = 0; c < kv.head && sum > 0; ++c)
      out[static_cast<size_t>(r * kv.head + c)] = static_cast<float>(mean[static_cast<size_t>(c)] / sum);
  }
  return out;
}

TEST(AttentionVariant, CausalIsTheReference) {
  Random random(1);
  for (int i = 0; i < 40; ++i) {
    const int64_t head = 16 * (1 + random.Below(16)), group = 1 + random.Below(5);
    const int64_t tokens = 1 + random.Below(200), rows = group * (1 + random.Below(70));
    const Dense kv(head, tokens, random);
    Asked asked(head, rows, group, random);
    QueryRows& q = asked.query;
    // Also far behind the last token, where a window shows some of its tokens or none.
    const int64_t first = random.Below(i % 3 == 0 ? tokens + 100 : tokens);
    if (i % 4 > 0) q.window = 1 + random.Below(i % 4 == 1 ? 300 : 40);
    const std::string what = Describe(q, head, tokens, first);
    const auto workspace = Workspace(head, rows);
    State want(q, head);
    reference::AttendCausal(kv.view(), first, q, want.view(), workspace.get());
    State finished = want;
    reference::Finish(finished.view(), rows, head);
    ExpectNear(finished.out, Definition(kv, q, first), 1e-5, what);

    const auto in = random.Normal(rows * head, 1);
    const int64_t begin = random.Below(tokens), end = begin + random.Below(tokens - begin + 1);
    struct Columns {
      explicit Columns(int64_t n, int64_t d)
          : sums(static_cast<size_t>(n)), outputs(static_cast<size_t>(n * d)) {}
      std::vector<float> sums, outputs;
    };
    Columns columns(tokens, head);
    const float *max = want.max.data(), *sum = want.sum.data();
    reference::ColumnSumsCausal(kv.view(), first, begin, end, q, max, sum, columns.sums.data(), nullptr);
    reference::ColumnOutputsCausal(kv.view(), first, q, max, sum, in.data(), columns.outputs.data(), nullptr);
    ForEachTarget([&](const std::string& target) {
      State got(q, head);
      simd::AttendCausal(kv.view(), first, q, got.view(), workspace.get());
      ExpectNear(got.max, want.max, 1e-5, target + ", max: " + what);
      ExpectNear(got.sum, want.sum, 5e-5, target + ", sum: " + what);
      simd::Finish(got.view(), rows, head);
      ExpectNear(got.out, finished.out, 5e-5, target + ": " + what);
      Columns made(tokens, head);
      simd::ColumnSumsCausal(kv.view(), first, begin, end, q, max, sum, made.sums.data(), workspace.get());
      simd::ColumnOutputsCausal(kv.view(), first, q, max, sum, in.data(), made.outputs.data(),
                                workspace.get());
      ExpectNear(made.sums, columns.sums, 5e-5, target + ", sums: " + what);
      ExpectNear(made.outputs, columns.outputs, 5e-5, target + ", outputs: " + what);
    });
  }
}

TEST(ChosenPages, AreTheReference) {
  Random random(3);
  for (int i = 0; i < 40; ++i) {
    const int64_t head = 16 * (1 + random.Below(16)), group = 1 + random.Below(5);
    const int64_t tokens = random.Below(10) == 0 ? 0 : 1 + random.Below(400);
    const int64_t rows = group * (1 + random.Below(40)), pages = (tokens + kPageTokens - 1) / kPageTokens;
    const Dense kv(head, tokens, random);
    Asked asked(head, rows, group, random);
    const QueryRows& q = asked.query;
    const std::string what = Describe(q, head, tokens, tokens);
    const auto workspace = Workspace(head, rows);
    const auto weight = random.Normal(rows, 1);
    std::vector<float> most(static_cast<size_t>(pages * rows)), least(static_cast<size_t>(rows));
    State want(q, head);
    reference::PageMaxima(kv.view(), q, most.data(), nullptr);
    reference::ChoosePages(most.data(), pages, rows, want.view(), 1e-3f, least.data());
    ForEachTarget([&](const std::string& target) {
      std::vector<float> got(most.size()), from(least.size());
      State before(q, head);
      simd::PageMaxima(kv.view(), q, got.data(), workspace.get());
      simd::ChoosePages(most.data(), pages, rows, before.view(), 1e-3f, from.data());
      ExpectNear(got, most, 2e-3, target + ", most: " + what);
      for (size_t r = 0; r < from.size(); ++r) {
        if (std::isfinite(least[r])) {
          EXPECT_NEAR(from[r], least[r], 1e-4) << target << ": " << what;
        }
      }
    });
    // Some rows choose all pages, some none, the others about half of them.
    for (size_t r = 0; r < least.size(); ++r) {
      if (r % 5 == 0) least[r] = -INFINITY;
      if (r % 5 == 1) least[r] = INFINITY;
      if (r % 5 > 2 && pages > 0)
        least[r] = most[static_cast<size_t>(random.Below(pages)) * least.size() + r];
    }
    const ChosenPages chosen{most.data(), least.data()};
    reference::AttendChosen(kv.view(), q, chosen, want.view(), nullptr);
    const float *max = want.max.data(), *sum = want.sum.data();
    std::vector<float> squares(static_cast<size_t>(tokens), 1.0f);
    reference::ColumnSquaresChosen(kv.view(), q, chosen, max, sum, weight.data(), squares.data(), nullptr);
    ForEachTarget([&](const std::string& target) {
      State got(q, head);
      simd::AttendChosen(kv.view(), q, chosen, got.view(), workspace.get());
      ExpectNear(got.max, want.max, 1e-5, target + ", max: " + what);
      ExpectNear(got.sum, want.sum, 5e-5, target + ", sum: " + what);
      ExpectNear(got.out, want.out, 5e-5, target + ": " + what);
      std::vector<float> made(squares.size(), 1.0f);
      simd::ColumnSquaresChosen(kv.view(), q, chosen, max, sum, weight.data(), made.data(), workspace.get());
      ExpectNear(made, squares, 5e-5, target + ", squares: " + what);
    });
  }
}

TEST(ChosenPages, LeaveOutNoMoreThanTheyMay) {
  Random random(4);
  const int64_t head = 64, tokens = 1000, rows = 64, pages = (tokens + kPageTokens - 1) / kPageTokens;
  const float part = 0.25f;
  const Dense kv(head, tokens, random);
  const auto queries = random.Normal(rows * head, 1.0);
  const auto weight = random.Normal(rows, 1);
  const QueryRows q{queries.data(), rows, 1};
  const auto workspace = Workspace(head, rows);
  std::vector<float> most(static_cast<size_t>(pages * rows)), least(static_cast<size_t>(rows));
  State all(q, head), some(q, head);
  simd::AttendCausal(kv.view(), tokens, q, all.view(), workspace.get());
  simd::PageMaxima(kv.view(), q, most.data(), workspace.get());
  simd::ChoosePages(most.data(), pages, rows, some.view(), part / static_cast<float>(tokens), least.data());
  int64_t chosen = 0;
  for (size_t i = 0; i < most.size(); ++i) chosen += most[i] >= least[i % least.size()];
  EXPECT_LT(chosen, pages * rows);
  simd::AttendChosen(kv.view(), q, {most.data(), least.data()}, some.view(), workspace.get());
  for (size_t r = 0; r < least.size(); ++r) {
    EXPECT_EQ(some.max[r], all.max[r]);
    EXPECT_GE(some.sum[r], all.sum[r] * (1 - part));
    EXPECT_LE(some.sum[r], all.sum[r] * (1 + 1e-5f));
  }
}

TEST(ChosenPages, WhatIsNoNumberIsNotLeftOut) {
  Random random(5);
  const int64_t head = 32, tokens = 300, rows = 3, pages = (tokens + kPageTokens - 1) / kPageTokens;
  const Dense kv(head, tokens, random);
  auto queries = random.Normal(rows * head, 1.0);
  queries[static_cast<size_t>(head) + 5] = NAN;  // of row 1
  const std::vector<float> weight(static_cast<size_t>(rows), 1.0f);
  const QueryRows q{queries.data(), rows, 1};
  const auto workspace = Workspace(head, rows);
  std::vector<float> most(static_cast<size_t>(pages * rows)), least(static_cast<size_t>(rows));
  ForEachTarget([&](const std::string& target) {
    State state(q, head);
    simd::PageMaxima(kv.view(), q, most.data(), workspace.get());
    simd::ChoosePages(most.data(), pages, rows, state.view(), 1e-3f, least.data());
    const ChosenPages chosen{most.data(), least.data()};
    simd::AttendChosen(kv.view(), q, chosen, state.view(), workspace.get());
    std::vector<float> squares(static_cast<size_t>(tokens), 0.0f);
    simd::ColumnSquaresChosen(kv.view(), q, chosen, state.max.data(), state.sum.data(), weight.data(),
                              squares.data(), workspace.get());
    EXPECT_TRUE(std::isnan(state.sum[1])) << target;
    EXPECT_TRUE(std::isfinite(state.sum[0]) && std::isfinite(state.sum[2])) << target;
    for (const float x : squares) EXPECT_TRUE(std::isnan(x)) << target;
  });
}

TEST(AttentionVariant, StreamIsTheReference) {
  Random random(2);
  for (int i = 0; i < 60; ++i) {
    const int64_t head = 16 * (1 + random.Below(16)), group = 1 + random.Below(7);
    // Few rows are read from packed codes, many from unpacked pages.
    const int64_t rows = group * (1 + random.Below(i % 3 == 0 ? 60 : 3));
    const bool windowed = i % 2 == 0;
    const int bits = kBitWidths[static_cast<size_t>(random.Below(5))];
    const PackedContext context(head, bits, bits, windowed ? 0 : random.Below(4), random.Below(200), 0.8,
                                static_cast<uint32_t>(i));
    const StreamView kv = context.view();
    Asked asked(head, rows, group, random);
    QueryRows& q = asked.query;
    if (windowed) q.window = 1 + random.Below(220), q.behind = random.Below(3) == 0 ? 0 : random.Below(120);
    const std::string what = Describe(q, head, kv.n_raw, kv.n_pages);
    const auto workspace = Workspace(head, rows);
    State want(q, head);
    reference::AttendStream(kv, 0, kv.n_pages, true, q, want.view(), workspace.get());
    std::vector<float> columns(static_cast<size_t>(kv.n_pages * kPageTokens));
    reference::ColumnSumsStream(kv, q, want.max.data(), want.sum.data(), columns.data(), nullptr);
    ForEachTarget([&](const std::string& target) {
      State got(q, head);
      simd::AttendStream(kv, 0, kv.n_pages, true, q, got.view(), workspace.get());
      std::vector<float> made(columns.size());
      simd::ColumnSumsStream(kv, q, want.max.data(), want.sum.data(), made.data(), workspace.get());
      ExpectNear(made, columns, 5e-4, target + ", sums: " + what);
      State finished = want;
      simd::Finish(got.view(), rows, head);
      reference::Finish(finished.view(), rows, head);
      ExpectNear(got.out, finished.out, 5e-4, target + ": " + what);
    });
  }
}

// A window over a stream is the window over the same tokens in a row.
TEST(AttentionVariant, StreamAndCausalAgree) {
  Random random(3);
  constexpr int64_t kHead = 32, kGroup = 2, kTokens = 90, kRows = kGroup * 5;
  const Dense kv(kHead, kTokens, random);
  std::vector<uint16_t> raw_k(static_cast<size_t>((kTokens + 15) / 16 * 16 * kHead));
  for (int64_t t = 0; t < kTokens; ++t)
    for (int64_t c = 0; c < kHead; ++c)
      raw_k[static_cast<size_t>(t / 16 * 16 * kHead + c * 16 + t % 16)] = ToHalf(kv.K(t, c));
  StreamView stream;
  stream.layout = MakePageLayout(kHead, 16, 16).value();
  stream.raw_k = raw_k.data();
  stream.raw_v = kv.v16.data();
  stream.n_raw = kTokens;
  for (const int64_t behind : {0, 1, 7, 60})
    for (const int64_t window : {1, 2, 16, 64, 65, 200}) {
      Asked asked(kHead, kRows, kGroup, random);
      asked.query.window = window;
      asked.query.behind = behind;
      const auto workspace = Workspace(kHead, kRows);
      State got(asked.query, kHead);
      simd::AttendStream(stream, 0, 0, true, asked.query, got.view(), workspace.get());
      simd::Finish(got.view(), kRows, kHead);
      ExpectNear(got.out, Definition(kv, asked.query, kTokens - 1 + behind), 5e-5,
                 Describe(asked.query, kHead, kTokens, 0));
    }
}

// How much room the last block of raw keys has changes no bit of the result.
TEST(AttendStream, NarrowLastBlocksAreTheSame) {
  for (const int64_t n_raw : {1, 7, 15, 17, 33, 47, 50, 65, 81, 127})
    for (const int64_t head : {64, 80})
      for (int64_t tail = n_raw % 16; tail < 16; tail += 4) {
        const test::PackedContext whole(head, 4, 4, 1, n_raw, 0.8, 3);
        test::PackedContext narrow(head, 4, 4, 1, n_raw, 0.8, 3);
        narrow.NarrowLastBlock(tail);
        for (const int64_t rows : {1, 6, 130}) {
          const auto q = test::Queries(rows, head, 2.0, 5);
          const auto run = [&](const StreamView& kv, auto* attend) {
            std::vector<float> out(static_cast<size_t>(rows * (head + 2)));
            const SoftmaxState state{out.data(), out.data() + rows * head, out.data() + rows * (head + 1)};
            ResetState(state, rows, head);
            const auto workspace =
                hwy::AllocateAligned<float>(static_cast<size_t>(WorkspaceFloats(head, rows)));
            attend(kv, 0, kv.n_pages, true, QueryRows{q.data(), rows, 1}, state, workspace.get());
            return out;
          };
          EXPECT_EQ(run(narrow.view(), reference::AttendStream), run(whole.view(), reference::AttendStream));
          test::ForEachTarget([&] {
            EXPECT_EQ(run(narrow.view(), simd::AttendStream), run(whole.view(), simd::AttendStream))
                << n_raw << " raw tokens, tail " << tail << ", rows " << rows;
          });
        }
      }
}

}  // namespace
}  // namespace moend
