// A naive model of what a LayerCache must hold, and the comparison with it.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "moend/base/half.h"
#include "moend/cache/codec.h"
#include "moend/cache/layer_cache.h"
#include "moend/plan/layout.h"

namespace moend::test {

using Random = std::mt19937_64;

inline int64_t Pick(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

// Element of K (side 0) or V (side 1): a fixed function of where it is, so that any token can be checked.
inline float Value(int side, int64_t head, int64_t position, int64_t channel) {
  uint64_t x = static_cast<uint64_t>(((position * 17 + head) * 257 + channel) * 2 + side);
  x = (x ^ (x >> 31)) * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 29)) * 0xBF58476D1CE4E5B9u;
  const float unit = static_cast<float>(x >> 40) * 0x1p-24f;
  return HalfToFloat(FloatToHalf((unit * 2 - 1) * (channel % 7 == 3 ? 8.0f : 1.0f)));
}

// Where channel c of raw token i is.
inline const uint16_t* RawKey(const StreamView& view, int64_t i, int64_t c) {
  return view.raw_k + i / 16 * 16 * view.layout.head_size + c * view.RawStride(i / 16) + i % 16;
}

struct Dense {
  std::vector<uint16_t> k, v;
  DenseView view;
};

inline Dense MakeDense(int64_t hs, int64_t head, int64_t n) {
  Dense d;
  d.k.resize((n + 63) / 64 * 64 * hs);
  d.v.resize(n * hs);
  for (int64_t p = 0; p < n; ++p) {
    for (int64_t c = 0; c < hs; ++c) {
      d.k[p / 64 * 64 * hs + c * 64 + p % 64] = FloatToHalf(Value(0, head, p, c));
      d.v[p * hs + c] = FloatToHalf(Value(1, head, p, c));
    }
  }
  d.view = {hs, d.k.data(), d.v.data(), n};
  return d;
}

inline void Append(LayerCache& cache, int64_t n) {
  const int64_t heads = cache.shape().n_kv_heads, hs = cache.shape().head_size, first = cache.tokens_seen();
  std::vector<float> k(n * heads * hs), v(n * heads * hs);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t c = 0; c < hs; ++c) {
        k[(i * heads + h) * hs + c] = Value(0, h, first + i, c);
        v[(i * heads + h) * hs + c] = Value(1, h, first + i, c);
      }
    }
  }
  const auto done = cache.Append(k.data(), v.data(), n);
  ASSERT_TRUE(done) << done.error().message;
}

// Everything a cache must hold: for each head the positions, in order, and how far values may be off. K of a
// page is packed each time that tokens come into it, 16 at least but for what an eviction makes room for, and
// when an eviction packs it anew. Each packing of K adds at most half a step of a group that spans the
// values' range, widened by the error so far; V is quantized once.
struct Model {
  std::vector<std::set<uint32_t>> positions;
  int packings = 1;
};

// The error of `packings` packings to `bits` of values within [-8, 8].
inline double ErrorBound(int bits, int packings) {
  double reach = 8, error = 0;
  for (int i = 0; i < packings; ++i) {
    const double bound = RoundTripBound(bits, -reach, reach);
    error += bound;
    reach += bound;
    if (bits == 16) break;  // half floats come back as they are
  }
  return error;
}

inline void Check(const LayerCache& cache, const Model& model) {
  const KvShape shape = cache.shape();
  const int64_t hs = shape.head_size;
  const double k_bound = ErrorBound(cache.expert().k_bits, model.packings),
               v_bound = ErrorBound(cache.expert().v_bits, 1);
  std::vector<float> k(64 * hs), v(64 * hs);
  for (int64_t h = 0; h < shape.n_kv_heads; ++h) {
    const auto positions = cache.positions(h);
    const std::set<uint32_t> unordered(positions.begin(), positions.end());
    ASSERT_EQ(unordered, model.positions[h]);
    ASSERT_EQ(positions.size(), unordered.size());
    ASSERT_EQ(static_cast<int64_t>(positions.size()), cache.tokens(h));

    const StreamView view = cache.view(h);
    ASSERT_LT(view.n_raw,
              cache.guard().sinks + cache.guard().window + (cache.sliding() ? kPackTokens : kPageTokens));
    std::size_t next = 0;
    int64_t dead = 0;
    for (int64_t page = 0; page < view.n_pages; ++page) {
      UnpackPage(view.layout, view.pages[page], k.data(), v.data());
      dead += 64 - std::popcount(view.live[page]);
      for (int64_t t = 0; t < 64; ++t) {
        if (!(view.live[page] >> t & 1)) continue;
        ASSERT_LT(next, positions.size());
        const uint32_t position = positions[next];
        if (next > 0) {
          ASSERT_LT(positions[next - 1], position);
        }
        ++next;
        for (int64_t c = 0; c < hs; ++c) {
          ASSERT_NEAR(k[t * hs + c], Value(0, h, position, c), k_bound) << "position " << position;
          ASSERT_NEAR(v[t * hs + c], Value(1, h, position, c), v_bound) << "position " << position;
        }
      }
    }
    if (view.n_pages > 0) {
      const int room = std::countl_zero(view.live[view.n_pages - 1]);
      ASSERT_LT(room, 64);
      ASSERT_LT(dead - room, 64);
    }
    ASSERT_EQ(static_cast<int64_t>(positions.size() - next), view.n_raw);
    for (int64_t i = 0; i < view.n_raw; ++i) {
      const uint32_t position = positions[next + i];
      if (i > 0) {
        ASSERT_LT(positions[next + i - 1], position);
      }
      if (i < cache.guard().sinks) {
        ASSERT_EQ(position, i);
      }
      for (int64_t c = 0; c < hs; ++c) {
        ASSERT_EQ(HalfToFloat(*RawKey(view, i, c)), Value(0, h, position, c));
        ASSERT_EQ(HalfToFloat(view.raw_v[i * hs + c]), Value(1, h, position, c));
      }
    }
    // What vectors read.
    for (int64_t block = 0; block * 16 < view.n_raw; ++block)
      for (int64_t c = 0; c < hs; ++c)
        for (int64_t t = 0; t < 16; ++t)
          ASSERT_TRUE(std::isfinite(HalfToFloat(RawKey(view, block * 16, c)[t])));
  }
}

inline Model Everything(int64_t heads, int64_t n) {
  Model model;
  model.packings = 4;  // a page fills in four steps at most
  model.positions.resize(heads);
  for (auto& set : model.positions)
    for (int64_t p = 0; p < n; ++p) set.insert(set.end(), static_cast<uint32_t>(p));
  return model;
}

inline std::vector<float> RandomScores(Random& random, int64_t n) {
  std::vector<float> scores(n);
  for (float& s : scores) s = static_cast<float>(random() % 50);  // with ties
  return scores;
}

// What Evict must do, the slow way.
inline void EvictModel(Model& model, const LayerCache& cache, int64_t head, const std::vector<float>& scores,
                       int64_t count) {
  const StreamView view = cache.view(head);
  const auto positions = cache.positions(head);
  std::vector<std::pair<float, uint32_t>> live;
  std::size_t next = 0;
  for (int64_t slot = 0; slot < view.n_pages * 64; ++slot)
    if (view.live[slot / 64] >> (slot % 64) & 1) live.emplace_back(scores[slot], positions[next++]);
  std::sort(live.begin(), live.end());
  for (int64_t i = 0; i < std::min<int64_t>(count, static_cast<int64_t>(live.size())); ++i)
    model.positions[head].erase(live[i].second);
}

inline LayerCache MakeCache(std::shared_ptr<Ledger> ledger, const KvShape& shape, const Expert& expert,
                            const Protected& guard = {}, bool keep_scores = false) {
  auto cache = LayerCache::Create(std::move(ledger), shape, expert, guard, keep_scores);
  EXPECT_TRUE(cache) << cache.error().message;
  return std::move(*cache);
}

inline std::vector<uint32_t> RandomKept(Random& random, const Protected& guard, int64_t n, int64_t count) {
  std::set<uint32_t> kept;
  for (int64_t p = 0; p < std::min(n, guard.sinks); ++p) kept.insert(static_cast<uint32_t>(p));
  for (int64_t p = std::max<int64_t>(0, n - guard.window); p < n; ++p) kept.insert(static_cast<uint32_t>(p));
  while (static_cast<int64_t>(kept.size()) < count) kept.insert(static_cast<uint32_t>(random() % n));
  return {kept.begin(), kept.end()};
}

}  // namespace moend::test
