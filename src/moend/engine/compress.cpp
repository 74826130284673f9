#include "moend/engine/compress.h"

#include <ggml.h>

#include <algorithm>
#include <bit>

#include "moend/attention/attention.h"
#include "moend/base/half.h"
#include "moend/cache/key_feedback.h"
#include "moend/cache/value_refit.h"
#include "moend/engine/head_budgets.h"
#include "moend/score/key_blocks.h"

namespace moend {
namespace {

// A capture observes for the scorer that wants most; each one sees the window it asked for.
QueryRows Newest(const QueryRows& all, int64_t tokens, int64_t head_size) {
  const int64_t rows = std::min(all.rows, tokens * all.group);
  QueryRows newest = all;
  newest.q = all.q + (all.rows - rows) * head_size;
  newest.rows = rows;
  return newest;
}

// What to fill a KV head's cache with, and how.
struct Filling {
  std::shared_ptr<Ledger> ledger;
  const Expert& expert;
  const Protected& guard;
  bool keep_scores;
  std::shared_ptr<const KeyRotations> rotation;
  const std::vector<uint32_t>& kept;   // empty: all
  const float* scores;                 // may be null
  const std::vector<float>& feedback;  // may be empty
};

Expected<LayerCache> MakeCache(const Filling& with, const DenseView& view) {
  MOEND_ASSIGN(auto cache, LayerCache::Create(with.ledger, {1, view.head_size}, with.expert, with.guard,
                                              with.keep_scores, with.rotation));
  const auto n = with.kept.empty() ? view.n_tokens : std::ssize(with.kept);
  MOEND_TRY(cache.BeginFill(view.n_tokens, n));
  auto filled =
      cache.FillHead(0, view, with.kept, with.scores, with.feedback.empty() ? nullptr : with.feedback.data());
  auto ended = cache.EndFill();  // also the way to give up
  if (!filled) return Forward(filled);
  if (!ended) return Forward(ended);
  return cache;
}

// f32 [live tokens][head_size], in the order of LayerCache::positions(): keys as they are stored.
std::vector<float> StoredKeys(const LayerCache& cache) {
  const StreamView view = cache.view(0);
  const int64_t d = view.layout.head_size;
  std::vector<float> keys;
  ForEachKeyBlock(view, false, [&](const KeyBlock& block) {
    for (uint64_t live = block.live; live != 0; live &= live - 1) {
      const int64_t t = std::countr_zero(live);
      for (int64_t c = 0; c < d; ++c) keys.push_back(block.k[c * kPageTokens + t]);
    }
  });
  return keys;
}

// The cache once more with values that make up for what is gone, where that helps.
Expected<LayerCache> Refit(Compute& compute, LayerCache cache, const Filling& with, const DenseView& view,
                           const QueryRows& reference) {
  const std::vector<uint32_t> positions = cache.positions(0);
  MOEND_ASSIGN(const ValueRefit refit,
               RefitValues(view, positions, StoredKeys(cache), reference, compute.Threads()));
  if (refit.v.empty()) return cache;
  const int64_t d = view.head_size;
  std::vector<uint16_t> values(view.v, view.v + view.n_tokens * d);
  for (std::size_t i = 0; i < positions.size(); ++i)
    for (int64_t c = 0; c < d; ++c)
      values[positions[i] * static_cast<std::size_t>(d) + static_cast<std::size_t>(c)] =
          FloatToFiniteHalf(refit.v[i * static_cast<std::size_t>(d) + static_cast<std::size_t>(c)]);
  DenseView moved = view;
  moved.v = values.data();
  return MakeCache(with, moved);
}

}  // namespace

Expected<std::vector<std::vector<float>>> ScoreScratch(Compute& compute, const LayerScratch& scratch,
                                                       int64_t n_tokens, const LayerScorer& with) {
  const Scorer& scorer = with.scorer;
  const KvShape& shape = scratch.shape();
  std::vector<std::vector<float>> scores(static_cast<std::size_t>(shape.n_kv_heads));
  std::vector<Buffer<float>> workspaces;
  const int64_t rows = std::max<int64_t>(1, scratch.observed(0).rows);
  for (int i = 0; i < compute.n_threads(); ++i) {
    MOEND_ASSIGN(auto ws, Buffer<float>::Create(nullptr, WorkspaceFloats(shape.head_size, rows)));
    workspaces.push_back(std::move(ws));
  }
  MOEND_TRY(compute.ParallelFor(shape.n_kv_heads, [&](int64_t h, int thread) {
    auto& out = scores[static_cast<std::size_t>(h)];
    out.resize(static_cast<std::size_t>(n_tokens));
    PrefillScoreInput in;
    in.kv = scratch.view(h, n_tokens);
    in.observed = Newest(scratch.observed(h), scorer.needs().observed_queries, shape.head_size);
    in.accumulated = scratch.accumulated(h);
    in.needed = scratch.needed(h);
    in.expected = scratch.expected(h);
    in.queries = with.head(h);
    in.workspace = workspaces[static_cast<std::size_t>(thread)].data();
    scorer.ScorePrefill(in, out);
  }));
  return scores;
}

Expected<std::vector<LayerCache>> CompressScratch(
    Compute& compute, const std::shared_ptr<Ledger>& ledger, const LayerScratch& scratch, int64_t n_tokens,
    std::span<const Expert> given, const Protected& guard,
    std::span<const std::shared_ptr<const KeyRotations>> rotations, const LayerScorer& scorer,
    const std::vector<std::vector<float>>* scores) {
  const int64_t heads = scratch.shape().n_kv_heads;
  const auto evicts = [&](const Expert& e) { return KeptTokens(e.keep, guard, n_tokens) < n_tokens; };
  std::vector<Expert> experts(given.begin(), given.end());
  std::vector<std::vector<float>> made;
  if (!scores && std::any_of(experts.begin(), experts.end(), evicts)) {
    MOEND_ASSIGN(made, ScoreScratch(compute, scratch, n_tokens, scorer));
    scores = &made;
  }
  if (scorer.shares && evicts(experts[0])) {
    const int64_t score_bytes = scorer.scorer.needs().accumulated ? 4 : 0;
    MOEND_ASSIGN(experts, SplitHeads(*scores, experts[0], guard, scratch.shape().head_size, score_bytes));
  }
  std::vector<std::vector<uint32_t>> kept(experts.size());
  std::vector<std::vector<float>> feedback(experts.size());
  const auto filling = [&](std::size_t h) {
    const bool keep_scores = scorer.scorer.needs().accumulated && experts[h].keep < 1;
    return Filling{ledger,
                   experts[h],
                   guard,
                   keep_scores,
                   rotations[h],
                   kept[h],
                   scratch.accumulated(static_cast<int64_t>(h)),
                   feedback[h]};
  };
  std::vector<Expected<LayerCache>> made_caches;
  for (int64_t h = 0; h < heads; ++h)
    made_caches.push_back(Fail(ErrorCode::kInternal, "KV head {} was not compressed", h));
  MOEND_TRY(compute.ParallelFor(heads, [&](int64_t h, int) {
    const auto hi = static_cast<std::size_t>(h);
    if (evicts(experts[hi]))
      kept[hi] = SelectKept((*scores)[hi], guard, KeptTokens(experts[hi].keep, guard, n_tokens));
    if (experts[hi].k_bits < 16 && !scratch.moment(h).empty())
      feedback[hi] = FeedbackFactors(scratch.moment(h), scratch.shape().head_size, rotations[hi]->head(0));
    made_caches[hi] = MakeCache(filling(hi), scratch.view(h, n_tokens));
  }));
  std::vector<LayerCache> caches;
  for (std::size_t h = 0; h < made_caches.size(); ++h) {
    if (!made_caches[h]) return Forward(made_caches[h]);
    caches.push_back(std::move(*made_caches[h]));
    if (!scorer.refit || experts[h] == Expert{}) continue;
    const auto head = static_cast<int64_t>(h);
    MOEND_ASSIGN(caches[h], Refit(compute, std::move(caches[h]), filling(h), scratch.view(head, n_tokens),
                                  scorer.scorer.needs().repetition ? scratch.reference(head)
                                                                   : scratch.own_reference(head)));
  }
  return caches;
}

Expected<std::vector<LayerCache>> WindowCaches(Compute& compute, const std::shared_ptr<Ledger>& ledger,
                                               const LayerScratch& scratch, int64_t n_tokens,
                                               int64_t window) {
  const KvShape& shape = scratch.shape();
  std::vector<LayerCache> caches;
  for (int64_t h = 0; h < shape.n_kv_heads; ++h) {
    MOEND_ASSIGN(auto cache, LayerCache::CreateSliding(ledger, {1, shape.head_size}, window));
    caches.push_back(std::move(cache));
  }
  std::vector<Expected<void>> results(caches.size());
  MOEND_TRY(compute.ParallelFor(shape.n_kv_heads, [&](int64_t h, int) {
    const DenseView view = scratch.view(h, n_tokens);
    results[static_cast<std::size_t>(h)] = caches[static_cast<std::size_t>(h)].AppendNewest({&view, 1});
  }));
  for (auto& r : results)
    if (!r) return Forward(r);
  return caches;
}

Expected<void> AppendScratch(Compute& compute, std::span<LayerCache> heads, const LayerScratch& scratch) {
  const int64_t d = scratch.shape().head_size, n = scratch.n_tokens();
  std::vector<Expected<void>> results(heads.size());
  MOEND_TRY(compute.ParallelFor(static_cast<int64_t>(heads.size()), [&](int64_t h, int) {
    const DenseView view = scratch.view(h, n);
    if (LayerCache& head = heads[static_cast<std::size_t>(h)]; head.sliding()) {
      results[static_cast<std::size_t>(h)] = head.AppendNewest({&view, 1});
      return;
    }
    std::vector<float> k(static_cast<std::size_t>(kPageTokens * d)), v(k.size());
    for (int64_t begin = 0; begin < n; begin += kPageTokens) {
      const int64_t m = std::min(kPageTokens, n - begin);
      const uint16_t* page = view.k + begin * d;  // begin is a multiple of a page
      for (int64_t t = 0; t < m; ++t)
        for (int64_t c = 0; c < d; ++c)
          k[static_cast<std::size_t>(t * d + c)] = ggml_fp16_to_fp32(page[c * kPageTokens + t]);
      ggml_fp16_to_fp32_row(view.v + begin * d, v.data(), m * d);
      auto appended = heads[static_cast<std::size_t>(h)].Append(k.data(), v.data(), m);
      if (!appended) {
        results[static_cast<std::size_t>(h)] = Forward(appended);
        return;
      }
    }
  }));
  for (auto& r : results)
    if (!r) return Forward(r);
  return {};
}

Expected<void> EvictExcess(LayerCache& cache, const Scorer& scorer, int64_t prompt_tokens,
                           const QueryRows& observed, const HeadQueries* queries) {
  MOEND_TRY(cache.PackExcess());
  const int64_t excess = cache.Excess(0);
  if (excess <= 0) return cache.Evict(0, {}, 0);
  CachedScoreInput in;
  in.kv = cache.view(0);
  in.positions = cache.positions(0);
  in.observed = observed;
  in.accumulated = cache.scores(0);
  in.queries = queries;
  in.tokens_seen = cache.tokens_seen();
  in.prompt_tokens = prompt_tokens;
  const int64_t rows = std::max<int64_t>(1, observed.rows);
  MOEND_ASSIGN(auto workspace, Buffer<float>::Create(nullptr, WorkspaceFloats(in.kv.layout.head_size, rows)));
  in.workspace = workspace.data();
  std::vector<float> scores(static_cast<std::size_t>(in.kv.n_pages * kPageTokens));
  scorer.ScoreCached(in, scores);
  return cache.Evict(0, scores, excess);
}

}  // namespace moend
