// The kernels against the scalar reference on K, V and queries of the reference model: real activations have
// outlier channels, attention sinks and peaked distributions that random numbers do not.
#include <gtest/gtest.h>
#include <hwy/aligned_allocator.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "moend/attention/attention.h"
#include "moend/base/file.h"
#include "moend/cache/layer_cache.h"
#include "moend/engine/capture.h"
#include "moend/engine/engine.h"
#include "moend/plan/expert.h"

namespace moend {
namespace {

constexpr int64_t kTokens = 1000;  // no multiple of a page, a block or a raw block

struct State {
  State(int64_t n_rows, int64_t head)
      : out(static_cast<size_t>(n_rows * head)),
        max(static_cast<size_t>(n_rows)),
        sum(static_cast<size_t>(n_rows)) {
    ResetState(view(), n_rows, head);
  }
  SoftmaxState view() { return {out.data(), max.data(), sum.data()}; }
  std::vector<float> out, max, sum;
};

// K, V and the newest queries of every layer and KV head.
class RealActivations : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    const std::string root = MOEND_SOURCE_DIR;
    auto model = Model::Load(root + "/models/moend-reference-23m-q8_0.gguf");
    ASSERT_TRUE(model) << model.error().message;
    auto engine = Engine::Create(*model, {1});
    ASSERT_TRUE(engine);
    const auto text = ReadFile(root + "/models/suite/heldout.txt");
    ASSERT_TRUE(text);
    auto tokens = (*model)->tokenizer().Tokenize(text->substr(0, 8 * kTokens), true, false);
    ASSERT_TRUE(tokens);
    ASSERT_GE(static_cast<int64_t>(tokens->size()), kTokens);
    tokens->resize(kTokens);
    const std::vector<std::string> scorers = {"snapkv", "h2o"};
    auto made = KvCapture::Create(*engine, *tokens, scorers);
    ASSERT_TRUE(made) << made.error().message;
    capture = new KvCapture(std::move(*made));
    layers = (*model)->hparams().n_layers;
  }
  static void TearDownTestSuite() {
    delete capture;
    capture = nullptr;
  }

  template <class Check>
  void ForEachHead(const Check& check) {
    for (int64_t l = 0; l < layers; ++l) {
      const LayerScratch& scratch = capture->layer(l);
      for (int64_t h = 0; h < scratch.shape().n_kv_heads; ++h)
        check(scratch.view(h, kTokens), scratch.observed(h),
              "layer " + std::to_string(l) + " head " + std::to_string(h));
    }
  }

  static inline KvCapture* capture = nullptr;
  static inline int64_t layers = 0;
};

hwy::AlignedFreeUniquePtr<float[]> Workspace(int64_t head, int64_t rows) {
  return hwy::AllocateAligned<float>(static_cast<size_t>(WorkspaceFloats(head, rows)));
}

// Both keep float32 states, the reference with float64 sums. A score of size s carries a rounding error of
// about s * 2^-23 into the exponent; outputs are weighted means of V.
void ExpectSame(const State& got, const State& want, int64_t rows, int64_t head, const std::string& what) {
  for (int64_t r = 0; r < rows; ++r) {
    const auto ri = static_cast<size_t>(r);
    const double score = std::fabs(want.max[ri]);
    EXPECT_NEAR(got.max[ri], want.max[ri], 1e-6 * (1 + score)) << what << " row " << r;
    EXPECT_NEAR(got.sum[ri] / want.sum[ri], 1.0, 2e-6 * (3 + score)) << what << " row " << r;
    double largest = 0, worst = 0;
    for (int64_t c = 0; c < head; ++c) {
      const auto at = static_cast<size_t>(r * head + c);
      ASSERT_TRUE(std::isfinite(got.out[at])) << what;
      largest = std::max(largest, std::fabs(static_cast<double>(want.out[at])));
      worst =
          std::max(worst, std::fabs(static_cast<double>(got.out[at]) - static_cast<double>(want.out[at])));
    }
    EXPECT_LE(worst, largest * 3e-6 * (3 + score) + 1e-7) << what << " row " << r;
  }
}

TEST_F(RealActivations, PrefillMatchesTheReference) {
  ForEachHead([&](const DenseView& kv, const QueryRows& q, const std::string& what) {
    ASSERT_GT(q.rows, 0);
    const int64_t head = kv.head_size, first = kTokens - q.rows / q.group;
    State got(q.rows, head), want(q.rows, head);
    const auto workspace = Workspace(head, q.rows);
    simd::AttendCausal(kv, first, q, got.view(), workspace.get());
    reference::AttendCausal(kv, first, q, want.view(), workspace.get());
    std::vector<float> got_sums(kTokens), want_sums(kTokens);
    simd::ColumnSumsCausal(kv, first, 0, kTokens, q, want.max.data(), want.sum.data(), got_sums.data(),
                           workspace.get());
    reference::ColumnSumsCausal(kv, first, 0, kTokens, q, want.max.data(), want.sum.data(), want_sums.data(),
                                workspace.get());
    for (size_t t = 0; t < kTokens; ++t)
      ASSERT_NEAR(got_sums[t], want_sums[t], 1e-5 * (1 + want_sums[t])) << what << " token " << t;
    simd::Finish(got.view(), q.rows, head);
    reference::Finish(want.view(), q.rows, head);
    ExpectSame(got, want, q.rows, head, what);
  });
}

TEST_F(RealActivations, DecodeMatchesTheReferenceForEveryCodecPair) {
  auto ledger = std::make_shared<Ledger>();
  for (const int k_bits : kBitWidths) {
    for (const int v_bits : kBitWidths) {
      ForEachHead([&](const DenseView& kv, const QueryRows& all, const std::string& where) {
        const std::string what = where + " K" + std::to_string(k_bits) + " V" + std::to_string(v_bits);
        const int64_t head = kv.head_size;
        auto cache = LayerCache::Create(ledger, {1, head}, Expert{1.0, k_bits, v_bits}, {}, false);
        ASSERT_TRUE(cache);
        const std::vector<uint32_t> everything;
        ASSERT_TRUE(cache->Fill({&kv, 1}, {&everything, 1}, {}));
        const StreamView stream = cache->view(0);
        ASSERT_GT(stream.n_pages, 0);
        // The newest token's queries, as a decode step has them.
        const QueryRows q{all.q + (all.rows - all.group) * head, all.group, all.group};
        State got(q.rows, head), want(q.rows, head);
        const auto workspace = Workspace(head, q.rows);
        simd::AttendStream(stream, 0, stream.n_pages, true, q, got.view(), workspace.get());
        reference::AttendStream(stream, 0, stream.n_pages, true, q, want.view(), workspace.get());
        simd::Finish(got.view(), q.rows, head);
        reference::Finish(want.view(), q.rows, head);
        ExpectSame(got, want, q.rows, head, what);
      });
    }
  }
}

}  // namespace
}  // namespace moend
