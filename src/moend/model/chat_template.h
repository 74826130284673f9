// A conversation as the text that a model was trained on, by the chat template of its file.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <span>
#include <string>

#include "moend/base/error.h"
#include "moend/model/chat.h"
#include "moend/model/special_tokens.h"
#include "moend/model/worker.h"

namespace moend {

// Thread safe. The template is Jinja, a program from a file that is not trusted: it runs in a process of its
// own, with bounds on time and memory.
class ChatTemplate {
 public:
  // `special` are the tokens whose texts a message must not be able to forge; it must outlive this.
  // `with_tools` is the template for chats with tools, if a file has one of its own; else empty.
  ChatTemplate(std::string source, std::string bos, std::string eos, const SpecialTokens& special,
               std::string with_tools = {});

  // kInvalidArgument: the template refuses these messages, or options.variables is no JSON object.
  // kUnsupported: it cannot be run. No message names a file.
  Expected<PromptText> Render(std::span<const ChatMessage> messages, const ChatOptions& options) const;

  // The same for all of `options`, and how the answer is to be read.
  Expected<ChatPrompt> Prepare(std::span<const ChatMessage> messages, const ChatOptions& options) const;

  // Empty where the template is run as it is; else a sentence that says what is done instead, and why.
  std::string Note() const;

 private:
  enum class Way { kUnknown, kJinja, kBuiltIn, kNone };
  Way Probe() const;
  Expected<std::string> RunJinja(std::span<const ChatMessage> messages, const ChatOptions& options) const;
  Expected<std::string> RunBuiltIn(std::span<const ChatMessage> messages, bool add_generation_prompt) const;
  // What the process says to a request: a JSON object in MessagePack.
  Expected<std::string> Ask(const nlohmann::ordered_json& request) const;
  // ChatFormat::Apply() for one of the templates.
  Expected<nlohmann::ordered_json> Apply(const std::string& which, nlohmann::ordered_json request) const;
  Expected<AnswerFormat> PlainFormat(const ChatOptions& options) const;
  Expected<ChatPrompt> PrepareFallback(std::span<const ChatMessage> messages, const ChatOptions& options,
                                       const nlohmann::ordered_json& tools,
                                       const nlohmann::ordered_json& schema,
                                       const std::string& thinking) const;

  std::string source_, with_tools_, bos_, eos_;
  const SpecialTokens& special_;
  mutable Worker worker_;
  mutable std::mutex probing_;
  mutable Way way_ = Way::kUnknown;
  mutable std::string why_;                                    // not kJinja
  mutable std::map<std::string, AnswerFormat> plain_formats_;  // of chats without tools, by their variables
};

}  // namespace moend
