// A text that was read once with nothing compressed, and on which compressions are then tried: one layer's,
// or a whole plan's. The first tokens (the context) are compressed, the last ones (the tail) are read over
// them and compared with the full cache.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "moend/engine/compress.h"
#include "moend/engine/engine_impl.h"
#include "moend/plan/plan.h"

namespace moend {

class Probe {
 public:
  // The caller holds the machine (its `reading` and `busy`) whenever it calls anything here. References are
  // borrowed.
  Probe(Engine::Impl& machine, const Scorer& scorer, const Protected& guard);
  // Measure with this one from now on; it needs no more than the one that Read() was called with.
  void Use(const Scorer& scorer);

  // At most half of the tokens become the tail. `tick` gets the share done and may stop it (kCancelled).
  Expected<void> Read(std::span<const int32_t> tokens, int64_t tail, const Progress& tick);

  const std::shared_ptr<const QueryStats>& queries() const { return queries_; }  // of all that was read
  // What a scorer that needs statistics goes by; before anything is measured.
  void Expect(std::shared_ptr<const QueryModel> model) { model_ = std::move(model); }

  // One layer compressed, each of its KV heads by its expert. KL is the mean over the tail.
  Expected<ProfileCell> MeasureLayer(int64_t layer, std::span<const Expert> heads);

  // All layers compressed: experts[layer * n_kv_heads + head]. KL(full || compressed) of each token of the
  // tail, in nats. Caches of layers stay in memory for the next plans; layers below the first one that
  // differs from the plan before are not computed again.
  Expected<std::vector<double>> MeasurePlan(std::span<const Expert> experts);

  int64_t tail_tokens() const { return tail_; }

 private:
  using Key = std::pair<int64_t, Expert>;  // index of a KV head, its expert

  Expected<const std::vector<std::vector<float>>*> Scores(int64_t layer);
  // The tail through one layer, in place; the hook has begun. Returns the attention output if wanted.
  Expected<std::vector<float>> RunTail(int64_t layer, float* hidden, bool want_attention,
                                       AttentionHook& hook);
  Expected<std::vector<double>> TailKl(const std::vector<float>& hidden);
  Expected<LayerScratch*> EmptyTail();
  // Moves the layer's caches out of what is kept, packing those that are missing.
  Expected<std::vector<LayerCache>> TakeCaches(int64_t layer, std::span<const Expert> heads);
  void KeepCaches(int64_t layer, std::span<const Expert> heads, std::vector<LayerCache> caches);

  Engine::Impl& machine_;
  const HyperParams& hp_;
  const Scorer* scorer_;
  const Protected guard_;
  int64_t context_ = 0, tail_ = 0;
  std::vector<LayerScratch> layers_;                     // all tokens, nothing compressed
  std::vector<std::vector<float>> inputs_;               // [layer] f32 [tail][n_embd]
  std::vector<std::vector<float>> attention_;            // [layer] f32 [tail][n_heads * head_size]
  std::vector<float> logits_;                            // [tail][n_vocab], of the full cache
  std::vector<std::vector<std::vector<float>>> scores_;  // [layer][KV head][context]; empty until wanted
  std::shared_ptr<const QueryStats> queries_;
  std::shared_ptr<const QueryModel> model_;
  std::unique_ptr<LayerScratch> tail_scratch_;
  std::vector<float> measured_;  // logits, [tail][n_vocab]
  std::shared_ptr<Ledger> ledger_ = std::make_shared<Ledger>();
  std::map<Key, LayerCache> caches_;
  std::vector<Expert> last_plan_;
  std::vector<std::vector<float>> last_inputs_;  // [layer] f32 [tail][n_embd], under last_plan_
};

}  // namespace moend
