// The uncompressed K/V of one layer while its prompt is read, and what the scorer wants to know besides. At
// most one exists during a prefill; calibration and evaluation keep one per layer (engine/capture.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "moend/attention/params.h"
#include "moend/base/error.h"
#include "moend/base/ledger.h"
#include "moend/plan/expert.h"
#include "moend/score/scorer.h"

namespace moend {

class LayerScratch {
 public:
  // Room for `capacity` tokens, of which the first `score_tokens` will be scored; `n_heads` are query heads.
  // `state_floats`: of the state that layers without K/V remember (HyperParams::state_floats()).
  static Expected<LayerScratch> Create(std::shared_ptr<Ledger> ledger, const KvShape& shape, int64_t n_heads,
                                       int64_t capacity, int64_t score_tokens, const ScorerNeeds& needs,
                                       int64_t state_floats);

  // What Create() takes.
  static int64_t Bytes(const KvShape& shape, int64_t n_heads, int64_t capacity, int64_t score_tokens,
                       const ScorerNeeds& needs, int64_t state_floats);

  // Forgets all tokens, keeps the memory.
  void Clear();
  // Forgets the tokens from n on. A state goes back to what it was at KeepState(), if that was called.
  void Truncate(int64_t n);

  // Of a layer that holds a state: that behind the newest token, zeros before the first.
  std::span<float> state() { return {state_.data(), static_cast<std::size_t>(state_.size())}; }
  std::span<const float> state() const { return const_cast<LayerScratch*>(this)->state(); }
  Expected<void> KeepState();

  // k, v: f32 [n][n_kv_heads][head_size]; q: f32 [n][n_heads][head_size], unscaled, kept only as far as the
  // scorer needs it. `style`: the layer's; what it points to outlives the scratch. `each` calls a
  // function for 0 <= i < n, in any order, on several threads if it likes; without it they come one after the
  // other.
  using Each = std::function<void(int64_t n, const std::function<void(int64_t)>&)>;
  void Append(const float* q, const float* k, const float* v, int64_t n, const AttentionStyle& style,
              const Each& each = {});

  // Whether Append() and ReferOwn() look at queries of the next n tokens.
  bool WantsQueries(int64_t n) const;

  int64_t n_tokens() const { return n_tokens_; }
  int64_t capacity() const { return capacity_; }
  int64_t score_tokens() const { return score_tokens_; }
  const KvShape& shape() const { return shape_; }
  const std::shared_ptr<Ledger>& ledger() const { return ledger_; }
  // The first `n` tokens of KV head `head`.
  DenseView view(int64_t head, int64_t n) const;
  // Scaled queries of the newest observed tokens among the first score_tokens, rows as in QueryRows.
  QueryRows observed(int64_t head) const;
  // Sum of q q' over the queries of a head's group at the newest kMomentTokens of the first score_tokens
  // tokens: f32 [head_size][head_size], what they use of its keys (cache/key_feedback.h).
  static constexpr int64_t kMomentTokens = 512;
  std::span<const float> moment(int64_t head) const;
  // f32 [score_tokens] per head; null when the scorer does not accumulate. Written by the prefill's
  // attention.
  float* accumulated(int64_t head);
  const float* accumulated(int64_t head) const { return const_cast<LayerScratch*>(this)->accumulated(head); }
  // f32 [score_tokens] per head: how much a repetition's outputs lose without the token,
  //     sum over its queries of (share of attention * |W_O v| / |x|)^2,
  // v: the token's value, W_O: the projection of the query head, x: the residual stream that enters the
  // layer. Null when the scorer asks for no repetition.
  float* needed(int64_t head);
  const float* needed(int64_t head) const { return const_cast<LayerScratch*>(this)->needed(head); }

  // Heads whose needed() may be left as it is, since nothing will be chosen by it: those whose flag is false;
  // none of them if there are no flags.
  void AskFor(std::vector<bool> heads) { asked_ = std::move(heads); }
  bool asks_for(int64_t head) const { return asked_.empty() || asked_[static_cast<std::size_t>(head)]; }

  // f32 [score_tokens] per head: the logarithm of what needed() would be, as it was learned to be. Null when
  // the scorer does not ask for it.
  float* expected(int64_t head);
  const float* expected(int64_t head) const { return const_cast<LayerScratch*>(this)->expected(head); }

  // Keeps the queries, which are of this scratch's layer, of some of a repetition's `total` tokens, of which
  // [index, index + n) are given: f32 [n][n_heads][head_size], unscaled; `weight`: 1 / |x|^2 of each.
  void Refer(const float* q, const float* weight, int64_t index, int64_t n, int64_t total);
  // How many to keep of a context of n tokens: for a refit about twice as many rows as tokens stay, for the
  // measuring of losses some thousand.
  static int64_t ReferenceTokens(int64_t n) { return std::max<int64_t>(512, n / 4); }
  // The same without a repetition: whether to keep the queries of the prompt's token `t`, which comes before
  // score_tokens, and to do so, turned to where a repetition would ask for it: f32 [n_heads][head_size].
  bool RefersTo(int64_t t) const;
  void ReferOwn(const float* q, const AttentionStyle& style);
  // Those queries, scaled, rows as in QueryRows: of the repetition, none before it; or of the prompt itself.
  QueryRows reference(int64_t head) const { return Rows(repeated_, head); }
  QueryRows own_reference(int64_t head) const { return Rows(own_, head); }
  void ScaleReference(float scale);  // the weights
  // 1 / |x|^2 of each of their tokens.
  std::span<const float> reference_weight() const {
    return {reference_weight_.data(), static_cast<std::size_t>(repeated_.n)};
  }

 private:
  struct Reference {
    Buffer<float> q;  // [n_kv_heads][most * group][head_size]
    int64_t most = 0, n = 0;
  };
  // Of what Append() was given: tokens [begin, end), which lie in one page; and the queries that are kept.
  void AppendTokens(int64_t head, const float* k, const float* v, int64_t begin, int64_t end);
  void Observe(int64_t head, const float* q, int64_t n);
  bool SeesQueries(int64_t n) const;  // whether Observe() looks at those of the next n tokens
  void Add(const float* q, const AttentionStyle& style, Reference& to);
  QueryRows Rows(const Reference& from, int64_t head) const;

  KvShape shape_;
  int64_t n_heads_ = 0, capacity_ = 0, score_tokens_ = 0, n_tokens_ = 0, n_observed_ = 0;
  AttentionStyle style_;  // of the layer whose tokens these are
  std::shared_ptr<Ledger> ledger_;
  Buffer<uint16_t> k_, v_;     // [n_kv_heads][pages * head_size * 64], [n_kv_heads][pages * 64][head_size]
  Buffer<float> observed_;     // [n_kv_heads][n_observed * group][head_size]
  Buffer<float> accumulated_;  // [n_kv_heads][score_tokens]
  Buffer<float> needed_;       // [n_kv_heads][score_tokens]
  Buffer<float> expected_;     // [n_kv_heads][score_tokens]
  std::vector<bool> asked_;    // [n_kv_heads], or none
  Reference repeated_, own_;
  Buffer<float> reference_weight_;  // [repeated_.most]
  Buffer<float> moment_;            // [n_kv_heads][head_size][head_size]
  Buffer<float> state_, kept_state_;
};

}  // namespace moend
