// Tool calls for models whose chat template knows none: the functions are described in the system message,
// and calls are written as <tool_call>{"name": ..., "arguments": {...}}</tool_call>, as many models have seen
// them.
#pragma once

#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "moend/model/chat.h"

namespace moend {

enum class Thinking { kNone, kOptional, kBegun };  // kBegun: the prompt ends with "<think>"

// A Jinja template in which calls and thoughts are written so; what is known of its format holds for the
// answer.
std::string FallbackTemplate(Thinking thinking);

// The chat in system, user and assistant messages. `tools` is OpenAI's list, perhaps an empty one.
std::vector<ChatMessage> AsPlainChat(std::span<const ChatMessage> messages,
                                     const nlohmann::ordered_json& tools);

}  // namespace moend
