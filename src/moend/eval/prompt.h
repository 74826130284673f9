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
  // The right answer to each as a continuation of its prompt, the first kGoldTokens tokens of it.
  std::vector<std::vector<int32_t>> golds;
  bool truncated = false;
};
inline constexpr std::size_t kGoldTokens = 64;

// How long prompts and answers may be.
struct Lengths {
  int64_t prompt_tokens = 0;   // longer prompts lose their middle; 0: as much as the model takes
  int64_t max_new_tokens = 0;  // of an answer, instead of the question's own; 0: the question's
  double max_new_scale = 1;    // times the question's own
};
int64_t MaxNewTokens(const Question& question, const Lengths& lengths);

struct PreparedSuite {
  std::vector<PreparedContext> contexts;  // parallel to Suite::contexts
  int64_t n_truncated = 0;
  int64_t longest_context = 0;
  int64_t longest_prompt = 0;
};

// Prompts that are too long keep their first and their last half, as LongBench does it; the question belongs
// to the last one. Too long is what exceeds lengths.prompt_tokens or the model's n_ctx. One that is cut
// leaves its answer the room in n_ctx that it may take, or n_ctx / 32 if it may take more; one that is not
// cut may be answered past n_ctx, for what is cut out of a context is lost for certain, while a model goes on
// a little beyond what it was trained for. kTooLong when a question alone fills more than half.
Expected<PreparedSuite> PrepareSuite(const Tokenizer& tokenizer, const Suite& suite, int64_t n_ctx,
                                     const Lengths& lengths);

// 16 hex digits that change when anything that is asked or scored does.
std::string HashOf(const Suite& suite);

}  // namespace moend::eval
