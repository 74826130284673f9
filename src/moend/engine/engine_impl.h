// What the engine's files share behind the public headers.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "moend/engine/compress.h"
#include "moend/engine/compute.h"
#include "moend/engine/decode_hook.h"
#include "moend/engine/device_caches.h"
#include "moend/engine/engine.h"
#include "moend/engine/prefill_hook.h"
#include "moend/engine/repetition.h"
#include "moend/plan/learned_scores.h"
#include "moend/score/query_model.h"

namespace moend {

// Appends n numbers; kOutOfMemory instead of an exception.
Expected<void> AppendFloats(std::vector<float>& to, const float* from, int64_t n);

struct Engine::Impl {
  std::shared_ptr<const Model> model;
  std::unique_ptr<Compute> compute;
  std::unique_ptr<PrefillHook> prefill;
  std::unique_ptr<DecodeHook> decode;
  std::mutex reading;  // one prompt at a time: `prefill` is in the middle of it; taken before `busy`
  std::mutex busy;     // one computation at a time
  // Of a decode step, kept so that no token allocates.
  std::vector<DecodeContext> contexts;
  std::vector<int32_t> positions;

  // How keys are turned before they are quantized: [layer][KV head], each of one head. Made when it is first
  // asked for, since it reads weights.
  Expected<std::span<const std::shared_ptr<const KeyRotations>>> Rotations(int64_t layer);
  // [KV head][head_size][head_size]: the mean of Model::OutputGrams() over the query heads of each. Made when
  // they are first asked for, and kept.
  std::span<const float> ValueGrams(int64_t layer);
  std::vector<std::vector<float>> value_grams;  // [layer]
  std::mutex turning;
  std::vector<std::shared_ptr<const KeyRotations>> rotations;

  // All of `tokens`, which start at position `first`, through one layer after the other. Per layer: Begin's
  // arguments come from `begin`, and `end` gets the layer's scratch when all tokens went through; and then,
  // where a scratch has room for what a repetition tells (LayerScratch::needed), their repetition. Logits of
  // the last token at the end; all hidden states are appended to `hidden_out`, if not null.
  struct LayerHooks {
    std::function<Expected<void>(int64_t layer, std::span<const LayerCache>* past, LayerScratch** scratch)>
        begin;
    std::function<Expected<void>(int64_t layer, LayerScratch& scratch)> end;
    std::shared_ptr<Ledger> ledger =
        {};                       // counts hidden states and the repetition; null: they are not counted
    double* copy_loss = nullptr;  // gets Repetition::CopyLoss(), if there is a repetition
    // What a scratch that has room for LayerScratch::expected is filled by.
    const LearnedScores* learned = nullptr;
    // Gets the hidden states f32 [n][n_embd] that enter a layer, those of the tokens [at, at + n).
    std::function<void(int64_t layer, int64_t at, int64_t n, const float* hidden)> watch = {};
    AttentionHook* listener =
        nullptr;  // stands before `prefill`, to which it hands everything on; may be null
  };
  Expected<void> ReadLayerByLayer(std::span<const int32_t> tokens, int64_t first, const LayerHooks& hooks,
                                  std::vector<float>& logits, const Progress& progress,
                                  std::vector<float>* hidden_out = nullptr);
};

struct Session::Impl {
  std::shared_ptr<Engine> engine;
  std::shared_ptr<Ledger> ledger;
  std::shared_ptr<const Scorer> scorer;
  std::shared_ptr<const QueryModel> queries;  // null unless the scorer needs it
  Plan plan;
  int64_t n_ctx = 0;
  std::vector<int32_t> tokens;
  // [layer][KV head], each a LayerCache of one head; without tokens where the layer holds a state.
  std::vector<LayerCache> caches;
  std::vector<Buffer<float>> states;  // [layer], of those that hold one; none where no layer does
  std::vector<float> logits;
  int64_t prompt_tokens = 0;              // the first ones, which were read together and scored as a prompt
  QueryRing ring;                         // memory only while an eviction is near
  std::unique_ptr<ContextMirror> mirror;  // what a device has of `caches`; made when it is first wanted
  int64_t since_eviction = 0;  // tokens generated (or read in a further turn) since the last eviction
  // Set while something changes the session and left set when that fails: caches and tokens may then
  // disagree.
  bool failed = false;

  Engine::Impl& machine() { return engine->impl(); }
  std::span<LayerCache> heads(int64_t layer) {
    const auto n = static_cast<std::size_t>(plan.model.shape.n_kv_heads);
    return std::span(caches).subspan(static_cast<std::size_t>(layer) * n, n);
  }
  std::vector<Expert> experts(int64_t layer) const;  // one a KV head
  // Of which KV heads a repetition of n tokens decides what they keep: not of those that keep all or nothing.
  std::vector<bool> Chooses(int64_t layer, int64_t n) const;
  // What a scratch says that a layer with a state remembers.
  void TakeState(int64_t layer, const LayerScratch& scratch);
  // A layer's caches of the first `n_tokens` tokens of a scratch, as the plan has them.
  Expected<std::vector<LayerCache>> Compressed(int64_t layer, const LayerScratch& scratch, int64_t n_tokens);
  LayerScorer scorer_of(int64_t layer) const {
    LayerScorer of(scorer->of_layer(layer), queries ? queries->layer(layer) : std::span<const HeadQueries>());
    of.shares = plan.adaptive_heads;
    of.refit = plan.refit && (scorer->needs().repetition || scorer->needs().learned);
    return of;
  }
  // Once a prompt is read, plans of adaptive heads say what each of them got.
  void NoteHeads();
  const HeadQueries* queries_of(int64_t cache) const {  // index into `caches`
    const int64_t n = plan.model.shape.n_kv_heads;
    return scorer_of(cache / n).head(cache % n);
  }
  // Tokens of queries that a scorer sees when it evicts while generating.
  int64_t observed_window() const;
  Expected<void> CheckUsable() const;
  // Session::Prefill
  Expected<void> Read(std::span<const int32_t> tokens, const Progress& progress, std::vector<float>* hidden);
  Expected<void> PrepareStep(DecodeContext* context);
  Expected<void> FinishStep();
  Expected<void> EvictAll();
};

}  // namespace moend
