// How models write thoughts and tool calls, as llama.cpp's common/chat finds it in their chat templates, and
// JSON schemas as grammars. chat_format.cpp is the only file that speaks to these, since their interface is
// not stable.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "moend/base/error.h"
#include "moend/model/chat.h"

namespace moend {

// Whether this build has them.
bool HasChatFormats();

// A template, analyzed. Bounds neither time nor memory: call this in a Worker only. Throws what common/chat
// throws.
class ChatFormat {
 public:
  ChatFormat(const std::string& source, const std::string& bos, const std::string& eos);
  ~ChatFormat();

  // `request` has "messages", [{"role", "content", "reasoning_content", "tool_calls": [{"id", "name",
  // "arguments"}], "tool_call_id", "name"}]; "tools", OpenAI's list; "tool_choice", "auto", "none" or
  // "required"; "parallel" (may be null); "schema" (may be null); "variables", an object;
  // "add_generation_prompt"; "split", whether thoughts are told apart. Where the prompt is to have other
  // texts, "shown" has these "messages", "tools" and "variables". The reply has "prompt"; "parser", "kind",
  // "generation_prompt", "preserved" and "stops" as AnswerFormat; "grammar", "lazy", "triggers" [{"text",
  // "regex"}]; "begun": whether the grammar begins with the generation prompt; "thinking": the text with
  // which thoughts begin, empty where there are none; "calls": whether the format has tool calls, where tools
  // were given.
  nlohmann::ordered_json Apply(const nlohmann::ordered_json& request) const;

  // The prompt without a generation prompt, of "messages", "tools" and "variables".
  std::string Prompt(const nlohmann::ordered_json& shown) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// In a Worker only, as above. Throws where the schema is not one that it knows.
std::string SchemaToGrammar(const std::string& schema);

// What generated grammars let through and JSON does not is taken out of them.
std::string StrictJson(const std::string& grammar);

struct Answer {
  std::string reasoning, content;
  std::vector<ToolCall> tool_calls;
};

// Thread safe.
class AnswerParser {
 public:
  // kInternal where format.parser is none.
  static Expected<std::unique_ptr<AnswerParser>> Make(const AnswerFormat& format);
  ~AnswerParser();

  // `text`, UTF-8, is what the model wrote so far, special tokens among format.preserved included. With
  // `partial` more may come. kInvalidArgument when it is not of the format; kTooLong when it nests too deeply
  // to be read.
  Expected<Answer> Parse(std::string_view text, bool partial) const;

 private:
  struct Impl;
  explicit AnswerParser(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace moend
