// Importance of cached tokens: which ones a KV head can do without. A scorer gives every token a float,
// higher is more important; sinks and the newest tokens are protected by the selection, not by the scorer.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moend/attention/params.h"
#include "moend/base/error.h"
#include "moend/cache/layer_cache.h"
#include "moend/score/query_model.h"

namespace moend {

// What a scorer wants to be handed, so that the engine gathers nothing in vain.
struct ScorerNeeds {
  int64_t observed_queries = 0;  // newest query tokens to hand over (SnapKV, TOVA: their observation window)
  bool accumulated = false;      // attention each token received from all queries so far (H2O)
  bool repetition = false;       // what a repetition of the prompt attends to (reconstruct)
  bool learned = false;          // what was learned to expect of a repetition (plan/learned_scores.h)
  int64_t reference_tokens =
      0;                     // of the repetition or else the prompt, spread over it: their queries are kept
  bool query_stats = false;  // statistics of the model's queries before RoPE (trigonometric)
};

ScorerNeeds Union(const ScorerNeeds& a, const ScorerNeeds& b);

// One KV head at the end of a prefill of n tokens (kv.n_tokens).
struct PrefillScoreInput {
  DenseView kv;
  // Post-RoPE queries of the newest tokens, times the softmax scale; row order as in QueryRows. rows / group
  // tokens.
  QueryRows observed;
  const float* accumulated = nullptr;    // [n_tokens], if needed
  const float* needed = nullptr;         // [n_tokens], if a repetition is asked for (LayerScratch::needed)
  const float* expected = nullptr;       // [n_tokens], if learned scores are (LayerScratch::expected)
  const HeadQueries* queries = nullptr;  // if needed
  float* workspace = nullptr;            // WorkspaceFloats(head_size, observed.rows) floats
};

// One KV head while generating; only paged tokens are scored.
struct CachedScoreInput {
  StreamView kv;
  std::vector<uint32_t> positions;     // as LayerCache::positions()
  QueryRows observed;                  // newest queries
  const float* accumulated = nullptr;  // [n_pages * 64]
  const HeadQueries* queries = nullptr;
  int64_t tokens_seen = 0;
  int64_t prompt_tokens = 0;  // of which so many were scored by ScorePrefill()
  float* workspace = nullptr;
};

class Scorer {
 public:
  virtual ~Scorer() = default;
  virtual std::string_view name() const = 0;
  virtual ScorerNeeds needs() const = 0;
  // scores: [n_tokens]
  virtual void ScorePrefill(const PrefillScoreInput& in, std::span<float> scores) const = 0;
  // scores: [n_pages * 64]; what dead slots get does not matter
  virtual void ScoreCached(const CachedScoreInput& in, std::span<float> scores) const = 0;
  // What scores this layer: the scorer itself, or one of those that it is made of.
  virtual const Scorer& of_layer(int64_t) const { return *this; }
  virtual int64_t layers() const { return 0; }  // how many it is made for; 0: any number
};

// By name; kNotFound lists the names. What is not finite scores lowest.
//   reconstruct
//              what the outputs of a model that repeats the prompt lose in squares without the token: a
//              second reading, as in KVzip (arXiv 2505.23416), which takes the largest share of attention
//              instead; that loses twice as much (docs/results.md). Tokens that come later, while generating,
//              are judged by keydiff
//   learned    what calibration learned to expect of that second reading from the hidden states of the first
//              (plan/learned_scores.h), which then suffices
//   streaming  the position: older is less important (StreamingLLM, arXiv 2309.17453)
//   snapkv     attention of the newest 32 queries, maximum over 7 neighbours (arXiv 2404.14469)
//   h2o        attention from all queries so far, a plain sum as in the paper: it favours old tokens and
//              counts on a wide Protected::window (arXiv 2306.14048)
//   tova       attention of the newest query (arXiv 2401.06104)
//   keydiff    minus the cosine similarity to the mean key (arXiv 2504.15364)
//   expected   attention expected from normally distributed queries (after arXiv 2510.00636)
//   trig       expected logits of queries to come, from the model's queries before RoPE, which the profile
//              measured: the scorer of the MoE-nD paper (TriAttention, arXiv 2604.04921)
//   knorm      minus the length of the key (arXiv 2406.11430)
//   random     a fixed hash of the position
// Names with commas between them, one a layer, make a scorer whose of_layer() differ; it needs what any of
// them needs. `moend calibrate` makes such names: keys that stand out answer for layers that look things up,
// expected attention for the others.
Expected<std::unique_ptr<Scorer>> MakeScorer(std::string_view name);
std::vector<std::string> ScorerNames();
// For tables: the name, or "mixed" for those of several scorers.
std::string ShortScorerName(std::string_view name);

// Positions that a head keeps: sinks, the newest `window`, and the best of the rest up to `count` in all;
// ascending. Ties: the newer token stays. count >= sinks + window, or everything when count >= scores.size().
std::vector<uint32_t> SelectKept(std::span<const float> scores, const Protected& guard, int64_t count);

}  // namespace moend
