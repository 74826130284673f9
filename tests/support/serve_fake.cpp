#include "tests/support/serve_fake.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <stdexcept>

namespace moend::serve::test {
namespace {

struct Block {
  std::shared_ptr<Ledger> ledger;
  int64_t bytes;
  Block(std::shared_ptr<Ledger> l, int64_t n) : ledger(std::move(l)), bytes(n) { ledger->Add(n); }
  ~Block() { ledger->Remove(bytes); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
};

struct FakeContext : Context {
  std::vector<int32_t> ids;
  std::vector<float> next;
  std::vector<std::shared_ptr<Block>> blocks;
  int level = 0;
  const std::vector<int32_t>& tokens() const override { return ids; }
  std::span<const float> logits() const override { return next; }
  int64_t bytes() const override {
    int64_t n = 0;
    for (const auto& b : blocks) n += b->bytes;
    return n;
  }
  KvStats stats() const override {
    KvStats s;
    s.bytes = bytes();
    s.bytes_full = std::ssize(ids) * 256;
    s.layers = {{Expert{0.5, 4, 4}, std::ssize(ids) / 2, s.bytes / 2},
                {Expert{1, 8, 4}, std::ssize(ids), s.bytes / 2}};
    return s;
  }
};

// The only token with a high logit.
int32_t NextOf(const std::vector<int32_t>& ids) {
  std::string text;
  for (const int32_t t : ids) text += t < 256 ? static_cast<char>(t) : '\n';
  const auto echo = text.rfind("echo:");
  const auto end = echo == std::string::npos ? echo : text.find_first_of(".|", echo);
  if (end != std::string::npos) {
    const std::string wanted = text.substr(echo + 5, end - echo - 5) + (text[end] == '.' ? "." : "");
    // How much of it was answered already: the answer follows the assistant's turn, or the last newline.
    constexpr std::string_view kTurn = "assistant:\n";
    const auto turn = text.rfind(kTurn);
    const auto from = turn != std::string::npos && turn > end ? turn + kTurn.size() : text.rfind('\n') + 1;
    const std::string said = text.substr(from);
    if (said.size() < wanted.size() && wanted.starts_with(said) && from > end)
      return static_cast<unsigned char>(wanted[said.size()]);
    if (said == wanted) return FakeBackend::kEnd;
  }
  uint64_t h = 1469598103934665603u;
  for (const int32_t t : ids) h = (h ^ static_cast<uint64_t>(t)) * 1099511628211u;
  return static_cast<int32_t>('a' + (h >> 20) % 26);
}

void SetLogits(FakeContext& c) {
  c.next.assign(FakeBackend::kVocab, 0.0f);
  for (std::size_t i = 0; i < c.next.size(); ++i) c.next[i] = static_cast<float>(i % 7) * 0.1f;
  c.next[static_cast<std::size_t>(NextOf(c.ids))] = 20.0f;
}

}  // namespace

FakeBackend::FakeBackend(const FakeOptions& options)
    : options_(options),
      template_(
          "{%- for m in messages %}{{- m.role + ': ' + m.content + '\\n' }}{%- endfor %}"
          "{%- if add_generation_prompt %}{{- 'assistant:\\n' }}{%- endif %}",
          "", "", special_) {
  info_ = {.model_name = "fake",
           .model_hash = "0123456789abcdef",
           .plan_name = "fake plan",
           .cache_id = "fake cache " + std::to_string(options.bytes_per_token),
           .n_vocab = kVocab,
           .n_ctx = options.n_ctx,
           .n_ctx_train = options.n_ctx,
           .longest_token = 1,
           .levels = options.levels};
}

Expected<std::vector<int32_t>> FakeBackend::Tokenize(std::string_view text, bool add_special, bool,
                                                     const std::function<bool()>& stop) const {
  std::vector<int32_t> tokens;
  if (add_special) tokens.push_back(kBegin);
  for (const char c : text) {
    if (stop && stop()) return Fail(ErrorCode::kCancelled, "stopped");
    if (options_.tokenize_byte.count() > 0) std::this_thread::sleep_for(options_.tokenize_byte);
    ++tokenized;
    tokens.push_back(static_cast<unsigned char>(c));
  }
  return tokens;
}

std::string FakeBackend::Piece(int32_t token) const {
  return token < 256 ? std::string(1, static_cast<char>(token)) : std::string();
}

std::string FakeBackend::Detokenize(std::span<const int32_t> tokens) const {
  std::string out;
  for (const int32_t t : tokens) out += Piece(t);
  return out;
}

Expected<ChatTokens> FakeBackend::Chat(std::span<const ChatMessage> messages, const ChatOptions& options,
                                       const std::function<bool()>& stop) const {
  ChatTokens out;
  std::string text;
  if (!options.tools.empty() || !options.json_schema.empty()) {
    MOEND_ASSIGN(ChatPrompt prompt, template_.Prepare(messages, options));
    text = std::move(prompt.prompt.text);
    out.format = std::move(prompt.format);
  } else {
    for (const ChatMessage& m : messages) text += m.role + ": " + m.content + "\n";
    if (options.add_generation_prompt) text += "assistant:\n";
  }
  MOEND_ASSIGN(out.tokens, Tokenize(text, true, true, stop));
  return out;
}

namespace {

class FakeGrammar : public Grammar {
 public:
  explicit FakeGrammar(std::optional<std::string> literal) : literal_(std::move(literal)) {}
  Expected<std::vector<bool>> Allows(std::span<const int32_t> tokens) override {
    std::vector<bool> allowed;
    for (const int32_t t : tokens)
      allowed.push_back(
          !literal_ ||
          t == (at_ < literal_->size() ? static_cast<unsigned char>((*literal_)[at_]) : FakeBackend::kEnd));
    return allowed;
  }
  Expected<std::vector<bool>> AllowsOfAll() override {
    std::vector<int32_t> all(FakeBackend::kVocab);
    std::iota(all.begin(), all.end(), 0);
    return Allows(all);
  }
  void Accept(int32_t) override { ++at_; }

 private:
  std::optional<std::string> literal_;
  std::size_t at_ = 0;
};

}  // namespace

Expected<std::unique_ptr<Grammar>> FakeBackend::MakeGrammar(const GrammarSource& source) const {
  std::optional<std::string> literal;
  constexpr std::string_view kLiteral = "root ::= \"";
  if (source.text.starts_with(kLiteral) && source.text.ends_with('"')) {
    literal = source.text.substr(kLiteral.size(), source.text.size() - kLiteral.size() - 1);
  } else if (source.text.find("::=") == std::string::npos) {
    return Fail(ErrorCode::kInvalidArgument, "the grammar is none");
  }
  return std::make_unique<FakeGrammar>(std::move(literal));
}

Expected<GrammarSource> FakeBackend::SchemaGrammar(const std::string& schema) const {
  return GrammarSource{.text = "root ::= \"" + std::to_string(schema.size()) + '"'};
}

Expected<std::unique_ptr<Context>> FakeBackend::NewContext() {
  return std::make_unique<FakeContext>();
}

Expected<void> FakeBackend::Prefill(Context& context, std::span<const int32_t> tokens,
                                    const std::function<bool(double)>& between) {
  auto& c = static_cast<FakeContext&>(context);
  if (fail_prefill) return Fail(ErrorCode::kInternal, "the prefill failed on purpose");
  if (throw_in_prefill) throw std::runtime_error("thrown on purpose");
  const auto n = std::ssize(tokens);
  const Block scratch(ledger_, PrefillScratch(std::ssize(c.ids), n));
  for (int64_t at = 0; at < n; at += options_.block_tokens) {
    const int64_t m = std::min(options_.block_tokens, n - at);
    if (options_.prefill_block.count() > 0) std::this_thread::sleep_for(options_.prefill_block);
    c.blocks.push_back(std::make_shared<Block>(ledger_, m * options_.bytes_per_token / (c.level + 1)));
    c.ids.insert(c.ids.end(), tokens.begin() + at, tokens.begin() + at + m);
    prefilled += m;
    if (!between(static_cast<double>(at + m) / static_cast<double>(n)))
      return Fail(ErrorCode::kCancelled, "stopped");
  }
  SetLogits(c);
  return {};
}

Expected<void> FakeBackend::DecodeBatch(std::span<Context* const> contexts, std::span<const int32_t> tokens) {
  if (fail_decode) return Fail(ErrorCode::kInternal, "the step failed on purpose");
  if (options_.step.count() > 0) std::this_thread::sleep_for(options_.step);
  ++steps;
  largest_batch = std::max<int64_t>(largest_batch, std::ssize(contexts));
  for (std::size_t i = 0; i < contexts.size(); ++i) {
    auto& c = static_cast<FakeContext&>(*contexts[i]);
    c.ids.push_back(tokens[i]);
    c.blocks.push_back(std::make_shared<Block>(ledger_, options_.bytes_per_token / (c.level + 1)));
    SetLogits(c);
  }
  return {};
}

Expected<std::unique_ptr<Context>> FakeBackend::Fork(const Context& context) {
  ++forks;
  return std::make_unique<FakeContext>(static_cast<const FakeContext&>(context));
}

Expected<void> FakeBackend::Compress(Context& context, int level) {
  auto& c = static_cast<FakeContext&>(context);
  ++compressed;
  auto packed = std::make_shared<Block>(ledger_, std::ssize(c.ids) * options_.bytes_per_token / (level + 1));
  c.blocks = {std::move(packed)};
  c.level = level;
  return {};
}

Expected<std::string> FakeBackend::Serialize(const Context& context) {
  const auto& c = static_cast<const FakeContext&>(context);
  return std::string(reinterpret_cast<const char*>(c.ids.data()), c.ids.size() * 4);
}

Expected<std::unique_ptr<Context>> FakeBackend::Restore(std::string_view bytes) {
  if (bytes.size() % 4 != 0) return Fail(ErrorCode::kCorrupt, "half a token");
  auto c = std::make_unique<FakeContext>();
  c->ids.resize(bytes.size() / 4);
  std::memcpy(c->ids.data(), bytes.data(), bytes.size());
  c->blocks.push_back(std::make_shared<Block>(ledger_, std::ssize(c->ids) * options_.bytes_per_token));
  SetLogits(*c);
  ++restored;
  return c;
}

std::string FakeBackend::Expect(const std::vector<int32_t>& prompt, int64_t n) const {
  std::vector<int32_t> ids = prompt;
  std::string out;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t t = NextOf(ids);
    if (t == kEnd) break;
    out += Piece(t);
    ids.push_back(t);
  }
  return out;
}

}  // namespace moend::serve::test
