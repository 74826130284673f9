// Attention of a prefill: a block of new tokens sees what the layer already remembers (packed, from earlier
// turns; or, while a context is repeated, uncompressed) and the new tokens before it (the scratch).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "moend/attention/attention.h"
#include "moend/cache/layer_cache.h"
#include "moend/engine/layer_scratch.h"
#include "moend/model/graph.h"

namespace moend {

class PrefillHook : public AttentionHook {
 public:
  static Expected<std::unique_ptr<PrefillHook>> Create(std::shared_ptr<const Model> model, int n_threads,
                                                       int64_t block_tokens);

  // The layer whose blocks come next. `past`: what each KV head remembers from earlier, or nothing; both must
  // outlive the blocks. What the threads sum up for a scorer that accumulates is counted in the scratch's
  // ledger.
  Expected<void> Begin(std::span<const LayerCache> past, LayerScratch* scratch);
  // The same for a part of a repetition, which sees all of `context`. `index`: of the part's first token
  // among those of the repetition; `weights`: 1 / |x|^2 of all of these, x being what enters the layer. What
  // the threads sum up is counted in the context's ledger.
  Expected<void> BeginRepetition(LayerScratch* context, LayerScratch* part, int64_t index,
                                 std::span<const float> weights);
  // Adds to context->needed(), unless the layer is a sliding one, what the part's queries gave, but for the
  // values, once it is through; and gives the threads' sums back.
  void EndRepetition();
  // Adds the attention that tokens received in the layer's blocks to scratch->accumulated(), and gives the
  // threads' sums back.
  void EndAccumulation();
  // What a thread takes beside the sums to choose pages of a repeated context of so many tokens.
  static int64_t PageMaximaFloats(int64_t group, int64_t tokens);
  // Gives back what Begin() or BeginRepetition() took; for a prompt that ended early.
  void DropSums();

  void Store(int64_t layer, const float* q, const float* k, const float* v, int64_t n) override;
  void StoreApart(int64_t layer, const float* q, const float* k, const float* v, int64_t n,
                  const Each& each) override;
  void Attend(int64_t layer, const float* q, int64_t n, int thread, int n_threads) override;
  void Combine(int64_t layer, float* out, int64_t n, int thread, int n_threads) override;
  // Where a prompt is read for the first time, by a scorer that does not add up what tokens receive.
  std::optional<OwnTokens> SeesOnlyOwn(int64_t n) const override;
  // Those of the scratch; a part of a repetition begins with the context's.
  void LoadStates(int64_t layer, float* states, int64_t contexts) override;
  void StoreStates(int64_t layer, const float* states, int64_t contexts) override;

 private:
  struct Worker {
    std::vector<float> q, state;  // [rows][head_size], [rows] x 2
    Buffer<float> workspace;
    Buffer<float> accumulated;         // [n_kv_heads][score_tokens]; none unless the scorer accumulates
    Buffer<float> squares;             // [n_kv_heads][context tokens]; none but in a repetition
    Buffer<float> page_maxima;         // [pages of the context][rows], likewise
    std::vector<float> weight, least;  // [rows]
  };
  explicit PrefillHook(std::shared_ptr<const Model> model);
  void Accumulate(Worker& w, int64_t head, int64_t first, const QueryRows& q, const float* max,
                  const float* sum);

  // Queries of the prompt itself as a repetition's, where the scratch wants them.
  void ReferOwn(int64_t layer, const float* q, int64_t n);

  // What rows of a repetition, whose own tokens `state` has, see of the context; and what that says of the
  // context's tokens.
  void AttendContext(Worker& w, int64_t head, int64_t part_token, const QueryRows& q, SoftmaxState state);

  std::shared_ptr<const Model> model_;
  KvShape shape_;
  int64_t n_heads_, group_;
  AttentionStyle style_;              // of the layer at hand
  std::span<const LayerCache> past_;  // one a KV head, or none
  LayerScratch* scratch_ = nullptr;
  LayerScratch* context_ = nullptr;  // what is repeated, or nothing
  int64_t index_ = 0;                // of the part in the repetition
  std::span<const float> weights_;   // of the repetition
  int64_t first_ = 0;                // tokens of the scratch before this block
  std::atomic<int64_t> next_{0};
  std::vector<float> out_;  // [block tokens][n_heads][head_size]
  std::vector<Worker> workers_;
};

}  // namespace moend
