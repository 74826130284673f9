// Listens to the queries that pass on their way to attention, and sums up what they are before RoPE.
#pragma once

#include <memory>
#include <vector>

#include "moend/model/graph.h"
#include "moend/plan/query_stats.h"

namespace moend {

class QueryTap : public AttentionHook {
 public:
  // Hands everything on to `inner`, which must outlive it.
  QueryTap(const Model& model, AttentionHook& inner);

  void BeginLayer() { position_ = 0; }  // its tokens come in order, from position 0 on
  void Store(int64_t layer, const float* q, const float* k, const float* v, int64_t n) override;
  void Attend(int64_t layer, const float* q, int64_t n, int thread, int n_threads) override;
  void Combine(int64_t layer, float* out, int64_t n, int thread, int n_threads) override;
  std::optional<OwnTokens> SeesOnlyOwn(int64_t n) const override {
    auto own = inner_.SeesOnlyOwn(n);
    if (own) own->queries = true;
    return own;
  }
  void LoadStates(int64_t layer, float* states, int64_t contexts) override;
  void StoreStates(int64_t layer, const float* states, int64_t contexts) override;

  // Once all tokens went through all layers.
  std::shared_ptr<const QueryStats> Take() const;

 private:
  const Model& model_;
  AttentionHook& inner_;
  QueryStats sums_;
  int64_t position_ = 0, tokens_ = 0;  // tokens of all layers together
};

}  // namespace moend
