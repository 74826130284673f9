#include "moend/attention/attention.h"

#include <gtest/gtest.h>
#include <hwy/aligned_allocator.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "tests/support/each_target.h"
#include "tests/support/packed_context.h"

namespace moend {
namespace {

using test::ForEachTarget;
using test::FromHalf;
using test::PackedContext;
using test::Queries;
using test::ToHalf;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

// A state with its memory.
struct State {
  State(int64_t n_rows, int64_t n_head)
      : rows(n_rows),
        head(n_head),
        out(static_cast<size_t>(rows * head)),
        max(static_cast<size_t>(rows)),
        sum(static_cast<size_t>(rows)) {
    ResetState(view(), rows, head);
  }
  SoftmaxState view() { return {out.data(), max.data(), sum.data()}; }
  int64_t rows, head;
  std::vector<float> out, max, sum;
};

// Exactly as large as promised, so that the address sanitizer sees a write behind it.
class Workspace {
 public:
  Workspace(int64_t head, int64_t rows)
      : data_(hwy::AllocateAligned<float>(static_cast<size_t>(WorkspaceFloats(head, rows)))) {}
  float* get() { return data_.get(); }

 private:
  hwy::AlignedFreeUniquePtr<float[]> data_;
};

// Softmax attention in one piece, without a running maximum; sums[token] gets the column sums.
struct Naive {
  std::vector<double> out, columns;
  double largest_score = 0, largest_v = 0;
};

Naive NaiveAttention(const std::vector<float>& q, int64_t rows, int64_t head, int64_t tokens,
                     const std::function<const double*(int64_t)>& k,
                     const std::function<const double*(int64_t)>& v,
                     const std::function<bool(int64_t, int64_t)>& visible) {
  Naive naive;
  naive.out.resize(static_cast<size_t>(rows * head));
  naive.columns.resize(static_cast<size_t>(tokens));
  std::vector<double> p(static_cast<size_t>(tokens));
  for (int64_t r = 0; r < rows; ++r) {
    double high = -INFINITY, sum = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      double& s = p[static_cast<size_t>(t)];
      s = -INFINITY;
      if (!visible(r, t)) continue;
      s = 0;
      for (int64_t c = 0; c < head; ++c)
        s += static_cast<double>(q[static_cast<size_t>(r * head + c)]) * k(t)[c];
      high = std::max(high, s);
      naive.largest_score = std::max(naive.largest_score, std::fabs(s));
    }
    for (double& x : p) sum += x = std::isinf(x) ? 0.0 : std::exp(x - high);
    if (sum == 0) continue;
    for (int64_t t = 0; t < tokens; ++t) {
      const double weight = p[static_cast<size_t>(t)] / sum;
      naive.columns[static_cast<size_t>(t)] += weight;
      for (int64_t c = 0; c < head; ++c) {
        naive.out[static_cast<size_t>(r * head + c)] += weight * v(t)[c];
        naive.largest_v = std::max(naive.largest_v, std::fabs(v(t)[c]));
      }
    }
  }
  return naive;
}

Naive NaiveStream(const PackedContext& context, const std::vector<float>& q, int64_t rows, int64_t head) {
  return NaiveAttention(
      q, rows, head, context.tokens(), [&](int64_t t) { return context.k(t); },
      [&](int64_t t) { return context.v(t); }, [](int64_t, int64_t) { return true; });
}

// A score of size s carries a float32 rounding error of about s * 2^-23 into the exponent.
double Tolerance(const Naive& naive, double base) {
  return naive.largest_v * (base + naive.largest_score * 2e-7) + 1e-12;
}

void ExpectNear(const std::vector<float>& got, const std::vector<double>& want, double tolerance,
                const std::string& what) {
  ASSERT_EQ(got.size(), want.size());
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(got[i] - want[i]);
    ASSERT_FALSE(std::isnan(error)) << what << " at " << i;
    worst = std::max(worst, error);
  }
  EXPECT_LE(worst, tolerance) << what;
}

std::vector<float> RunStream(decltype(&simd::AttendStream) attend, const StreamView& kv, const QueryRows& q) {
  State state(q.rows, kv.layout.head_size);
  Workspace workspace(kv.layout.head_size, q.rows);
  attend(kv, 0, kv.n_pages, true, q, state.view(), workspace.get());
  simd::Finish(state.view(), q.rows, kv.layout.head_size);
  return state.out;
}

void CheckStream(const PackedContext& context, int64_t rows, int64_t group, double gain, uint32_t seed,
                 const std::string& what) {
  const StreamView kv = context.view();
  const int64_t head = kv.layout.head_size;
  const auto q = Queries(rows, head, gain, seed);
  const QueryRows query{q.data(), rows, group};
  const Naive naive = NaiveStream(context, q, rows, head);
  ExpectNear(RunStream(reference::AttendStream, kv, query), naive.out, Tolerance(naive, 3e-7),
             what + " reference");
  ForEachTarget([&](const std::string& target) {
    ExpectNear(RunStream(simd::AttendStream, kv, query), naive.out, Tolerance(naive, 2e-6),
               what + " " + target);
  });
}

std::string Name(int64_t head, int k_bits, int v_bits, int64_t rows) {
  return "head " + std::to_string(head) + " K" + std::to_string(k_bits) + " V" + std::to_string(v_bits) +
         " rows " + std::to_string(rows);
}

constexpr int64_t kHeads[] = {64, 80, 96, 128, 256};

TEST(AttendStream, EveryCodecPairAndHeadSize) {
  int64_t group = 0;
  uint32_t seed = 1;
  for (int64_t head : kHeads)
    for (int k_bits : kBitWidths)
      for (int v_bits : kBitWidths) {
        group = group % 8 + 1;  // 25 pairs: every head size meets every group size
        const PackedContext context(head, k_bits, v_bits, 2, 21, 0.8, ++seed);
        CheckStream(context, group, group, 2.0, seed, Name(head, k_bits, v_bits, group));
      }
}

TEST(AttendStream, EverySupportedHeadSize) {
  for (int64_t head = 16; head <= 256; head += 16) {
    const PackedContext context(head, 3, 3, 1, 5, 0.5, static_cast<uint32_t>(head));
    CheckStream(context, 3, 3, 2.0, 7, Name(head, 3, 3, 3));
  }
}

TEST(AttendStream, ManyRowsUnpackPagesFirst) {
  uint32_t seed = 100;
  for (int bits : kBitWidths)
    for (int64_t rows : {12, 16, 17, 35, 80}) {
      const int64_t head = kHeads[seed % 5];
      const PackedContext context(head, bits, bits == 16 ? 4 : bits, 2, 70, 0.7, ++seed);
      CheckStream(context, rows, rows % 5 == 0 ? 5 : 1, 2.0, seed, Name(head, bits, bits, rows));
    }
}

TEST(AttendStream, MoreRowsThanShareATile) {
  const PackedContext context(256, 4, 8, 1, 9, 0.9, 3);
  CheckStream(context, 501, 3, 2.0, 5, Name(256, 4, 8, 501));
}

TEST(AttendStream, Lengths) {
  for (auto [pages, raw] : {std::pair<int64_t, int64_t>{0, 1},
                            {0, 16},
                            {0, 17},
                            {0, 64},
                            {0, 65},
                            {0, 131},
                            {1, 0},
                            {3, 0},
                            {17, 33}}) {
    const PackedContext context(64, 4, 4, pages, raw, 1.0, 5);
    const std::string what = std::to_string(pages) + " pages, " + std::to_string(raw) + " raw";
    CheckStream(context, 4, 4, 2.0, 11, what);
    CheckStream(context, 20, 4, 2.0, 11, what);
  }
}

TEST(AttendStream, LiveMasksOfEveryDensity) {
  for (double share : {0.0, 0.02, 0.5, 0.98})
    for (int64_t rows : {2, 24}) {
      const PackedContext context(80, 8, 2, 6, 3, share, 9);
      CheckStream(context, rows, 2, 2.0, 13, "live share " + std::to_string(share));
    }
}

TEST(AttendStream, LargeLogitsSaturate) {
  for (double gain : {50.0, 2000.0}) {
    const PackedContext full(128, 16, 16, 2, 20, 1.0, 17), packed(128, 8, 4, 2, 20, 1.0, 17);
    for (int64_t rows : {4, 18}) {
      CheckStream(full, rows, 2, gain, 19, "16 bit, gain " + std::to_string(gain));
      CheckStream(packed, rows, 2, gain, 19, "packed, gain " + std::to_string(gain));
    }
  }
}

// One channel with most of K's range must not cost the others their precision.
TEST(AttendStream, OutlierChannels) {
  for (int bits : kBitWidths)
    for (int64_t rows : {3, 20}) {
      const PackedContext context(128, bits, bits, 3, 12, 0.9, 25, 100.0);
      CheckStream(context, rows, 1, 2.0, 27, "outlier, " + Name(128, bits, bits, rows));
    }
}

TEST(AttendStream, NothingSeenGivesZeros) {
  const PackedContext empty(96, 4, 4, 0, 0, 1.0, 21), evicted(96, 4, 4, 3, 0, 0.0, 21);
  ForEachTarget([&](const std::string& target) {
    for (const PackedContext* context : {&empty, &evicted})
      for (int64_t rows : {1, 8, 40}) {
        const auto q = Queries(rows, 96, 1.0, 3);
        const auto out = RunStream(simd::AttendStream, context->view(), {q.data(), rows, 1});
        for (float x : out) ASSERT_EQ(x, 0.0f) << target;
      }
  });
}

// A bad query must not hide behind a finite answer, nor touch its neighbours.
TEST(AttendStream, NonFiniteQueriesStayInTheirRow) {
  for (int bits : {16, 8, 2}) {
    const PackedContext context(64, bits, bits, 2, 10, 0.9, 23);
    for (int64_t rows : {6, 24})
      for (float bad : {kNan, kInf, -kInf}) {
        auto q = Queries(rows, 64, 1.0, 29);
        q[64 * 2 + 5] = bad;
        const QueryRows query{q.data(), rows, 1};
        const auto want = RunStream(reference::AttendStream, context.view(), query);
        ForEachTarget([&](const std::string& target) {
          const auto got = RunStream(simd::AttendStream, context.view(), query);
          for (size_t i = 0; i < got.size(); ++i)
            ASSERT_EQ(std::isnan(got[i]), std::isnan(want[i])) << target << " at " << i << " bits " << bits;
        });
      }
  }
}

TEST(AttendStream, PartsAddUpAndMergeInAnyOrder) {
  const PackedContext context(128, 4, 3, 7, 40, 0.8, 31);
  const StreamView kv = context.view();
  const int64_t rows = 5;
  const auto q = Queries(rows, 128, 4.0, 37);
  const QueryRows query{q.data(), rows, 5};
  const Naive naive = NaiveStream(context, q, rows, 128);
  ForEachTarget([&](const std::string& target) {
    Workspace workspace(128, rows);
    const auto part = [&](int64_t begin, int64_t end, bool raw) {
      State state(rows, 128);
      simd::AttendStream(kv, begin, end, raw, query, state.view(), workspace.get());
      return state;
    };
    State chained(rows, 128);
    simd::AttendStream(kv, 5, 7, false, query, chained.view(), workspace.get());
    simd::AttendStream(kv, 0, 5, true, query, chained.view(), workspace.get());
    State left = part(0, 3, false), right = part(3, 7, false), empty = part(2, 2, false);
    State tail = part(0, 0, true), tail2 = tail, left2 = left;
    simd::MergeStates(left.view(), right.view(), rows, 128);  // (left + right) + tail
    simd::MergeStates(left.view(), empty.view(), rows, 128);
    simd::MergeStates(left.view(), tail.view(), rows, 128);
    reference::MergeStates(right.view(), tail2.view(), rows, 128);  // empty + (left + (right + tail))
    reference::MergeStates(left2.view(), right.view(), rows, 128);
    simd::MergeStates(empty.view(), left2.view(), rows, 128);
    for (State* state : {&chained, &left, &empty}) {
      simd::Finish(state->view(), rows, 128);
      ExpectNear(state->out, naive.out, Tolerance(naive, 2e-6), target);
    }
  });
}

// Dense K/V of a prefill, with the values that a kernel must see.
struct Dense {
  Dense(int64_t n_head, int64_t n, uint32_t seed) : head(n_head), tokens(n) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    k16.assign(static_cast<size_t>((n + 63) / 64 * 64 * head), ToHalf(1000.0));
    v16.resize(static_cast<size_t>(n * head));
    k.resize(v16.size());
    v.resize(v16.size());
    for (int64_t t = 0; t < n; ++t)
      for (int64_t c = 0; c < head; ++c) {
        const auto i = static_cast<size_t>(t * head + c);
        const auto at = static_cast<size_t>(t / 64 * 64 * head + c * 64 + t % 64);
        k[i] = FromHalf(k16[at] = ToHalf(normal(random)));
        v[i] = FromHalf(v16[i] = ToHalf(normal(random)));
      }
  }
  DenseView view() const { return {head, k16.data(), v16.data(), tokens}; }
  Naive Causal(const std::vector<float>& q, int64_t rows, int64_t group, int64_t first) const {
    return NaiveAttention(
        q, rows, head, tokens, [&](int64_t t) { return k.data() + t * head; },
        [&](int64_t t) { return v.data() + t * head; },
        [=](int64_t r, int64_t t) { return t <= first + r / group; });
  }
  int64_t head, tokens;
  std::vector<uint16_t> k16, v16;
  std::vector<double> k, v;
};

struct CausalCase {
  int64_t head, first, new_tokens, group;
};

constexpr CausalCase kCausalCases[] = {
    {64, 0, 1, 1},   {64, 0, 63, 4},  {80, 0, 64, 3},   {96, 0, 65, 1},   {128, 0, 130, 7},
    {256, 60, 9, 5}, {64, 64, 64, 8}, {128, 999, 1, 6}, {64, 777, 50, 2}, {80, 129, 33, 12},
};

TEST(AttendCausal, RowsSeeThePastOnly) {
  for (const auto& [head, first, new_tokens, group] : kCausalCases) {
    const Dense kv(head, first + new_tokens, 41);
    const int64_t rows = new_tokens * group;
    const auto q = Queries(rows, head, 2.0, 43);
    const QueryRows query{q.data(), rows, group};
    const Naive naive = kv.Causal(q, rows, group, first);
    const std::string what = Name(head, 16, 16, rows) + " first " + std::to_string(first);
    const auto run = [&](decltype(&simd::AttendCausal) attend) {
      State state(rows, head);
      Workspace workspace(head, rows);
      attend(kv.view(), first, query, state.view(), workspace.get());
      simd::Finish(state.view(), rows, head);
      return state.out;
    };
    ExpectNear(run(reference::AttendCausal), naive.out, Tolerance(naive, 3e-7), what + " reference");
    ForEachTarget([&](const std::string& target) {
      ExpectNear(run(simd::AttendCausal), naive.out, Tolerance(naive, 2e-6), what + " " + target);
    });
  }
}

TEST(AttendCausal, ContinuesAPackedContext) {
  const PackedContext past(64, 8, 8, 3, 30, 0.6, 47);
  const Dense now(64, 70, 53);
  const int64_t group = 3, rows = 70 * group;
  const auto q = Queries(rows, 64, 2.0, 59);
  const QueryRows query{q.data(), rows, group};
  const Naive naive = NaiveAttention(
      q, rows, 64, past.tokens() + 70,
      [&](int64_t t) { return t < past.tokens() ? past.k(t) : now.k.data() + (t - past.tokens()) * 64; },
      [&](int64_t t) { return t < past.tokens() ? past.v(t) : now.v.data() + (t - past.tokens()) * 64; },
      [&](int64_t r, int64_t t) { return t <= past.tokens() + r / group; });
  ForEachTarget([&](const std::string& target) {
    State state(rows, 64);
    Workspace workspace(64, rows);
    simd::AttendStream(past.view(), 0, 3, true, query, state.view(), workspace.get());
    simd::AttendCausal(now.view(), 0, query, state.view(), workspace.get());
    simd::Finish(state.view(), rows, 64);
    ExpectNear(state.out, naive.out, Tolerance(naive, 2e-6), target);
  });
}

TEST(ColumnSums, CausalMatchesAndSumsToRows) {
  for (const auto& [head, first, new_tokens, group] : kCausalCases) {
    const Dense kv(head, first + new_tokens, 61);
    const int64_t rows = new_tokens * group;
    const auto q = Queries(rows, head, 2.0, 67);
    const QueryRows query{q.data(), rows, group};
    const Naive naive = kv.Causal(q, rows, group, first);
    const auto n = static_cast<size_t>(kv.tokens);
    Workspace workspace(head, rows);
    State state(rows, head);
    reference::AttendCausal(kv.view(), first, query, state.view(), workspace.get());
    const double tolerance = static_cast<double>(rows) * (1e-6 + naive.largest_score * 2e-7);
    std::vector<float> sums(n, 0.0f);
    reference::ColumnSumsCausal(kv.view(), first, 0, kv.tokens, query, state.max.data(), state.sum.data(),
                                sums.data(), workspace.get());
    ExpectNear(sums, naive.columns, tolerance, "reference");
    ForEachTarget([&](const std::string& target) {
      // Two ranges that do not end on pages, on top of what is there.
      std::vector<float> got(n, 1.0f);
      const int64_t cut = kv.tokens / 3;
      for (auto [begin, end] : {std::pair{int64_t{0}, cut}, {cut, kv.tokens}})
        simd::ColumnSumsCausal(kv.view(), first, begin, end, query, state.max.data(), state.sum.data(),
                               got.data(), workspace.get());
      double total = 0;
      for (float& x : got) total += x -= 1.0f;
      ExpectNear(got, naive.columns, tolerance, target);
      EXPECT_NEAR(total, static_cast<double>(rows), static_cast<double>(rows) * 1e-4) << target;
    });
  }
}

TEST(ColumnOutputs, AreTheTransposeOfAttention) {
  for (const auto& [head, first, new_tokens, group] : kCausalCases) {
    const Dense kv(head, first + new_tokens, 61);
    const int64_t rows = new_tokens * group;
    const auto q = Queries(rows, head, 2.0, 67), in = Queries(rows, head, 1.0, 71);
    const QueryRows query{q.data(), rows, group};
    Workspace workspace(head, rows);
    State state(rows, head);
    reference::AttendCausal(kv.view(), first, query, state.view(), workspace.get());
    const auto n = static_cast<size_t>(kv.tokens), d = static_cast<size_t>(head);
    std::vector<double> want(n * d, 1.0);
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<float> shares(n, 0.0f);
      reference::ColumnSumsCausal(kv.view(), first + r / group, 0, kv.tokens, {q.data() + r * head, 1, 1},
                                  state.max.data() + r, state.sum.data() + r, shares.data(), workspace.get());
      for (size_t t = 0; t < n; ++t)
        for (size_t c = 0; c < d; ++c)
          want[t * d + c] += double{shares[t]} * in[static_cast<size_t>(r) * d + c];
    }
    const auto check = [&](decltype(&simd::ColumnOutputsCausal) column_outputs, const std::string& what) {
      std::vector<float> got(n * d, 1.0f);
      column_outputs(kv.view(), first, query, state.max.data(), state.sum.data(), in.data(), got.data(),
                     workspace.get());
      ExpectNear(got, want, static_cast<double>(rows) * 1e-5, what);
    };
    check(reference::ColumnOutputsCausal, "reference");
    ForEachTarget([&](const std::string& target) { check(simd::ColumnOutputsCausal, target); });
  }
}

TEST(ColumnSums, StreamMatchesAndLeavesEvictedSlots) {
  for (int bits : kBitWidths)
    for (int64_t rows : {4, 28}) {
      const PackedContext context(96, bits, 16, 4, 25, 0.7, 71);
      const StreamView kv = context.view();
      const auto q = Queries(rows, 96, 2.0, 73);
      const QueryRows query{q.data(), rows, 4};
      const Naive naive = NaiveStream(context, q, rows, 96);
      std::vector<double> want(4 * 64, 0.0);
      for (int64_t t = 0; t < context.tokens(); ++t)
        if (context.slot(t) >= 0)
          want[static_cast<size_t>(context.slot(t))] = naive.columns[static_cast<size_t>(t)];
      Workspace workspace(96, rows);
      State state(rows, 96);
      reference::AttendStream(kv, 0, 4, true, query, state.view(), workspace.get());
      const double tolerance = static_cast<double>(rows) * (1e-6 + naive.largest_score * 2e-7);
      const auto check = [&](decltype(&simd::ColumnSumsStream) column_sums, const std::string& what) {
        std::vector<float> got(want.size(), 0.0f);
        column_sums(kv, query, state.max.data(), state.sum.data(), got.data(), workspace.get());
        ExpectNear(got, want, tolerance, what);
        for (size_t i = 0; i < got.size(); ++i)
          if ((kv.live[i / 64] >> (i % 64) & 1) == 0) {
            ASSERT_EQ(got[i], 0.0f) << what;
          }
      };
      check(reference::ColumnSumsStream, "reference");
      ForEachTarget([&](const std::string& target) { check(simd::ColumnSumsStream, target); });
    }
}

}  // namespace
}  // namespace moend
