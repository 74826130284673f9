// The same text in other tokens: what a model generated need not be how the tokenizer would cut it.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "moend/serve/backend.h"

namespace moend::serve {

struct RespelledPrompt {
  std::vector<int32_t> tokens;  // the kept ones, then the rest of the prompt
  int64_t replaced = 0;         // tokens of the prompt in whose place the kept ones are
};

// `prompt` with `kept` and `tail` at its beginning, if these spell what it begins with, in more than `least`
// of its tokens, and are not its own. Control tokens, which spell nothing, have to be the same. Where the
// kept tokens end within a token of the prompt, what is left of it is tokenized anew.
std::optional<RespelledPrompt> Respell(std::span<const int32_t> prompt, std::span<const int32_t> kept,
                                       std::span<const int32_t> tail, int64_t least, const Backend& backend);

}  // namespace moend::serve
