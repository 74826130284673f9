// Picks the next token from logits, with llama.cpp's parameters and order: top-k, typical-p, top-p, min-p,
// temperature.
#pragma once

#include <cstdint>
#include <optional>
#include <random>
#include <span>
#include <vector>

#include "moend/base/error.h"
#include "moend/model/grammar.h"

namespace moend {

struct SamplerOptions {
  float temperature = 0.8f;  // <= 0: greedy
  int64_t top_k = 40;        // <= 0: all
  float typical_p = 1.0f;    // >= 1: off
  float top_p = 0.95f;       // >= 1: off
  float min_p = 0.05f;       // <= 0: off
  uint64_t seed = 0;
};

class Sampler {
 public:
  explicit Sampler(const SamplerOptions& options);
  int32_t Sample(std::span<const float> logits);

 private:
  SamplerOptions options_;
  std::mt19937_64 random_;
  struct Candidate {
    int32_t token;
    float logit;
  };
  void KeepTypical();
  std::vector<Candidate> candidates_;
};

// The next token of those that the grammar allows, which is not told of it; nothing where none of them has a
// logit above -infinity. Errors are the grammar's.
Expected<std::optional<int32_t>> SampleAllowed(Sampler& sampler, Grammar& grammar,
                                               std::span<const float> logits);

}  // namespace moend
