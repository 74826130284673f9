// OpenAI's answers as JSON, whole and in chunks.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "moend/serve/job.h"
#include "moend/serve/json.h"

namespace moend::serve {

// What all chunks of an answer have in common.
struct AnswerHead {
  bool chat = false;
  std::string id = {}, model = {}, fingerprint = {};
  int64_t created = 0;  // seconds since 1970
  bool logprobs = false, include_usage = false, kv_layers = false;
};

std::string RandomId(std::string_view prefix);

OrderedJson UsageJson(const Outcome& outcome);
// llama-server's names, and a "kv" block: bytes, full_bytes, ratio, tokens (and layers when asked for).
OrderedJson TimingsJson(const Outcome& outcome, bool layers);

OrderedJson WholeAnswer(const AnswerHead& head, const AnswerDelta& all,
                        const std::vector<TokenReport>& tokens, const Outcome& outcome);

// Server-sent events, each "data: {...}\n\n".
std::string FirstChunk(const AnswerHead& head);  // the role; empty for completions
std::string DeltaChunk(const AnswerHead& head, const AnswerDelta& delta,
                       const std::vector<TokenReport>& tokens);
std::string LastChunks(const AnswerHead& head, const Outcome& outcome);  // reason, usage, [DONE]
std::string ErrorChunk(const ApiError& error);

}  // namespace moend::serve
