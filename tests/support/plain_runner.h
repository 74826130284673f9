// Runs a model's graph with the plainest attention there is: no engine, no compressed cache. Keys and values
// are rounded to half floats, as libllama's cache does.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "moend/model/graph.h"
#include "moend/model/model.h"

namespace moend::test {

// Dense causal attention over everything stored so far, in float32; windows, soft caps and sinks as written
// down.
class DenseHook final : public AttentionHook {
 public:
  explicit DenseHook(const Model& model);
  void Store(int64_t layer, const float* q, const float* k, const float* v, int64_t n) override;
  void Attend(int64_t layer, const float* q, int64_t n, int thread, int n_threads) override;
  void Combine(int64_t layer, float* out, int64_t n, int thread, int n_threads) override;

  void LoadStates(int64_t layer, float* states, int64_t contexts) override;
  void StoreStates(int64_t layer, const float* states, int64_t contexts) override;

  int64_t stored(int64_t layer) const;  // tokens

 private:
  const Model& model_;
  const HyperParams& h_;
  struct Layer {
    std::vector<float> k, v;   // [token][kv head][head_size]
    std::vector<float> state;  // of a delta net; empty before the first token
  };
  std::vector<Layer> layers_;
  std::vector<float> out_;  // [token][head][head_size] of the block at hand
};

// Logits of every position, [tokens][n_vocab], read in blocks of `block` tokens; empty if ggml fails.
std::vector<std::vector<float>> PlainLogits(const Model& model, std::span<const int32_t> tokens,
                                            int64_t block, int n_threads = 1);

}  // namespace moend::test
