#include "moend/engine/compress.h"

#include <ggml.h>

#include <algorithm>

#include "moend/attention/attention.h"
#include "moend/cache/key_feedback.h"
#include "moend/engine/head_budgets.h"

namespace moend {
namespace {

// A capture observes for the scorer that wants most; each one sees the window it asked for.
QueryRows Newest(const QueryRows& all, int64_t tokens, int64_t head_size) {
  const int64_t rows = std::min(all.rows, tokens * all.group);
  return {all.q + (all.rows - rows) * head_size, rows, all.group};
}

Expected<void> FillCache(LayerCache& cache, const DenseView& view, const std::vector<uint32_t>& kept,
                         const float* scores, const std::vector<float>& feedback) {
  MOEND_TRY(cache.BeginFill(view.n_tokens, kept.empty() ? view.n_tokens : std::ssize(kept)));
  auto filled = cache.FillHead(0, view, kept, scores, feedback.empty() ? nullptr : feedback.data());
  auto ended = cache.EndFill();  // also the way to give up
  return filled ? ended : filled;
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
  std::vector<LayerCache> caches;
  for (const Expert& expert : experts) {
    const bool keep_scores = scorer.scorer.needs().accumulated && expert.keep < 1;
    MOEND_ASSIGN(auto cache, LayerCache::Create(ledger, {1, scratch.shape().head_size}, expert, guard,
                                                keep_scores, rotations[caches.size()]));
    caches.push_back(std::move(cache));
  }
  std::vector<Expected<void>> results(static_cast<std::size_t>(heads));
  MOEND_TRY(compute.ParallelFor(heads, [&](int64_t h, int) {
    const auto hi = static_cast<std::size_t>(h);
    std::vector<uint32_t> kept;
    if (evicts(experts[hi]))
      kept = SelectKept((*scores)[hi], guard, KeptTokens(experts[hi].keep, guard, n_tokens));
    const DenseView view = scratch.view(h, n_tokens);
    std::vector<float> feedback;
    if (experts[hi].k_bits < 16 && !scratch.moment(h).empty())
      feedback = FeedbackFactors(scratch.moment(h), scratch.shape().head_size, rotations[hi]->head(0));
    results[hi] = FillCache(caches[hi], view, kept, scratch.accumulated(h), feedback);
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

Expected<void> EvictExcess(LayerCache& cache, const Scorer& scorer, const QueryRows& observed,
                           const HeadQueries* queries) {
  const int64_t excess = cache.Excess(0);
  if (excess <= 0) return {};
  CachedScoreInput in;
  in.kv = cache.view(0);
  in.positions = cache.positions(0);
  in.observed = observed;
  in.accumulated = cache.scores(0);
  in.queries = queries;
  in.tokens_seen = cache.tokens_seen();
  const int64_t rows = std::max<int64_t>(1, observed.rows);
  MOEND_ASSIGN(auto workspace, Buffer<float>::Create(nullptr, WorkspaceFloats(in.kv.layout.head_size, rows)));
  in.workspace = workspace.data();
  std::vector<float> scores(static_cast<std::size_t>(in.kv.n_pages * kPageTokens));
  scorer.ScoreCached(in, scores);
  return cache.Evict(0, scores, excess);
}

}  // namespace moend
