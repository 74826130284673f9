// Suites as tokens: the chat template around a prompt, and the middle cut out of one that is too long.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "moend/base/error.h"
#include "moend/eval/suite.h"
#include "moend/model/model.h"

namespace moend::eval {

// A prompt is context + questions[i], as token sequences. A tokenizer that would join the two at the seam is
// not followed: the context must stand for itself, since it is compressed before the question is known.
struct PreparedContext {
  std::vector<int32_t> context;
  std::vector<std::vector<int32_t>> questions;  // parallel to Context::questions; none is empty
  bool truncated = false;
};

struct PreparedSuite {
  std::vector<PreparedContext> contexts;  // parallel to Suite::contexts
  int64_t n_truncated = 0;
  int64_t longest_context = 0;
  int64_t longest_prompt = 0;
};

// Prompts of more than `prompt_tokens` tokens keep their first and their last half, as LongBench does it; the
// question belongs to the last one. kTooLong when a question alone fills more than that half.
Expected<PreparedSuite> PrepareSuite(const Tokenizer& tokenizer, const Suite& suite, int64_t prompt_tokens);

// 16 hex digits that change when anything that is asked or scored does.
std::string HashOf(const Suite& suite);

}  // namespace moend::eval
