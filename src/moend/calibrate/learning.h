// Learns to expect what a repetition says of a prompt's tokens (plan/learned_scores.h): for each KV head
// ridge regression of the logarithm of LayerScratch::needed() on the hidden state that enters the layer,
// divided by its root mean square. A scorer orders the tokens of one text, so of each text only what differs
// from its means counts.
#pragma once

#include <cstdint>
#include <vector>

#include "moend/base/ledger.h"
#include "moend/engine/compute.h"
#include "moend/engine/layer_scratch.h"
#include "moend/plan/learned_scores.h"

namespace moend {

class ScoreLearner {
 public:
  // Takes 2 * n_layers * n_embd * (n_embd + 1) bytes.
  static Expected<ScoreLearner> Create(Compute& compute);

  // Hidden states f32 [n][n_embd] that enter a layer, of the tokens [at, at + n) of a text; in order.
  void Watch(int64_t at, int64_t n, const float* hidden);
  // All tokens of the text went through the layer, and were asked for again: scratch.needed() says what came
  // of it.
  Expected<void> EndLayer(int64_t layer, const LayerScratch& scratch);
  // From all texts, as a file holds it; what was summed up is lost. Zeros for a layer that no text went
  // through.
  Expected<LearnedScores> Learn();

 private:
  explicit ScoreLearner(Compute& compute) : compute_(&compute) {}

  Compute* compute_;
  int64_t width_ = 0, heads_ = 0;
  std::vector<Buffer<float>> moments_;  // [layer] of states with states: a lower triangle, row after row
  std::vector<double> joint_;           // [layer][KV head][n_embd]: states with scores
  std::vector<float> rows_;             // [tokens][n_embd] of the layer at hand
};

}  // namespace moend
