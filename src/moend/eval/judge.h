// What the predictions themselves say about a question, beside the answer that is generated: how likely the
// right answer's tokens are, how far their predictions are from the full cache's, and which of the letters A
// to D is the likeliest.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "moend/engine/engine.h"
#include "moend/eval/prompt.h"
#include "moend/eval/results.h"

namespace moend::eval {

// The predictions of the right answer's tokens: of the first one the logits that the prompt ends with, of the
// others hidden states, f32 [gold tokens - 1][n_embd], which are small enough to keep.
struct GoldRows {
  std::vector<float> first, rest;
};

class Judge {
 public:
  static Expected<Judge> Create(std::shared_ptr<Engine> engine);

  // Reads the right answer in a fork of a session that has read the question.
  Expected<GoldRows> Read(const Session& session, std::span<const int32_t> gold) const;

  // Fills nll, gold_tokens and, where `full` is not null, kld and same_top.
  Expected<void> Compare(const GoldRows& rows, const GoldRows* full, std::span<const int32_t> gold,
                         Answer& answer) const;

  // The log-probabilities of A, B, C and D as the next token, with a space before them or without; empty when
  // the tokenizer has no token for one of them.
  std::vector<double> Letters(std::span<const float> logits) const;

 private:
  std::shared_ptr<Engine> engine_;
  std::array<std::vector<int32_t>, 4> letters_;  // tokens of each
};

}  // namespace moend::eval
