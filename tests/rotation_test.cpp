// Rotated keys: the transform against its definition, attention over rotated pages against plain ones, and
// what the cache, the scorers and the model make of it.
#include "moend/attention/rotation.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "moend/attention/attention.h"
#include "moend/cache/layer_cache.h"
#include "moend/cache/serialize.h"
#include "moend/model/model.h"
#include "moend/score/key_blocks.h"
#include "tests/support/each_target.h"
#include "tests/support/packed_context.h"
#include "tests/support/test_model.h"

namespace moend {
namespace {

using test::ForEachTarget;

constexpr int64_t kHeadSizes[] = {16, 48, 64, 80, 96, 128, 256};

std::vector<float> Numbers(int64_t n, uint64_t seed, float low = -2, float high = 2) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<float> uniform(low, high);
  std::vector<float> x(static_cast<std::size_t>(n));
  for (float& v : x) v = uniform(random);
  return x;
}

// Between 1/8 and 8.
std::vector<float> Balance(int64_t n, uint64_t seed) {
  std::vector<float> b = Numbers(n, seed, -3, 3);
  for (float& x : b) x = std::exp2(x);
  return b;
}

void ExpectNear(const std::vector<float>& got, const std::vector<float>& want, double tolerance) {
  ASSERT_EQ(got.size(), want.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (got[i] == want[i]) continue;  // infinities, too
    ASSERT_NEAR(got[i], want[i], tolerance) << "at " << i;
  }
}

TEST(Rotation, EveryInstructionSetGivesTheReference) {
  ForEachTarget([] {
    for (const int64_t d : kHeadSizes) {
      SCOPED_TRACE(d);
      const std::vector<float> factor = Balance(d, 1), after = Balance(d, 2);
      for (const int64_t rows : {0, 1, 2, 7, 33}) {
        const std::vector<float> q = Numbers(rows * d, 3);
        std::vector<float> got(q.size()), want(q.size());
        simd::RotateRows(q.data(), rows, d, factor.data(), got.data());
        reference::RotateRows(q.data(), rows, d, factor.data(), want.data());
        ExpectNear(got, want, 2e-5);
        got = q;  // in place
        simd::RotateRows(got.data(), rows, d, factor.data(), got.data());
        ExpectNear(got, want, 2e-5);
      }
      for (const bool before : {false, true}) {
        std::vector<float> got = Numbers(d * kPageTokens, 4), want = got;
        const float *f = before ? factor.data() : nullptr, *a = before ? nullptr : after.data();
        simd::RotateLanes(got.data(), d, f, a);
        reference::RotateLanes(want.data(), d, f, a);
        ExpectNear(got, want, 2e-4);
      }
    }
  });
}

TEST(Rotation, KeepsProductsOfQueriesAndKeysAndIsItsOwnInverse) {
  for (const int64_t d : kHeadSizes) {
    const std::vector<float> balance = Balance(d, 5), q = Numbers(d, 6), k = Numbers(d * kPageTokens, 7);
    std::vector<float> inverse(balance);
    for (float& x : inverse) x = 1 / x;
    std::vector<float> turned_q(q), turned_k(k);
    simd::RotateRows(q.data(), 1, d, inverse.data(), turned_q.data());
    simd::RotateLanes(turned_k.data(), d, balance.data(), nullptr);
    for (int64_t t = 0; t < kPageTokens; ++t) {
      double want = 0, got = 0;
      for (int64_t c = 0; c < d; ++c) {
        const auto at = static_cast<std::size_t>(c * kPageTokens + t);
        want += double{q[static_cast<std::size_t>(c)]} * k[at];
        got += double{turned_q[static_cast<std::size_t>(c)]} * turned_k[at];
      }
      ASSERT_NEAR(got, want, 1e-3) << d;
    }
    simd::RotateLanes(turned_k.data(), d, nullptr, inverse.data());
    ExpectNear(turned_k, k, 1e-5);
  }
}

// Softmax states of both implementations over a stream of rotated pages.
void CheckStream(const StreamView& kv, int64_t rows, uint64_t seed) {
  const int64_t d = kv.layout.head_size;
  const std::vector<float> q = Numbers(rows * d, seed, -0.3f, 0.3f);
  const QueryRows query{q.data(), rows, 1};
  auto workspace = Buffer<float>::Create(nullptr, WorkspaceFloats(d, rows));
  ASSERT_TRUE(workspace);
  struct Result {
    std::vector<float> out, max, sum, columns;
  };
  const auto run = [&](auto attend, auto columns) {
    Result r{std::vector<float>(q.size()), std::vector<float>(static_cast<std::size_t>(rows)),
             std::vector<float>(static_cast<std::size_t>(rows)),
             std::vector<float>(static_cast<std::size_t>(kv.n_pages * kPageTokens), 0.5f)};
    const SoftmaxState state{r.out.data(), r.max.data(), r.sum.data()};
    ResetState(state, rows, d);
    attend(kv, 0, kv.n_pages / 2, false, query, state, workspace->data());
    attend(kv, kv.n_pages / 2, kv.n_pages, true, query, state, workspace->data());
    columns(kv, query, r.max.data(), r.sum.data(), r.columns.data(), workspace->data());
    reference::Finish(state, rows, d);
    return r;
  };
  const Result want = run(reference::AttendStream, reference::ColumnSumsStream);
  ForEachTarget([&] {
    const Result got = run(simd::AttendStream, simd::ColumnSumsStream);
    ExpectNear(got.out, want.out, 2e-4);
    ExpectNear(got.max, want.max, 2e-4);
    ExpectNear(got.columns, want.columns, 1e-3);
  });
}

TEST(Rotation, AttentionOverRotatedPagesIsThatOfTheReference) {
  for (const int64_t d : {64, 80, 128}) {
    std::vector<float> balance = Balance(d, 8), inverse(balance);
    for (float& x : inverse) x = 1 / x;
    const KeyRotation turn{balance.data(), inverse.data()};
    for (const int bits : {8, 4, 3, 2})
      for (const auto& [pages, raw, live] :
           {std::tuple{5, 37, 0.8}, {0, 20, 1.0}, {3, 0, 1.0}, {4, 10, 0.0}, {0, 0, 1.0}})
        for (const int64_t rows : {1, 4, 7, 60}) {
          const test::PackedContext context(d, bits, bits, pages, raw, live, 9);
          StreamView kv = context.view();
          kv.rotation = &turn;
          SCOPED_TRACE(fmt::format("head size {} bits {} pages {} rows {}", d, bits, pages, rows));
          CheckStream(kv, rows, 10);
        }
  }
}

// A cache of `n` tokens with channels of very different size, filled at once or token by token.
struct Filled {
  static constexpr int64_t d = 64;
  explicit Filled(int64_t n_tokens) : n(n_tokens), k(Numbers(n * d, 11)), v(Numbers(n * d, 12)) {
    for (std::size_t i = 0; i < k.size(); ++i)
      if (i % d % 8 == 3) k[i] *= 30;
    std::vector<float> b(static_cast<std::size_t>(d), 1.0f);
    for (std::size_t c = 3; c < b.size(); c += 8) b[c] = 1 / 30.0f;
    rotations = *KeyRotations::Create({1, d}, b);
  }
  LayerCache Make(int k_bits, std::shared_ptr<const KeyRotations> with) const {
    auto cache = LayerCache::Create(nullptr, {1, d}, {1.0, k_bits, 4}, {4, 28}, false, std::move(with));
    EXPECT_TRUE(cache);
    EXPECT_TRUE(cache->Append(k.data(), v.data(), n));
    return std::move(*cache);
  }
  // Largest error of a key, as scorers see it.
  double Error(const LayerCache& cache) const {
    const std::vector<uint32_t> positions = cache.positions(0);
    double worst = 0;
    std::size_t at = 0;
    ForEachKeyBlock(cache.view(0), false, [&](const KeyBlock& block) {
      for (int64_t t = 0; t < kPageTokens; ++t) {
        if (!(block.live >> t & 1)) continue;
        for (int64_t c = 0; c < d; ++c)
          worst = std::max(worst, std::fabs(double{block.k[c * kPageTokens + t]} -
                                            k[static_cast<std::size_t>(positions[at] * d + c)]));
        ++at;
      }
    });
    EXPECT_EQ(at, positions.size());
    return worst;
  }
  int64_t n;
  std::vector<float> k, v;
  std::shared_ptr<const KeyRotations> rotations;
};

TEST(Rotation, ScorersSeeKeysAsTheyWere) {
  const Filled x(500);
  EXPECT_LT(x.Error(x.Make(16, x.rotations)), 0.05);  // half floats of 60
  EXPECT_LT(x.Error(x.Make(8, x.rotations)), 2.0);    // 30 times what the balanced channel loses
  EXPECT_LT(x.Error(x.Make(4, x.rotations)), 20.0);
}

TEST(Rotation, RepackingTurnsWhereOneSideIsTurnedAndSavesWhatItHad) {
  const Filled x(500);
  const LayerCache full = x.Make(16, x.rotations);
  EXPECT_EQ(full.view(0).rotation, nullptr);
  auto eight = full.Repack({1.0, 8, 4});
  ASSERT_TRUE(eight);
  EXPECT_NE(eight->view(0).rotation, nullptr);
  EXPECT_LT(x.Error(*eight), 2.0);
  auto four = eight->Repack({1.0, 4, 4});
  ASSERT_TRUE(four);
  EXPECT_LT(x.Error(*four), 20.0);
  auto back = eight->Repack({1.0, 16, 4});
  ASSERT_TRUE(back);
  EXPECT_EQ(back->view(0).rotation, nullptr);
  EXPECT_LT(x.Error(*back), 2.0);

  const auto blob = SerializeCache(*four);
  ASSERT_TRUE(blob);
  auto loaded = DeserializeCache(nullptr, *blob, "a file", x.rotations);
  ASSERT_TRUE(loaded) << loaded.error().message;
  EXPECT_EQ(x.Error(*loaded), x.Error(*four));
  EXPECT_EQ(DeserializeCache(nullptr, *blob, "a file").error().code, ErrorCode::kMismatch);
  const auto plain = SerializeCache(x.Make(4, nullptr));
  ASSERT_TRUE(plain);
  EXPECT_EQ(DeserializeCache(nullptr, *plain, "a file", x.rotations).error().code, ErrorCode::kMismatch);
}

TEST(Rotation, EvictionLeavesTheKeysOfTheOthers) {
  const Filled x(800);
  LayerCache cache = x.Make(8, x.rotations);
  std::vector<float> scores = Numbers(cache.view(0).n_pages * kPageTokens, 13);
  ASSERT_TRUE(cache.Evict(0, scores, 300));
  EXPECT_EQ(cache.tokens(0), 500);
  EXPECT_LT(x.Error(cache), 4.0);
}

TEST(Rotation, RefusesFactorsThatCannotBeUndone) {
  for (const float bad : {0.0f, -1.0f, INFINITY, NAN, 1e-40f}) {
    std::vector<float> balance(64, 1.0f);
    balance[7] = bad;
    EXPECT_FALSE(KeyRotations::Create({1, 64}, balance)) << bad;
  }
  EXPECT_FALSE(KeyRotations::Create({2, 64}, std::vector<float>(64, 1.0f)));
  const auto ones = KeyRotations::Create({1, 64}, std::vector<float>(64, 1.0f));
  ASSERT_TRUE(ones);
  EXPECT_FALSE(LayerCache::Create(nullptr, {1, 32}, {1.0, 4, 4}, {}, false, *ones));
}

// The weights tell which channels of K are large.
TEST(KeyBalance, TakesOutlierChannelsOut) {
  const test::TempDir dir;
  for (const char* architecture : {"llama", "qwen2", "qwen3"})
    for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0})
      for (const bool fused : {false, true}) {
        if (fused && architecture != std::string("llama")) continue;
        SCOPED_TRACE(fmt::format("{} {} {}", architecture, ggml_type_name(type), fused));
        test::TestModelOptions options;
        options.architecture = architecture;
        options.weight_type = type;
        options.fused_qkv = fused;
        options.k_outlier = 30;
        const std::string path = dir / "m.gguf";
        ASSERT_TRUE(test::WriteTestModel(options, path));
        const auto model = Model::Load(path, {.vocabulary = false});
        ASSERT_TRUE(model) << model.error().message;
        const std::vector<float> balance = (*model)->KeyBalance(1);
        const HyperParams& hp = (*model)->hparams();
        ASSERT_EQ(std::ssize(balance), hp.n_kv_heads * hp.head_size);
        for (int64_t h = 0; h < hp.n_kv_heads; ++h) {
          double log_sum = 0;
          float least = 1e9f, most = 0;
          for (int64_t c = 0; c < hp.head_size; ++c) {
            const float b = balance[static_cast<std::size_t>(h * hp.head_size + c)];
            log_sum += std::log(b);
            least = std::min(least, b);
            most = std::max(most, b);
          }
          EXPECT_NEAR(log_sum, 0, 1e-4);
          // The pair of an outlier channel is about 30 / sqrt(2) times as long: its balance is 1 / sqrt of
          // it.
          EXPECT_GT(most / least, 3.5f);
          EXPECT_LT(most / least, 8.0f);
        }
      }
}

}  // namespace
}  // namespace moend
