// Picks a stream's next token from the logits: bias and penalties of the request, then the engine's sampler;
// and the log probabilities that OpenAI's API reports.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "moend/engine/sampler.h"
#include "moend/model/grammar.h"
#include "moend/serve/request.h"

namespace moend::serve {

struct Picked {
  int32_t token = 0;
  float logprob = 0;                           // of the model's distribution, before temperature and cuts
  std::vector<std::pair<int32_t, float>> top;  // most likely first
};

class Picker {
 public:
  // `ends`: the tokens that end an answer; must outlive the picker. `prompt`: what the repetition penalty
  // looks back on beside the answer.
  Picker(const PickOptions& options, std::span<const int32_t> ends, std::span<const int32_t> prompt);
  Picked Pick(std::span<const float> logits);
  // One that the grammar allows; it is told of it. Errors are the grammar's.
  Expected<Picked> Pick(std::span<const float> logits, Grammar& grammar);
  // Whether this token ends the answer without being part of it.
  bool Ends(int32_t token) const;

 private:
  void Adjust(std::span<const float> logits);
  // What is sampled from: the logits, or adjusted_.
  std::span<const float> View(std::span<const float> logits);
  Picked Report(std::span<const float> view, int32_t token);

  PickOptions options_;
  std::span<const int32_t> ends_;
  Sampler sampler_;
  int64_t picked_ = 0;
  std::vector<int32_t> history_;                 // of prompt and answer, when repetition is penalized
  std::unordered_map<int32_t, int64_t> counts_;  // generated tokens, when penalties are on
  std::vector<float> adjusted_;
};

}  // namespace moend::serve
