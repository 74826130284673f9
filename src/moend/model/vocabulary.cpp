#include "moend/model/vocabulary.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <unordered_set>

namespace moend {
namespace {

// Real ones have at most some hundred bytes (long runs of spaces). Bounds the depth to which libllama undoes
// merges.
constexpr std::size_t kMaxTokenBytes = 4096;
constexpr int32_t kLastTokenType = 6;  // 0 undefined, 1 normal, ... 6 byte

template <class... Args>
std::unexpected<Error> Bad(const GgufFile& file, fmt::format_string<Args...> text, Args&&... args) {
  return Fail(ErrorCode::kCorrupt, "{}: {}", file.path(), fmt::format(text, std::forward<Args>(args)...));
}

Expected<void> CheckTokens(const GgufFile& file, int64_t n_vocab) {
  constexpr const char* kKey = "tokenizer.ggml.tokens";
  MOEND_ASSIGN(const std::vector<std::string_view> tokens, file.Strings(kKey));
  if (static_cast<int64_t>(tokens.size()) != n_vocab)
    return Bad(file, "{} lists {} tokens but tensor token_embd.weight has {} rows", kKey, tokens.size(),
               n_vocab);
  std::unordered_set<std::string_view> seen;
  seen.reserve(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const std::string_view token = tokens[i];
    if (token.size() > kMaxTokenBytes)
      return Bad(file, "{} has a token {} of {} bytes, more than {}", kKey, i, token.size(), kMaxTokenBytes);
    // libllama reads up to the zero, which makes different tokens equal.
    if (token.find('\0') != std::string_view::npos)
      return Bad(file, "{} has a zero byte in token {}", kKey, i);
    if (!token.empty() && !seen.insert(token).second)
      return Bad(file, "{} has the token \"{}\" twice, the second time as {}", kKey, Escaped(token), i);
  }
  // libllama gives empty tokens names of its own.
  for (std::size_t i = 0; i < tokens.size(); ++i)
    if (tokens[i].empty() && seen.contains(fmt::format("[EMPTY_{}]", i)))
      return Bad(file, "{} has an empty token {} and a token named [EMPTY_{}]", kKey, i, i);
  return {};
}

// An optional array with an entry for each token.
Expected<const GgufValue*> PerToken(const GgufFile& file, const char* key, int64_t n_vocab,
                                    std::initializer_list<GgufType> types) {
  const GgufValue* value = file.Find(key);
  if (!value) return nullptr;
  if (!value->is_array || std::find(types.begin(), types.end(), value->type) == types.end())
    return Bad(file, "key {} is of type {}{} instead of array of {}", key, value->is_array ? "array of " : "",
               Name(value->type), Name(*types.begin()));
  if (value->count != n_vocab)
    return Bad(file, "key {} has {} entries for {} tokens", key, value->count, n_vocab);
  return value;
}

Expected<void> CheckScoresAndTypes(const GgufFile& file, int64_t n_vocab) {
  MOEND_ASSIGN(const GgufValue* scores,
               PerToken(file, "tokenizer.ggml.scores", n_vocab, {GgufType::kFloat32, GgufType::kInt32}));
  if (scores && scores->type == GgufType::kFloat32)
    for (int64_t i = 0; i < n_vocab; ++i) {
      float score;
      std::memcpy(&score, scores->bytes.data() + i * 4, 4);
      if (std::isnan(score)) return Bad(file, "tokenizer.ggml.scores has no number for token {}", i);
    }
  MOEND_ASSIGN(const GgufValue* types,
               PerToken(file, "tokenizer.ggml.token_type", n_vocab, {GgufType::kInt32}));
  if (types)
    for (int64_t i = 0; i < n_vocab; ++i) {
      int32_t type;
      std::memcpy(&type, types->bytes.data() + i * 4, 4);
      if (type < 0 || type > kLastTokenType)
        return Bad(file, "tokenizer.ggml.token_type of token {} is {}, outside 0 to {}", i, type,
                   kLastTokenType);
    }
  return {};
}

Expected<void> CheckMerges(const GgufFile& file) {
  constexpr const char* kKey = "tokenizer.ggml.merges";
  if (!file.Find(kKey)) return Bad(file, "a gpt2 tokenizer needs the key {}", kKey);
  MOEND_ASSIGN(const std::vector<std::string_view> merges, file.Strings(kKey));
  for (std::size_t i = 0; i < merges.size(); ++i) {
    const std::string_view merge = merges[i];
    if (merge.size() > 2 * kMaxTokenBytes || merge.find('\0') != std::string_view::npos ||
        (merge.size() < 3 || merge.find(' ', 1) == std::string_view::npos))
      return Bad(file, "{}: entry {} is \"{}\", not two tokens with a space between", kKey, i,
                 Escaped(merge));
  }
  return {};
}

// Ids out of range are ignored by libllama with a warning, which would quietly change how prompts start and
// generations end.
Expected<void> CheckSpecialTokens(const GgufFile& file, int64_t n_vocab) {
  for (const char* name : {"bos", "eos", "eot", "eom"}) {
    const std::string key = fmt::format("tokenizer.ggml.{}_token_id", name);
    if (!file.Find(key)) continue;
    // Some converters write all ones for "none".
    MOEND_ASSIGN(const int64_t id, file.Integer(key, INT64_MIN, INT64_MAX));
    if (id >= n_vocab && id != UINT32_MAX)
      return Bad(file, "key {} is {}, but there are only {} tokens", key, id, n_vocab);
  }
  for (const char* name : {"bos", "eos", "space_prefix"})
    MOEND_TRY(
        file.Boolean(fmt::format("tokenizer.ggml.add_{}{}", name, name[0] == 's' ? "" : "_token"), false));
  return {};
}

// Pre-tokenizers whose words libllama finds by code of its own, or by patterns without repetition.
constexpr std::array kSplitByCode = {
    "llama3",    "llama-v3",    "llama-bpe",  "falcon3",    "falcon-h1", "pixtral", "smaug-bpe",
    "dbrx",      "gpt-2",       "phi-2",      "mpt",        "olmo",      "qwen2",   "deepseek-r1-qwen",
    "megrez",    "qwen35",      "stablelm2",  "smollm",     "starcoder", "refact",  "command-r",
    "codeshell", "exaone",      "minerva-7b", "trillion",   "hunyuan",   "grok-2",  "granite-docling",
    "lfm2",      "chatglm-bpe", "kormo",      "solar-open", "mellum",    "gigachat"};

// Pre-tokenizers that keep spaces as they are; libllama stops the process on a merge next to a space.
constexpr std::array kKeepsSpaces = {"gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace"};

}  // namespace

bool SplitsByRegex(std::string_view pre_tokenizer) {
  return std::find(kSplitByCode.begin(), kSplitByCode.end(), pre_tokenizer) == kSplitByCode.end();
}

Expected<void> CheckVocabulary(const GgufFile& file, int64_t n_vocab) {
  MOEND_ASSIGN(const std::string_view model, file.String("tokenizer.ggml.model"));
  if (model != "llama" && model != "gpt2")
    return Fail(ErrorCode::kUnsupported, "{} has a tokenizer of the kind \"{}\"; moend runs llama and gpt2",
                file.path(), Escaped(model));
  MOEND_ASSIGN(const std::string_view pre, file.String("tokenizer.ggml.pre", ""));
  if (model == "gpt2" && std::find(kKeepsSpaces.begin(), kKeepsSpaces.end(), pre) != kKeepsSpaces.end())
    return Fail(ErrorCode::kUnsupported,
                "{} has a tokenizer of the kind gpt2 with the pre-tokenizer {}, which "
                "moend does not run",
                file.path(), pre);
  MOEND_TRY(CheckTokens(file, n_vocab));
  MOEND_TRY(CheckScoresAndTypes(file, n_vocab));
  if (model == "gpt2") MOEND_TRY(CheckMerges(file));
  MOEND_TRY(CheckSpecialTokens(file, n_vocab));
  MOEND_ASSIGN(const std::string_view chat, file.String("tokenizer.chat_template", ""));
  if (chat.find('\0') != std::string_view::npos) return Bad(file, "tokenizer.chat_template has a zero byte");
  return {};
}

}  // namespace moend
