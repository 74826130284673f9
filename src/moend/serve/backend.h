// What the server needs of an engine. The real one is EngineBackend; tests run the server over a small
// deterministic one that has no model.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moend/base/error.h"
#include "moend/engine/engine.h"
#include "moend/model/model.h"

namespace moend::serve {

// One context with its K/V cache. Used by the scheduler's thread only.
class Context {
 public:
  virtual ~Context() = default;
  virtual const std::vector<int32_t>& tokens() const = 0;
  virtual std::span<const float> logits() const = 0;  // [n_vocab], of the newest token
  virtual KvStats stats() const = 0;
  virtual int64_t bytes() const = 0;  // of K/V, allocated now; pages shared with a fork count in each
};

struct BackendInfo {
  std::string model_name = {};  // the file's name without its suffix
  std::string model_hash = {};  // of the weights
  std::string plan_name = {};   // for people: "2d_hetero 14.0x"
  std::string cache_id = {};  // contexts can be exchanged between two backends if and only if these are equal
  int64_t n_vocab = 0;
  int64_t n_ctx = 0;  // most tokens of a context
  int64_t n_ctx_train = 0;
  int64_t n_params = 0;
  int64_t model_bytes = 0;
  int64_t longest_token = 0;  // most bytes of text that a token stands for; 0: not known
  int levels = 0;             // how many times a context can be compressed further
};

struct ChatTokens {
  std::vector<int32_t> tokens;
  AnswerFormat format = {};
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual const BackendInfo& info() const = 0;

  // Thread safe, also while a prefill runs.
  // `stop`: see Tokenizer.
  virtual Expected<std::vector<int32_t>> Tokenize(std::string_view text, bool add_special, bool parse_special,
                                                  const std::function<bool()>& stop) const = 0;
  virtual std::string Piece(int32_t token) const = 0;         // of control tokens nothing,
  virtual std::string SpecialPiece(int32_t token) const = 0;  // or their text
  virtual std::string Detokenize(std::span<const int32_t> tokens) const = 0;
  virtual bool IsEndOfGeneration(int32_t token) const = 0;
  // The tokens of a chat as the model was trained on it; with the generation prompt, what follows is the
  // assistant's answer, of the format that comes with them. What looks like a special token in a message is
  // text.
  virtual Expected<ChatTokens> Chat(std::span<const ChatMessage> messages, const ChatOptions& options,
                                    const std::function<bool()>& stop) const = 0;
  // See Tokenizer.
  virtual Expected<std::unique_ptr<Grammar>> MakeGrammar(const GrammarSource& source) const = 0;
  virtual Expected<GrammarSource> SchemaGrammar(const std::string& schema) const = 0;

  // From here on: one thread, the scheduler's.
  virtual Expected<std::unique_ptr<Context>> NewContext() = 0;
  // `between` is called between two blocks of work; inside it DecodeBatch of other contexts is allowed.
  // Returning false stops (kCancelled). After an error the context must be dropped.
  virtual Expected<void> Prefill(Context& context, std::span<const int32_t> tokens,
                                 const std::function<bool(double)>& between) = 0;
  virtual Expected<void> DecodeBatch(std::span<Context* const> contexts, std::span<const int32_t> tokens) = 0;
  virtual Expected<std::unique_ptr<Context>> Fork(const Context& context) = 0;

  // Re-packs a context at level 1 to info().levels; higher levels are smaller. Not undone.
  virtual Expected<void> Compress(Context& context, int level) = 0;

  virtual Expected<std::string> Serialize(const Context& context) = 0;
  virtual Expected<std::unique_ptr<Context>> Restore(std::string_view bytes) = 0;

  // Bytes of K/V allocated by all contexts together, each page once.
  virtual int64_t live_bytes() const = 0;
  virtual int64_t peak_bytes() const = 0;
  // Most bytes a context holds on its way to `n_tokens` tokens, prefill's scratch not included.
  virtual int64_t ContextBound(int64_t n_tokens) const = 0;
  // Most bytes of scratch while `n_new` tokens are prefilled into a context, beyond ContextBound.
  virtual int64_t PrefillScratch(int64_t n_past, int64_t n_new) const = 0;
  // Most extra bytes while a context of `n_tokens` tokens is re-packed.
  virtual int64_t CompressScratch(int64_t n_tokens) const = 0;
};

}  // namespace moend::serve
