// Checks of the tokenizer's keys, before libllama sees them.
#include <unordered_set>

#include "moend/model/tokenizer.h"

namespace moend {
namespace {

std::unexpected<Error> Bad(const GgufFile& file, const std::string& what) {
  return Fail(ErrorCode::kCorrupt, "{}: {}", file.path(), what);
}

}  // namespace

Expected<void> CheckVocabulary(const GgufFile& file, int64_t n_vocab) {
  MOEND_ASSIGN(const std::string_view model, file.String("tokenizer.ggml.model"));
  if (model != "llama" && model != "gpt2")
    return Fail(ErrorCode::kUnsupported, "{} has a tokenizer of the kind \"{}\"; moend runs llama and gpt2",
                file.path(), Printable(model));
  MOEND_ASSIGN(const std::vector<std::string_view> tokens, file.Strings("tokenizer.ggml.tokens"));
  if (static_cast<int64_t>(tokens.size()) != n_vocab)
    return Bad(file, fmt::format("it lists {} tokens but its embedding has {} rows", tokens.size(), n_vocab));
  return {};
}

}  // namespace moend
