// Generation: sample, decode, detokenize in whole UTF-8 characters, stop at an end token, a stop string or a
// limit.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "moend/engine/engine.h"
#include "moend/engine/sampler.h"

namespace moend {

struct GenerateOptions {
  int64_t max_tokens = -1;  // -1: until the context is full
  SamplerOptions sampler;
  std::vector<std::string> stop;  // the text ends before the first of them
  bool special = false;           // show special tokens in the text
  bool ignore_end = false;        // go on where the model would end: end tokens are never chosen
  GrammarSource grammar = {};     // what the text is held to; empty: nothing
};

enum class StopReason { kEndOfText, kStopString, kMaxTokens, kContextFull, kCancelled };

struct Generated {
  std::string text;
  std::vector<int32_t> tokens;  // the end token is not among them
  StopReason reason = StopReason::kMaxTokens;
  double seconds = 0;
};

// Continues a prefilled session. `emit` gets text as soon as it is final (whole UTF-8 characters, no part of
// a stop string); returning false stops. Afterwards the session ends with `tokens`, all of them decoded, so
// that a further turn may follow.
Expected<Generated> Generate(Session& session, const GenerateOptions& options,
                             const std::function<bool(std::string_view)>& emit = {});

}  // namespace moend
