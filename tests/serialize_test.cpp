#include "moend/cache/serialize.h"

#include <gtest/gtest.h>

#include <cstring>
#include <tuple>

#include "moend/base/half.h"
#include "tests/support/layer_model.h"
#include "tests/support/seal.h"

namespace moend::test {
namespace {

void ExpectSame(const LayerCache& a, LayerCache& b, LayerCache& original) {
  EXPECT_EQ(a.shape(), b.shape());
  EXPECT_EQ(a.expert(), b.expert());
  EXPECT_EQ(a.guard(), b.guard());
  EXPECT_EQ(a.tokens_seen(), b.tokens_seen());
  const int64_t hs = a.shape().head_size;
  for (int64_t h = 0; h < a.shape().n_kv_heads; ++h) {
    EXPECT_EQ(a.positions(h), b.positions(h));
    const StreamView x = a.view(h), y = b.view(h);
    ASSERT_EQ(x.n_pages, y.n_pages);
    ASSERT_EQ(x.n_raw, y.n_raw);
    EXPECT_TRUE(std::equal(x.live, x.live + x.n_pages, y.live));
    for (int64_t i = 0; i < x.n_pages; ++i)
      EXPECT_EQ(std::memcmp(x.pages[i], y.pages[i], static_cast<std::size_t>(x.layout.refs)), 0);
    for (int64_t i = 0; i < x.n_raw; ++i)
      for (int64_t c = 0; c < hs; ++c) EXPECT_EQ(*RawKey(x, i, c), *RawKey(y, i, c));
    EXPECT_TRUE(std::equal(x.raw_v, x.raw_v + x.n_raw * hs, y.raw_v));
    const float *s = original.scores(h), *t = b.scores(h);
    ASSERT_EQ(s == nullptr, t == nullptr);
    EXPECT_TRUE(!s || std::equal(s, s + x.n_pages * 64, t));
  }
}

LayerCache SomeCache(Random& random, const std::shared_ptr<Ledger>& ledger, int64_t n,
                     bool keep_scores = true) {
  const KvShape shape{Pick(random, 1, 3), 16 * Pick(random, 1, 5)};
  const Protected guard{Pick(random, 0, 10), Pick(random, 0, 40)};
  LayerCache cache =
      MakeCache(ledger, shape, {0.5, kBitWidths[random() % 5], kBitWidths[random() % 5]}, guard, keep_scores);
  Append(cache, n);
  for (int64_t h = 0; h < shape.n_kv_heads; ++h) {
    const auto scores = RandomScores(random, cache.view(h).n_pages * 64);
    if (float* own = cache.scores(h)) std::copy(scores.begin(), scores.end(), own);
    EXPECT_TRUE(cache.Evict(h, scores, Pick(random, 0, 100)));
  }
  return cache;
}

TEST(Serialize, GivesTheSameCacheBack) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    Random random(seed);
    auto ledger = std::make_shared<Ledger>(), other = std::make_shared<Ledger>();
    LayerCache cache =
        SomeCache(random, ledger, seed < 5 ? static_cast<int64_t>(seed) : Pick(random, 1, 600), seed % 3);
    const auto blob = SerializeCache(cache);
    ASSERT_TRUE(blob);
    auto loaded = DeserializeCache(other, *blob, "a file");
    ASSERT_TRUE(loaded) << loaded.error().message;
    ExpectSame(cache, *loaded, cache);
    EXPECT_EQ(loaded->bytes(), other->live());
    EXPECT_LE(loaded->bytes(), cache.bytes());
    EXPECT_EQ(*SerializeCache(*loaded), *blob);
    // Both go on alike.
    Append(cache, 130);
    Append(*loaded, 130);
    ExpectSame(cache, *loaded, cache);
    EXPECT_EQ(loaded->bytes(), other->live());
  }
}

TEST(Serialize, EveryTruncationIsCorrupt) {
  Random random(1);
  const auto blob = SerializeCache(SomeCache(random, nullptr, 300));
  for (std::size_t size = 0; size < blob->size(); size += size < 300 ? 1 : 97) {
    std::string cut = blob->substr(0, size);
    EXPECT_EQ(DeserializeCache(nullptr, cut, "x").error().code, ErrorCode::kCorrupt) << size;
    if (size < 8) continue;
    Seal(cut);
    EXPECT_EQ(DeserializeCache(nullptr, cut, "x").error().code, ErrorCode::kCorrupt) << size;
  }
  std::string longer = *blob + std::string(16, '\0');
  Seal(longer);
  EXPECT_EQ(DeserializeCache(nullptr, longer, "x").error().code, ErrorCode::kCorrupt);
}

TEST(Serialize, EveryFlippedBitIsNoticed) {
  Random random(2);
  const auto blob = SerializeCache(SomeCache(random, nullptr, 200));
  for (int round = 0; round < 1000; ++round) {
    std::string bad = *blob;
    bad[random() % bad.size()] ^= static_cast<char>(1 << random() % 8);
    const auto loaded = DeserializeCache(nullptr, bad, "x");
    ASSERT_FALSE(loaded);
    ASSERT_TRUE(loaded.error().code == ErrorCode::kCorrupt || loaded.error().code == ErrorCode::kMismatch);
  }
}

// Damage with a right checksum: refused, or a cache that can be used in every way without harm.
TEST(Serialize, SealedDamageIsRefusedOrHarmless) {
  int refused = 0;
  for (uint64_t seed = 0; seed < 1500; ++seed) {
    Random random(seed);
    std::string bad = *SerializeCache(SomeCache(random, nullptr, Pick(random, 0, 250), seed % 2));
    const int64_t changes = Pick(random, 1, 4);
    for (int64_t i = 0; i < changes; ++i) {
      // Mostly in the header and the tables, where the numbers are.
      const std::size_t at =
          random() % std::min<std::size_t>(bad.size() - 8, random() % 4 ? 160 : bad.size() - 8);
      if (random() % 2) {
        bad[at] ^= static_cast<char>(1 << random() % 8);
      } else {
        const int64_t values[] = {0, 1, -1, 64, INT64_MAX, INT64_MIN, int64_t{1} << 31, int64_t{1} << 32};
        std::memcpy(bad.data() + at / 8 * 8, &values[random() % 8],
                    std::min<std::size_t>(8, bad.size() - at / 8 * 8));
      }
    }
    Seal(bad);
    auto ledger = std::make_shared<Ledger>();
    auto loaded = DeserializeCache(ledger, bad, "x");
    if (!loaded) {
      ++refused;
      ASSERT_TRUE(loaded.error().code == ErrorCode::kCorrupt || loaded.error().code == ErrorCode::kMismatch);
      ASSERT_EQ(ledger->live(), 0);
      continue;
    }
    ASSERT_EQ(loaded->bytes(), ledger->live());
    for (int64_t h = 0; h < loaded->shape().n_kv_heads; ++h) {
      ASSERT_EQ(std::ssize(loaded->positions(h)), loaded->tokens(h));
      ASSERT_TRUE(loaded->Evict(h, RandomScores(random, loaded->view(h).n_pages * 64), 70));
    }
    if (loaded->tokens_seen() < 1000) Append(*loaded, 130);
    ASSERT_EQ(loaded->bytes(), ledger->live());
  }
  EXPECT_GT(refused, 750);
}

TEST(Serialize, OtherVersionsAreNamed) {
  Random random(3);
  std::string blob = *SerializeCache(SomeCache(random, nullptr, 10));
  blob[8] = 1;
  const auto loaded = DeserializeCache(nullptr, blob, "old.kv");
  ASSERT_FALSE(loaded);
  EXPECT_EQ(loaded.error().code, ErrorCode::kMismatch);
  EXPECT_NE(loaded.error().message.find("old.kv"), std::string::npos);
  EXPECT_NE(loaded.error().message.find("version 1"), std::string::npos);
}

TEST(Serialize, TablesThatContradictEachOtherAreRefused) {
  LayerCache cache = MakeCache(nullptr, {1, 16}, {0.5, 4, 4}, {2, 4});
  const int64_t n = 2 + 4 + 64 * 4;
  Append(cache, n);
  std::vector<float> scores(64 * 4);
  for (std::size_t i = 0; i < scores.size(); ++i) scores[i] = static_cast<float>(i);
  ASSERT_TRUE(cache.Evict(0, scores, 30));  // positions 2 to 31
  const std::string blob = *SerializeCache(cache);
  const int64_t bitmap = 80 + 8, live = bitmap + BitmapBytes(n);
  const auto flip = [](std::string& bytes, int64_t at, int64_t bit) {
    bytes[static_cast<std::size_t>(at + bit / 8)] ^= static_cast<char>(1 << bit % 8);
  };
  const auto is_refused = [](std::string& bytes) {
    Seal(bytes);
    const auto loaded = DeserializeCache(nullptr, bytes, "x");
    return !loaded && loaded.error().code == ErrorCode::kCorrupt;
  };
  // One position for another: an ordinary one is no contradiction, a protected one or one beyond the end is.
  for (const auto& [gone, there, refused] : std::vector<std::tuple<int64_t, int64_t, bool>>{
           {40, 5, false}, {1, 5, true}, {n - 1, 5, true}, {n - 4, 5, true}, {40, n, true}}) {
    std::string bytes = blob;
    flip(bytes, bitmap, gone);
    flip(bytes, bitmap, there);
    EXPECT_EQ(is_refused(bytes), refused) << gone << " for " << there;
  }
  // 30 slots are dead; 34 more are a page's worth, which eviction would have given back.
  for (const int64_t more : {33, 34}) {
    std::string bytes = blob;
    for (int64_t i = 0; i < more; ++i) {
      flip(bytes, bitmap, 100 + i);
      flip(bytes, live, 128 + i);
    }
    EXPECT_EQ(is_refused(bytes), more == 34);
  }
  std::string bytes = blob;
  flip(bytes, live, 128);  // a slot less than positions
  EXPECT_TRUE(is_refused(bytes));
}

TEST(Serialize, NumbersThatAreNotFiniteAreRefused) {
  for (int bits : {16, 4}) {
    LayerCache cache = MakeCache(nullptr, {1, 16}, {1.0, bits, bits}, {0, 0});
    Append(cache, 70);
    const std::string blob = *SerializeCache(cache);
    const StreamView view = cache.view(0);
    const std::size_t raw = blob.size() - 8 - 2 * 16 * (16 + 6);
    const std::size_t page = raw - static_cast<std::size_t>(view.layout.refs);
    const int64_t in_page = bits == 16 ? view.layout.v_codes + 10 : view.layout.k_min + 4;
    for (const std::size_t at : {raw, raw + 2 * 16 * 16 + 8, page + static_cast<std::size_t>(in_page)}) {
      std::string bad = blob;
      const uint16_t nan = 0x7E00;
      std::memcpy(bad.data() + at, &nan, 2);
      Seal(bad);
      const auto loaded = DeserializeCache(nullptr, bad, "x");
      ASSERT_FALSE(loaded);
      EXPECT_NE(loaded.error().message.find("finite"), std::string::npos);
    }
  }
}

}  // namespace
}  // namespace moend::test
