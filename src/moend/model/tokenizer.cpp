#include "moend/model/tokenizer.h"

#include <llama-cpp.h>
#include <llama.h>

#include <algorithm>
#include <climits>
#include <exception>
#include <mutex>
#include <new>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "moend/model/big_stack.h"
#include "moend/model/chat_template.h"
#include "moend/model/json_schema.h"
#include "moend/model/special_tokens.h"
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
std::string CauseInLog(std::string_view log) {
  for (std::string_view way : {"error loading model: ", "error loading model vocabulary: "})
    if (const auto at = log.find(way); at != std::string_view::npos) log.remove_prefix(at + way.size());
  return log.empty() ? "it gives no reason" : Escaped(log);
}

// For models that have no template: they were trained on plain text.
constexpr std::string_view kPlainTemplate =
    "{%- for message in messages %}{%- if message.role == 'user' %}{{- 'Question: ' }}"
    "{%- elif message.role == 'assistant' %}{{- 'Answer: ' }}{%- endif %}{{- message.content + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- 'Answer:' }}{%- endif %}";

// libllama's vocabulary functions are const and keep no state, so they may run on several threads at once.
// Some of them throw, which must not cross the library's border.
class LlamaTokenizer final : public Tokenizer {
 public:
  // of_bytes: a vocabulary of the kind gpt2, whose tokens are strings of bytes.
  LlamaTokenizer(llama_model_ptr model, std::string path, bool of_bytes, bool splits_by_regex)
      : model_(std::move(model)),
        vocab_(llama_model_get_vocab(model_.get())),
        path_(std::move(path)),
        splits_by_regex_(splits_by_regex),
        longest_token_(LongestToken(of_bytes)) {
    for (int32_t id = 0; id < llama_vocab_n_tokens(vocab_); ++id)
      if (llama_vocab_get_attr(vocab_, id) & (LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN))
        special_.Add(llama_vocab_get_text(vocab_, id), id);
    special_.Finish();
    const std::string bos = Piece(llama_vocab_bos(vocab_), true), eos = Piece(llama_vocab_eos(vocab_), true);
    const char* with_tools = llama_model_chat_template(model_.get(), "tool_use");
    if (const char* text = llama_model_chat_template(model_.get(), nullptr); text && *text)
      template_ = std::make_unique<ChatTemplate>(text, bos, eos, special_, with_tools ? with_tools : "");
    plain_ = std::make_unique<ChatTemplate>(std::string(kPlainTemplate), "", "", special_);
  }

  Expected<std::vector<int32_t>> Tokenize(std::string_view text, bool add_special, bool parse_special,
                                          const std::function<bool()>& stop) const override {
    return Cut(text, {}, add_special, parse_special, stop);
  }

  Expected<std::vector<int32_t>> TokenizePrompt(const PromptText& prompt, bool add_special, int64_t from,
                                                const std::function<bool()>& stop) const override {
    std::vector<int64_t> seams;
    for (const int64_t s : prompt.seams)
      if (s >= from) seams.push_back(s - from);
    return Cut(std::string_view(prompt.text).substr(static_cast<std::size_t>(from)), seams, add_special, true,
               stop);
  }

  int64_t longest_token() const override { return longest_token_; }

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
  bool has_chat_template() const override { return template_ != nullptr; }
  std::string chat_template_note() const override { return template_ ? template_->Note() : std::string(); }

  Expected<PromptText> ApplyChatTemplate(std::span<const ChatMessage> messages,
                                         const ChatOptions& options) const override {
    if (!template_)
      return Fail(ErrorCode::kUnsupported, "the model has no chat template; give it plain text instead");
    return template_->Render(messages, options);
  }

  Expected<ChatPrompt> PrepareChat(std::span<const ChatMessage> messages,
                                   const ChatOptions& options) const override {
    return (template_ ? *template_ : *plain_).Prepare(messages, options);
  }

  Expected<std::unique_ptr<Grammar>> MakeGrammar(const GrammarSource& source) const override {
    std::vector<int32_t> begun;
    if (!source.begun.empty()) {
      MOEND_ASSIGN(begun, Tokenize(source.begun, false, true, {}));
    }
    return grammars_.Make(source, std::move(begun));
  }

  Expected<GrammarSource> SchemaGrammar(const std::string& schema) const override {
    auto parsed = nlohmann::ordered_json::parse(schema, nullptr, /*allow_exceptions=*/false);
    if (!parsed.is_object()) return Fail(ErrorCode::kInvalidArgument, "a JSON schema must be a JSON object");
    MOEND_TRY(MakeEnforceable(parsed, /*relaxed=*/false));
    MOEND_ASSIGN(std::string text, grammars_.FromSchema(parsed.dump()));
    return GrammarSource{.text = std::move(text)};
  }

  void StartWorkers() const override {
    grammars_.Start();
    (template_ ? *template_ : *plain_).Note();
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
  static constexpr int64_t kPiecesBetweenStops = 256;
  static constexpr auto kSpace = " \t\n\v\f\r";
  // See SplitsByRegex: measured are 330 bytes of stack for each byte of a word, which the text may be one of.
  static constexpr std::size_t kFewBytes = 1024, kMaxRegexText = 1 << 20;
  static constexpr int64_t kBaseStack = 1 << 20, kStackPerByte = 2048;

  // Special tokens are cut out here, in linear time; libllama's own way takes the square of their number.
  Expected<std::vector<int32_t>> Cut(std::string_view text, std::span<const int64_t> seams, bool add_special,
                                     bool parse_special, const std::function<bool()>& stop) const {
    if (text.size() > kMaxText)
      return Fail(ErrorCode::kTooLong, "a text of {} bytes is longer than the {} that are tokenized at once",
                  text.size(), kMaxText);
    std::vector<int32_t> out;
    if (add_special && adds_bos()) out.push_back(bos());
    std::vector<SpecialMatch> cuts;
    if (parse_special) cuts = special_.Cut(text, seams);
    const auto size = static_cast<int64_t>(text.size());
    cuts.push_back({size, size, -1});
    int64_t done = 0;
    bool strip = false;  // the token before eats the space behind it
    int64_t pieces = 0;
    for (const SpecialMatch& cut : cuts) {
      if (stop && pieces++ % kPiecesBetweenStops == 0 && stop())
        return Fail(ErrorCode::kCancelled, "tokenizing a text of {} bytes was stopped", text.size());
      std::string_view plain =
          text.substr(static_cast<std::size_t>(done), static_cast<std::size_t>(cut.begin - done));
      const auto attributes = cut.token < 0 ? 0 : llama_vocab_get_attr(vocab_, cut.token);
      if (strip) plain.remove_prefix(std::min(plain.size(), plain.find_first_not_of(kSpace)));
      if (attributes & LLAMA_TOKEN_ATTR_LSTRIP) plain = plain.substr(0, plain.find_last_not_of(kSpace) + 1);
      if (!plain.empty()) {
        MOEND_ASSIGN(const auto tokens, TokenizePlain(plain));
        out.insert(out.end(), tokens.begin(), tokens.end());
      }
      if (cut.token >= 0) out.push_back(cut.token);
      strip = attributes & LLAMA_TOKEN_ATTR_RSTRIP;
      done = cut.end;
    }
    if (add_special && adds_bos() && out.size() > 1 && out[1] == out[0]) out.erase(out.begin());
    if (add_special && llama_vocab_get_add_eos(vocab_)) out.push_back(llama_vocab_eos(vocab_));
    return out;
  }

  // The names of tokens are never shorter than what they stand for.
  int64_t LongestToken(bool of_bytes) const {
    for (int32_t id = 0; id < llama_vocab_n_tokens(vocab_); ++id)  // spaces vanish beside such a token
      if (llama_vocab_get_attr(vocab_, id) & (LLAMA_TOKEN_ATTR_LSTRIP | LLAMA_TOKEN_ATTR_RSTRIP)) return 0;
    std::size_t longest = 4;  // an unknown character
    std::unordered_set<std::string_view> names;
    for (int32_t id = 0; id < llama_vocab_n_tokens(vocab_); ++id) {
      const std::string_view name = llama_vocab_get_text(vocab_, id);
      longest = std::max(longest, name.size());
      if (of_bytes && name.size() <= 2) names.insert(name);
    }
    // libllama drops bytes that such a vocabulary has no token for.
    for (int byte = 0; of_bytes && byte < 256; ++byte)
      if (!names.contains(ByteName(byte))) return 0;
    return static_cast<int64_t>(longest);
  }

  // How GPT-2's vocabulary writes a byte: itself if it is a visible character of Latin-1, else a character
  // from U+0100 on, in the order of the bytes.
  static std::string ByteName(int byte) {
    const auto visible = [](int b) { return (b > 0x20 && b < 0x7f) || (b > 0xa0 && b != 0xad); };
    int code = byte;
    if (!visible(byte)) {
      code = 0x100;
      for (int b = 0; b < byte; ++b) code += visible(b) ? 0 : 1;
    }
    if (code < 0x80) return {static_cast<char>(code)};
    return {static_cast<char>(0xc0 | (code >> 6)), static_cast<char>(0x80 | (code & 0x3f))};
  }

  // A text without special tokens.
  Expected<std::vector<int32_t>> TokenizePlain(std::string_view text) const {
    if (splits_by_regex_ && text.size() > kMaxRegexText)
      return Fail(ErrorCode::kTooLong,
                  "a text of {} bytes is longer than the {} that the model's tokenizer takes at once",
                  text.size(), kMaxRegexText);
    if (!splits_by_regex_ || text.size() <= kFewBytes) return TokenizeHere(text);
    Expected<std::vector<int32_t>> tokens;
    MOEND_TRY(RunWithStack(kBaseStack + kStackPerByte * static_cast<int64_t>(text.size()),
                           [&] { tokens = TokenizeHere(text); }));
    return tokens;
  }

  Expected<std::vector<int32_t>> TokenizeHere(std::string_view text) const {
    try {
      const auto length = static_cast<int32_t>(text.size());
      std::vector<int32_t> tokens(text.size() + 16);  // mostly enough at once
      int32_t n = llama_tokenize(vocab_, text.data(), length, tokens.data(),
                                 static_cast<int32_t>(tokens.size()), false, false);
      if (n < 0 && n != INT_MIN) {
        tokens.resize(static_cast<std::size_t>(-n));
        n = llama_tokenize(vocab_, text.data(), length, tokens.data(), -n, false, false);
      }
      if (n < 0)
        return Fail(ErrorCode::kInternal, "the model's tokenizer gave up on a text of {} bytes", length);
      tokens.resize(static_cast<std::size_t>(n));
      return tokens;
    } catch (const std::bad_alloc&) {
      return Fail(ErrorCode::kOutOfMemory, "no memory to tokenize a text of {} bytes", text.size());
    } catch (const std::exception& e) {
      return Fail(ErrorCode::kCorrupt,
                  "the model's tokenizer lacks a token that a text of {} bytes needs ({})", text.size(),
                  e.what());
    }
  }

  llama_model_ptr model_;
  const llama_vocab* vocab_;
  std::string path_;  // for errors while it is loaded
  bool splits_by_regex_;
  int64_t longest_token_ = 0;
  SpecialTokens special_;
  std::unique_ptr<ChatTemplate> template_, plain_;
  GrammarHost grammars_{{vocab_, llama_vocab_n_tokens(vocab_)}};
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
                CauseInLog(first_log_error));
  MOEND_ASSIGN(const std::string_view kind, file.String("tokenizer.ggml.model"));
  MOEND_ASSIGN(const std::string_view pre, file.String("tokenizer.ggml.pre", ""));
  const bool of_bytes = kind == "gpt2";
  auto tokenizer = std::make_unique<LlamaTokenizer>(std::move(model), file.path(), of_bytes,
                                                    of_bytes && SplitsByRegex(pre));
  MOEND_TRY(tokenizer->CheckLoaded(n_vocab));
  return tokenizer;
}

}  // namespace moend
