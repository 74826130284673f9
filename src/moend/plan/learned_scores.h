// What a repetition of a prompt would say of its tokens (the scorer `reconstruct`), as calibration learned to
// expect it from the hidden states that enter attention (the scorer `learned`): a linear function of them for
// each KV head. Only the order of a prompt's tokens means anything.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "moend/base/error.h"
#include "moend/plan/expert.h"

namespace moend {

struct LearnedScores {
  int64_t n_layers = 0, n_kv_heads = 0;
  int64_t n_embd = 0;          // of a hidden state, which is first divided by its root mean square
  std::vector<float> weights;  // [layer][KV head][n_embd]; half floats, the largest of a head is 1

  const float* head(int64_t layer, int64_t h) const {
    return weights.data() + (layer * n_kv_heads + h) * n_embd;
  }
};

// Scales and rounds the weights to what a file holds of them; those of a head that are not all finite become
// 0.
void RoundLearnedScores(LearnedScores& learned);

// kMismatch unless they are of such a model.
Expected<void> CheckLearnedScores(const LearnedScores& learned, int64_t n_layers, int64_t n_kv_heads,
                                  int64_t n_embd);

}  // namespace moend
