#include "moend/model/chat_fallback.h"

#include <fmt/format.h>

#include <string_view>

namespace moend {
namespace {

constexpr std::string_view kTemplate = R"({%- if tools %}
{{- '<|im_start|>system\n<tools>\n' }}
{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}
{{- '</tools><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}@THOUGHT@
{%- if message.content %}{{- message.content }}{%- endif %}
{%- for call in message.tool_calls %}
{%- if (loop.first and message.content) or not loop.first %}{{- '\n' }}{%- endif %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{%- if call.function.arguments is string %}{{- call.function.arguments }}
{%- else %}{{- call.function.arguments | tojson }}{%- endif %}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n@BEGUN@' }}{%- endif %})";

constexpr std::string_view kThought =
    R"({%- if message.reasoning_content %}{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{%- endif %})";

void Replace(std::string& text, std::string_view what, std::string_view with) {
  text.replace(text.find(what), what.size(), with);
}

std::string Described(const nlohmann::ordered_json& tools) {
  std::string text =
      "You can call functions. They are described between <tools> and </tools>, one a line:\n<tools>\n";
  for (const auto& tool : tools) text += tool.dump() + "\n";
  return text +
         "</tools>\n"
         "To call one, write its name and arguments as JSON, and nothing else, in this way:\n"
         "<tool_call>\n{\"name\": \"NAME\", \"arguments\": {...}}\n</tool_call>\n"
         "What it returns is then told to you between <tool_response> and </tool_response>.";
}

}  // namespace

std::string FallbackTemplate(Thinking thinking) {
  std::string text(kTemplate);
  Replace(text, "@THOUGHT@", thinking == Thinking::kNone ? std::string_view() : kThought);
  Replace(text, "@BEGUN@", thinking == Thinking::kBegun ? R"(<think>\n)" : "");
  return text;
}

std::vector<ChatMessage> AsPlainChat(std::span<const ChatMessage> messages,
                                     const nlohmann::ordered_json& tools) {
  std::vector<ChatMessage> out;
  for (const ChatMessage& m : messages) {
    ChatMessage plain{m.role, m.content};
    for (const ToolCall& call : m.tool_calls) {
      if (!plain.content.empty()) plain.content += '\n';
      plain.content += fmt::format("<tool_call>\n{{\"name\": {}, \"arguments\": {}}}\n</tool_call>",
                                   nlohmann::json(call.name).dump(), call.arguments);
    }
    if (m.role == "tool") {
      plain = {"user", "<tool_response>\n" + m.content + "\n</tool_response>"};
      // Most templates want users and assistants in turns.
      if (!out.empty() && out.back().role == "user" && &m != messages.data() && (&m - 1)->role == "tool") {
        out.back().content += "\n" + plain.content;
        continue;
      }
    }
    out.push_back(std::move(plain));
  }
  if (tools.empty()) return out;
  if (!out.empty() && out.front().role == "system") {
    out.front().content += "\n\n" + Described(tools);
  } else {
    out.insert(out.begin(), {"system", Described(tools)});
  }
  return out;
}

}  // namespace moend
