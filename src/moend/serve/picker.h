// Picks a stream's next token from the logits: bias and penalties of the request, then the engine's sampler;
// and the log probabilities that OpenAI's API reports.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "moend/engine/sampler.h"
#include "moend/serve/request.h"

namespace moend::serve {

struct Picked {
  int32_t token = 0;
  float logprob = 0;                           // of the model's distribution, before temperature and cuts
  std::vector<std::pair<int32_t, float>> top;  // most likely first
};

class Picker {
 public:
  explicit Picker(const PickOptions& options) : options_(options), sampler_(options.sampler) {}
  Picked Pick(std::span<const float> logits);

 private:
  PickOptions options_;
  Sampler sampler_;
  std::unordered_map<int32_t, int64_t> counts_;  // generated tokens, when penalties are on
  std::vector<float> adjusted_;
};

}  // namespace moend::serve
