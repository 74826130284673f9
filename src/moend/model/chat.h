// A conversation, what the model may do in it, and how its answer is to be read.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace moend {

struct ToolCall {
  std::string id = {}, name = {};
  std::string arguments = {};  // JSON
};

struct ChatMessage {
  std::string role, content;
  std::string reasoning_content = {};        // of the assistant: what it thought before
  std::vector<ToolCall> tool_calls = {};     // of the assistant
  std::string tool_call_id = {}, name = {};  // of a tool: what it answers
};

enum class ToolChoice { kAuto, kNone, kRequired };

struct ChatOptions {
  bool add_generation_prompt = true;
  // Further variables, a JSON object; without "enable_thinking" that is true. Their texts are text, too.
  std::string variables = {};
  // Tokenizer::PrepareChat only. What the model may call, a JSON list of {"type": "function", "function":
  // {"name", "description", "parameters"}}, the parameters a JSON schema; empty: nothing.
  std::string tools = {};
  ToolChoice tool_choice = ToolChoice::kAuto;
  std::optional<bool> parallel_tool_calls = {};  // none: what the template is made for
  std::string json_schema = {};  // what the answer has to be, but for thoughts; empty: any text
  bool split_reasoning = true;   // thoughts are told apart from the answer
};

// A text in which the template's special tokens are tokens, and what looks like one in a message is text.
struct PromptText {
  std::string text;
  // Offsets, ascending: a special token that one of them lies in (its first byte included) is text.
  std::vector<int64_t> seams = {};
};

// A text that sets a grammar going.
struct GrammarTrigger {
  std::string text;
  bool is_regex = false;
};

// What a model's output is held to, in llama.cpp's GBNF, with a rule `root`.
struct GrammarSource {
  std::string text = {};  // empty: nothing
  // Any text may come before the first of `triggers`, with which the grammar begins.
  bool lazy = false;
  std::vector<GrammarTrigger> triggers = {};
  std::string begun = {};  // how much of the grammar's text the prompt has already; may hold special tokens
};

// How a model answers a chat; AnswerParser reads it.
struct AnswerFormat {
  std::string parser = {};  // empty: all of it is text
  int kind = 0;
  std::string generation_prompt = {};       // the prompt's end, where the format begins
  std::vector<std::string> preserved = {};  // special tokens that the parser wants to see
  std::vector<std::string> stops = {};      // end the answer
  GrammarSource grammar = {};
};

struct ChatPrompt {
  PromptText prompt;
  AnswerFormat format = {};
};

}  // namespace moend
