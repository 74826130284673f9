// A backend without a model. Tokens are bytes; the answer to a prompt with "echo:TEXT." is TEXT, the full
// stop (or, of "echo:TEXT|", none) and the end; other prompts go on with letters that depend on every token
// before. K/V bytes are counted, shared between forks and given back, as the engine's are.
#pragma once

#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "moend/base/ledger.h"
#include "moend/model/chat_template.h"
#include "moend/model/special_tokens.h"
#include "moend/serve/backend.h"

namespace moend::serve::test {

struct FakeOptions {
  int64_t n_ctx = 4096;
  int64_t bytes_per_token = 64;  // at level 0; a multiple of 64
  int levels = 0;                // level l takes bytes / (l + 1)
  int64_t block_tokens = 16;
  std::chrono::microseconds prefill_block{0}, step{0};  // how long they take
  std::chrono::microseconds tokenize_byte{0};
};

class FakeBackend : public Backend {
 public:
  static constexpr int32_t kEnd = 256, kBegin = 257, kVocab = 258;

  explicit FakeBackend(const FakeOptions& options = {});

  const BackendInfo& info() const override { return info_; }
  Expected<std::vector<int32_t>> Tokenize(std::string_view text, bool add_special, bool,
                                          const std::function<bool()>& stop) const override;
  std::string Piece(int32_t token) const override;
  std::string Detokenize(std::span<const int32_t> tokens) const override;
  bool IsEndOfGeneration(int32_t token) const override { return token == kEnd; }
  std::string SpecialPiece(int32_t token) const override { return Piece(token); }
  // Without tools and schemas the prompt is "ROLE: CONTENT" a line; else the fallback's for models that know
  // none.
  Expected<ChatTokens> Chat(std::span<const ChatMessage> messages, const ChatOptions& options,
                            const std::function<bool()>& stop) const override;
  // Takes "root ::= " and a literal, which is then the answer, and the grammars of formats, which let all
  // through.
  Expected<std::unique_ptr<Grammar>> MakeGrammar(const GrammarSource& source) const override;
  Expected<GrammarSource> SchemaGrammar(const std::string& schema) const override;
  Expected<std::unique_ptr<Context>> NewContext() override;
  Expected<void> Prefill(Context& context, std::span<const int32_t> tokens,
                         const std::function<bool(double)>& between) override;
  Expected<void> DecodeBatch(std::span<Context* const> contexts, std::span<const int32_t> tokens) override;
  Expected<std::unique_ptr<Context>> Fork(const Context& context) override;
  Expected<void> Compress(Context& context, int level) override;
  Expected<std::string> Serialize(const Context& context) override;
  Expected<std::unique_ptr<Context>> Restore(std::string_view bytes) override;
  int64_t live_bytes() const override { return ledger_->live(); }
  int64_t peak_bytes() const override { return ledger_->peak(); }
  int64_t ContextBound(int64_t n_tokens) const override { return n_tokens * options_.bytes_per_token; }
  int64_t PrefillScratch(int64_t n_past, int64_t n_new) const override {
    return n_new * (n_past > 0 ? 160 : 64);  // a further turn takes more than a first one
  }
  int64_t CompressScratch(int64_t n_tokens) const override { return n_tokens * options_.bytes_per_token; }

  // What a request with this prompt answers, at most n tokens, worked out without the server.
  std::string Expect(const std::vector<int32_t>& prompt, int64_t n) const;

  // What happened.
  mutable std::atomic<int64_t> tokenized{0};  // bytes that Tokenize() has seen
  std::atomic<int64_t> prefilled{0}, steps{0}, largest_batch{0}, compressed{0}, forks{0}, restored{0};
  std::atomic<bool> fail_decode{false}, fail_prefill{false}, throw_in_prefill{false};

 private:
  FakeOptions options_;
  BackendInfo info_;
  SpecialTokens special_;
  ChatTemplate template_;
  std::shared_ptr<Ledger> ledger_ = std::make_shared<Ledger>();
};

}  // namespace moend::serve::test
