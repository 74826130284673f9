// The tokenizer behind model.h's interface: libllama's, loaded from the same file without its weights.
#pragma once

#include <memory>

#include "moend/base/error.h"
#include "moend/model/gguf.h"
#include "moend/model/model.h"

namespace moend {

// Checks what libllama takes on trust in the tokenizer's keys: it stops the process, or reads past an array,
// where they contradict each other. `n_vocab` is the number of rows of the embedding.
Expected<void> CheckVocabulary(const GgufFile& file, int64_t n_vocab);

// CheckVocabulary first, then libllama reads the file. kCorrupt / kUnsupported carry libllama's own words.
Expected<std::unique_ptr<Tokenizer>> LoadTokenizer(const GgufFile& file, int64_t n_vocab);

}  // namespace moend
