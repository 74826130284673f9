// A context read a second time, as if the model were asked to repeat it, layer by layer beside the first
// reading: the repetition's queries see the layer's uncompressed K/V and tell which tokens they need (the
// scorer "reconstruct", after KVzip, arXiv 2505.23416). What it adds to K/V is dropped part by part.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "moend/base/ledger.h"
#include "moend/engine/compute.h"
#include "moend/engine/layer_scratch.h"
#include "moend/engine/prefill_hook.h"
#include "moend/model/model.h"

namespace moend {

// Tokens that are repeated at a time. Each part is asked for anew right behind the context, so that the
// distance between a token and its repetition stays what it is at the context's end, and no position is far
// beyond what the model was trained for.
inline constexpr int64_t kRepeatedTokens = 2048;

// What asks for the tokens [begin, begin + n) of `context`, and these tokens. A model without a tokenizer is
// not asked: it sees the tokens themselves once more.
Expected<std::vector<int32_t>> AskForPart(const Model& model, std::span<const int32_t> context, int64_t begin,
                                          int64_t n);

class Repetition {
 public:
  // Of all of `context`, whose positions start at 0. Holds the hidden states of the repeated tokens, which
  // `ledger` counts.
  static Expected<Repetition> Create(Compute& compute, std::shared_ptr<Ledger> ledger,
                                     std::span<const int32_t> context);

  // The most that Create() takes for a context of n tokens, and the sums of a hook of `n_threads` threads.
  static int64_t MostBytes(const HyperParams& hp, int n_threads, int64_t n);

  // All parts through a layer whose scratch holds the whole context: context.needed() and reference() come of
  // it, and the hidden states move on. grams: [n_kv_heads][head_size][head_size], the mean W_O' W_O of the
  // query heads of a KV head; none in a sliding layer, of which nothing need be known. Returning false from
  // `go_on` stops (kCancelled).
  Expected<void> Layer(int64_t layer, LayerScratch& context, std::span<const float> grams, PrefillHook& hook,
                       const std::function<bool()>& go_on);

  // How badly the model repeats, once all layers went through: the mean over some tokens, from the second
  // half of each part, of minus the logarithm of the probability that it gave the token.
  Expected<double> CopyLoss();

  int64_t tokens() const { return tokens_; }  // all parts with what asks for them

 private:
  struct Part {
    int64_t begin = 0, tokens = 0;  // rows of hidden_
  };
  Repetition() = default;
  std::span<float> states() { return {hidden_.data(), static_cast<std::size_t>(hidden_.size())}; }
  Compute* compute_ = nullptr;
  int64_t n_context_ = 0, tokens_ = 0;
  std::vector<Part> parts_;
  std::vector<int32_t> ids_;  // [tokens_]
  Buffer<float> hidden_;      // f32 [tokens_][n_embd]
  Compute::OnDevice on_device_;
  LayerScratch scratch_;        // a part's own K/V
  std::vector<float> weights_;  // 1 / |x|^2 of each token
};

}  // namespace moend
