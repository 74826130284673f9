// The tokenizer behind model.h's interface: libllama's, loaded from the same file without its weights.
#pragma once

#include <memory>

#include "moend/base/error.h"
#include "moend/model/gguf.h"
#include "moend/model/model.h"

namespace moend {

// Takes libllama's and ggml's log, so that neither prints, and starts libllama. Safe to repeat.
void StartLibllama();

// CheckVocabulary first, then libllama reads the file. kCorrupt / kUnsupported carry libllama's own words.
Expected<std::unique_ptr<Tokenizer>> LoadTokenizer(const GgufFile& file, int64_t n_vocab);

}  // namespace moend
