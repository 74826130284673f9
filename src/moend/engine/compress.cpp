#include "moend/engine/compress.h"

#include <ggml.h>

#include <algorithm>

#include "moend/attention/attention.h"

namespace moend {
namespace {

// A capture observes for the scorer that wants most; each one sees the window it asked for.
QueryRows Newest(const QueryRows& all, int64_t tokens, int64_t head_size) {
  const int64_t rows = std::min(all.rows, tokens * all.group);
  return {all.q + (all.rows - rows) * head_size, rows, all.group};
}

}  // namespace

Expected<std::vector<std::vector<float>>> ScoreScratch(Compute& compute, const LayerScratch& scratch,
                                                       int64_t n_tokens, const Scorer& scorer) {
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
    in.workspace = workspaces[static_cast<std::size_t>(thread)].data();
    scorer.ScorePrefill(in, out);
  }));
  return scores;
}

Expected<LayerCache> CompressScratch(const std::shared_ptr<Ledger>& ledger, const LayerScratch& scratch,
                                     int64_t n_tokens, const Expert& expert, const Protected& guard,
                                     const Scorer& scorer, const std::vector<std::vector<float>>* scores) {
  const KvShape& shape = scratch.shape();
  const bool keep_scores = scorer.needs().accumulated && expert.keep < 1;
  MOEND_ASSIGN(auto cache, LayerCache::Create(ledger, shape, expert, guard, keep_scores));
  std::vector<DenseView> views;
  std::vector<std::vector<uint32_t>> kept(static_cast<std::size_t>(shape.n_kv_heads));
  std::vector<const float*> slot_scores;
  const int64_t count = KeptTokens(expert.keep, guard, n_tokens);
  for (int64_t h = 0; h < shape.n_kv_heads; ++h) {
    views.push_back(scratch.view(h, n_tokens));
    slot_scores.push_back(keep_scores ? scratch.accumulated(h) : nullptr);
    if (count < n_tokens && scores)
      kept[static_cast<std::size_t>(h)] = SelectKept((*scores)[static_cast<std::size_t>(h)], guard, count);
  }
  MOEND_TRY(cache.Fill(views, kept, slot_scores));
  return cache;
}

Expected<void> AppendScratch(LayerCache& cache, const LayerScratch& scratch) {
  const KvShape& shape = scratch.shape();
  const int64_t d = shape.head_size, heads = shape.n_kv_heads, n = scratch.n_tokens();
  std::vector<float> k(static_cast<std::size_t>(kPageTokens * heads * d)), v(k.size());
  for (int64_t begin = 0; begin < n; begin += kPageTokens) {
    const int64_t m = std::min(kPageTokens, n - begin);
    for (int64_t h = 0; h < heads; ++h) {
      const DenseView view = scratch.view(h, n);
      const uint16_t* page = view.k + begin * d;  // begin is a multiple of a page
      for (int64_t t = 0; t < m; ++t) {
        float* to = k.data() + (t * heads + h) * d;
        for (int64_t c = 0; c < d; ++c) to[c] = ggml_fp16_to_fp32(page[c * kPageTokens + t]);
        ggml_fp16_to_fp32_row(view.v + (begin + t) * d, v.data() + (t * heads + h) * d, d);
      }
    }
    MOEND_TRY(cache.Append(k.data(), v.data(), m));
  }
  return {};
}

Expected<void> EvictExcess(LayerCache& cache, const Scorer& scorer,
                           const std::function<QueryRows(int64_t)>& observed) {
  for (int64_t h = 0; h < cache.shape().n_kv_heads; ++h) {
    const int64_t excess = cache.Excess(h);
    if (excess <= 0) continue;
    CachedScoreInput in;
    in.kv = cache.view(h);
    in.positions = cache.positions(h);
    in.observed = observed(h);
    in.accumulated = cache.scores(h);
    in.tokens_seen = cache.tokens_seen();
    const int64_t rows = std::max<int64_t>(1, in.observed.rows);
    MOEND_ASSIGN(auto workspace,
                 Buffer<float>::Create(nullptr, WorkspaceFloats(in.kv.layout.head_size, rows)));
    in.workspace = workspace.data();
    std::vector<float> scores(static_cast<std::size_t>(in.kv.n_pages * kPageTokens));
    scorer.ScoreCached(in, scores);
    MOEND_TRY(cache.Evict(h, scores, excess));
  }
  return {};
}

}  // namespace moend
