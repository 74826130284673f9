#include "moend/model/tokenizer.h"

#include <llama-cpp.h>
#include <llama.h>

#include <algorithm>
#include <climits>
#include <exception>
#include <mutex>
#include <new>

#include "moend/model/big_stack.h"
#include "moend/model/vocabulary.h"

namespace moend {
namespace {

// libllama and ggml log through one callback of the process. The first error since it was cleared, which is
// the one that names the cause, is kept for the message of the call that failed on this thread; all else goes
// nowhere.
thread_local std::string first_log_error;

void KeepErrors(ggml_log_level level, const char* text, void* /*user*/) {
  if (level != GGML_LOG_LEVEL_ERROR || !text || !first_log_error.empty()) return;
  first_log_error = text;
  while (!first_log_error.empty() && first_log_error.back() == '\n') first_log_error.pop_back();
}

// "llama_model_load: error loading model: error loading model vocabulary: <cause>" without the way there.
std::string Cause(std::string_view log) {
  for (std::string_view way : {"error loading model: ", "error loading model vocabulary: "})
    if (const auto at = log.find(way); at != std::string_view::npos) log.remove_prefix(at + way.size());
  return log.empty() ? "it gives no reason" : Printable(log);
}

// libllama's vocabulary functions are const and keep no state, so they may run on several threads at once.
// Some of them throw, which must not cross the library's border.
class LlamaTokenizer final : public Tokenizer {
 public:
  LlamaTokenizer(llama_model_ptr model, std::string path, bool splits_by_regex)
      : model_(std::move(model)),
        vocab_(llama_model_get_vocab(model_.get())),
        path_(std::move(path)),
        splits_by_regex_(splits_by_regex) {
    if (const char* text = llama_model_chat_template(model_.get(), nullptr)) template_ = text;
  }

  Expected<std::vector<int32_t>> Tokenize(std::string_view text, bool add_special,
                                          bool parse_special) const override {
    const std::size_t limit = splits_by_regex_ ? kMaxRegexText : kMaxText;
    if (text.size() > limit)
      return Fail(ErrorCode::kTooLong,
                  "a text of {} bytes is longer than the {} that the tokenizer of {} takes at once",
                  text.size(), limit, path_);
    if (!splits_by_regex_ || text.size() <= kFewBytes) return TokenizeHere(text, add_special, parse_special);
    Expected<std::vector<int32_t>> tokens;
    MOEND_TRY(RunWithStack(kBaseStack + kStackPerByte * static_cast<int64_t>(text.size()),
                           [&] { tokens = TokenizeHere(text, add_special, parse_special); }));
    return tokens;
  }

  std::string Piece(int32_t token, bool special) const override {
    if (token < 0 || token >= llama_vocab_n_tokens(vocab_)) return {};
    std::string piece(32, '\0');
    int32_t n =
        llama_token_to_piece(vocab_, token, piece.data(), static_cast<int32_t>(piece.size()), 0, special);
    if (n < 0) {
      piece.resize(static_cast<std::size_t>(-n));
      n = llama_token_to_piece(vocab_, token, piece.data(), -n, 0, special);
    }
    piece.resize(static_cast<std::size_t>(std::max(n, 0)));
    return piece;
  }

  std::string Detokenize(std::span<const int32_t> tokens, bool special) const override {
    std::vector<int32_t> known;  // libllama throws on ids it has no token for
    known.reserve(tokens.size());
    for (int32_t t : tokens)
      if (t >= 0 && t < llama_vocab_n_tokens(vocab_)) known.push_back(t);
    if (known.empty() || known.size() > INT_MAX) return {};
    const auto count = static_cast<int32_t>(known.size());
    std::string text(known.size() * 4 + 16, '\0');
    int32_t n = llama_detokenize(vocab_, known.data(), count, text.data(), static_cast<int32_t>(text.size()),
                                 false, special);
    if (n < 0) {
      text.resize(static_cast<std::size_t>(-n));
      n = llama_detokenize(vocab_, known.data(), count, text.data(), -n, false, special);
    }
    text.resize(static_cast<std::size_t>(std::max(n, 0)));
    return text;
  }

  bool IsEndOfGeneration(int32_t token) const override {
    return token >= 0 && token < llama_vocab_n_tokens(vocab_) && llama_vocab_is_eog(vocab_, token);
  }
  int32_t bos() const override { return llama_vocab_bos(vocab_); }
  bool adds_bos() const override { return llama_vocab_get_add_bos(vocab_); }
  bool has_chat_template() const override { return !template_.empty(); }

  Expected<std::string> ApplyChatTemplate(std::span<const ChatMessage> messages,
                                          bool add_generation_prompt) const override {
    if (template_.empty())
      return Fail(ErrorCode::kUnsupported, "{} has no chat template; give it plain text instead", path_);
    std::vector<llama_chat_message> chat;
    std::size_t bytes = 0;
    for (const ChatMessage& m : messages) {
      // libllama reads up to a zero byte and would drop the rest.
      if (m.role.find('\0') != std::string::npos || m.content.find('\0') != std::string::npos)
        return Fail(ErrorCode::kInvalidArgument, "message {} of the chat has a zero byte", chat.size() + 1);
      chat.push_back({m.role.c_str(), m.content.c_str()});
      bytes += m.role.size() + m.content.size();
    }
    if (bytes > kMaxText)
      return Fail(ErrorCode::kTooLong, "a chat of {} bytes is longer than the {} that can be formatted",
                  bytes, kMaxText);
    try {
      // The first call only measures.
      int32_t n = llama_chat_apply_template(template_.c_str(), chat.data(), chat.size(),
                                            add_generation_prompt, nullptr, 0);
      if (n < 0)
        return Fail(ErrorCode::kUnsupported, "{} has a chat template that libllama does not know", path_);
      std::string text(static_cast<std::size_t>(n) + 1, '\0');
      n = llama_chat_apply_template(template_.c_str(), chat.data(), chat.size(), add_generation_prompt,
                                    text.data(), n + 1);
      text.resize(static_cast<std::size_t>(std::max(n, 0)));
      return text;
    } catch (const std::exception& e) {
      return Fail(ErrorCode::kUnsupported, "{}: its chat template cannot be applied: {}", path_, e.what());
    }
  }

  // What libllama would stop the process for when a text is tokenized.
  Expected<void> CheckLoaded(int64_t n_vocab) const {
    if (llama_vocab_n_tokens(vocab_) != n_vocab)
      return Fail(ErrorCode::kCorrupt, "{} has a tokenizer of {} tokens but an embedding of {} rows", path_,
                  llama_vocab_n_tokens(vocab_), n_vocab);
    if (llama_vocab_get_add_bos(vocab_) && llama_vocab_bos(vocab_) < 0)
      return Fail(ErrorCode::kCorrupt, "{} asks for a first token before every text but does not say which",
                  path_);
    if (llama_vocab_get_add_eos(vocab_) && llama_vocab_eos(vocab_) < 0)
      return Fail(ErrorCode::kCorrupt, "{} asks for a last token after every text but does not say which",
                  path_);
    return {};
  }

 private:
  static constexpr std::size_t kMaxText = INT_MAX / 4;
  // See SplitsByRegex: measured are 330 bytes of stack for each byte of a word, which the text may be one of.
  static constexpr std::size_t kFewBytes = 1024, kMaxRegexText = 1 << 20;
  static constexpr int64_t kBaseStack = 1 << 20, kStackPerByte = 2048;

  Expected<std::vector<int32_t>> TokenizeHere(std::string_view text, bool add_special,
                                              bool parse_special) const {
    try {
      const auto length = static_cast<int32_t>(text.size());
      std::vector<int32_t> tokens(text.size() + 16);  // mostly enough at once
      int32_t n = llama_tokenize(vocab_, text.data(), length, tokens.data(),
                                 static_cast<int32_t>(tokens.size()), add_special, parse_special);
      if (n < 0 && n != INT_MIN) {
        tokens.resize(static_cast<std::size_t>(-n));
        n = llama_tokenize(vocab_, text.data(), length, tokens.data(), -n, add_special, parse_special);
      }
      if (n < 0)
        return Fail(ErrorCode::kInternal, "the tokenizer of {} gave up on a text of {} bytes", path_, length);
      tokens.resize(static_cast<std::size_t>(n));
      // A text or a template may spell out the BOS token that is added: one is meant.
      if (add_special && parse_special && adds_bos() && tokens.size() > 1 && tokens[0] == bos() &&
          tokens[1] == bos())
        tokens.erase(tokens.begin());
      return tokens;
    } catch (const std::bad_alloc&) {
      return Fail(ErrorCode::kOutOfMemory, "no memory to tokenize a text of {} bytes", text.size());
    } catch (const std::exception& e) {
      return Fail(ErrorCode::kCorrupt, "the tokenizer of {} lacks a token that a text of {} bytes needs ({})",
                  path_, text.size(), e.what());
    }
  }

  llama_model_ptr model_;
  const llama_vocab* vocab_;
  std::string path_, template_;
  bool splits_by_regex_;
};

}  // namespace

void StartLibllama() {
  static std::once_flag once;
  std::call_once(once, [] {
    llama_log_set(KeepErrors, nullptr);
    llama_backend_init();
  });
}

Expected<std::unique_ptr<Tokenizer>> LoadTokenizer(const GgufFile& file, int64_t n_vocab) {
  MOEND_TRY(CheckVocabulary(file, n_vocab));
  StartLibllama();
  first_log_error.clear();
  ggml_backend_dev_t no_devices[] = {nullptr};
  llama_model_params params = llama_model_default_params();
  params.vocab_only = true;
  params.n_gpu_layers = 0;
  params.devices = no_devices;
  llama_model_ptr model;
  try {
    model.reset(llama_model_load_from_file(file.path().c_str(), params));
  } catch (const std::exception& e) {
    first_log_error = e.what();
  }
  if (!model)
    return Fail(ErrorCode::kCorrupt, "{}: libllama cannot read its tokenizer: {}", file.path(),
                Cause(first_log_error));
  MOEND_ASSIGN(const std::string_view kind, file.String("tokenizer.ggml.model"));
  MOEND_ASSIGN(const std::string_view pre, file.String("tokenizer.ggml.pre", ""));
  auto tokenizer =
      std::make_unique<LlamaTokenizer>(std::move(model), file.path(), kind == "gpt2" && SplitsByRegex(pre));
  MOEND_TRY(tokenizer->CheckLoaded(n_vocab));
  return tokenizer;
}

}  // namespace moend
