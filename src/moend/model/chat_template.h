// A conversation as the text that a model was trained on, by the chat template of its file.
#pragma once

#include <memory>
#include <mutex>
#include <span>
#include <string>

#include "moend/base/error.h"
#include "moend/model/model.h"
#include "moend/model/special_tokens.h"
#include "moend/model/worker.h"

namespace moend {

// Thread safe. The template is Jinja, a program from a file that is not trusted: it runs in a process of its
// own, with bounds on time and memory.
class ChatTemplate {
 public:
  // `special` are the tokens whose texts a message must not be able to forge; it must outlive this.
  ChatTemplate(std::string source, std::string bos, std::string eos, const SpecialTokens& special);

  // kInvalidArgument: the template refuses these messages, or options.variables is no JSON object.
  // kUnsupported: it cannot be run. No message names a file.
  Expected<PromptText> Render(std::span<const ChatMessage> messages, const ChatOptions& options) const;

  // Empty where the template is run as it is; else a sentence that says what is done instead, and why.
  std::string Note() const;

 private:
  enum class Way { kUnknown, kJinja, kBuiltIn, kNone };
  Way Probe() const;
  Expected<std::string> RunJinja(std::span<const ChatMessage> messages, const ChatOptions& options) const;
  Expected<std::string> RunBuiltIn(std::span<const ChatMessage> messages, bool add_generation_prompt) const;

  std::string source_, bos_, eos_;
  const SpecialTokens& special_;
  mutable Worker worker_;
  mutable std::mutex probing_;
  mutable Way way_ = Way::kUnknown;
  mutable std::string why_;  // not kJinja
};

}  // namespace moend
