// Checks of the tokenizer's keys, before libllama sees them.
#pragma once

#include <string_view>

#include "moend/base/error.h"
#include "moend/model/gguf.h"

namespace moend {

// libllama takes much of a tokenizer on trust: where its parts contradict each other it stops the process
// (a token listed twice), reads past an array, or recurses without end. `n_vocab` is the number of rows of
// the embedding. kCorrupt names the key and entry; kUnsupported the kinds of tokenizer that moend runs.
Expected<void> CheckVocabulary(const GgufFile& file, int64_t n_vocab);

// Whether libllama cuts text into words with std::regex for this tokenizer.ggml.pre. The standard library's
// matcher recurses once for every character of a word.
bool SplitsByRegex(std::string_view pre_tokenizer);

}  // namespace moend
