#include "moend/serve/request.h"

#include <random>

#include "moend/serve/request_fields.h"

namespace moend::serve {

std::unexpected<ApiError> Bad(std::string param, std::string message, std::string code) {
  return std::unexpected(BadField(std::move(param), std::move(message), std::move(code)));
}

ApiResult<std::vector<int32_t>> TokenArray(const Json& array, const std::string& path, int64_t n_vocab) {
  std::vector<int32_t> tokens;
  tokens.reserve(array.size());
  for (const Json& t : array) {
    if (!t.is_number_integer() || (t.is_number_unsigned() && t.get<uint64_t>() > INT32_MAX) ||
        t.get<int64_t>() < 0 || t.get<int64_t>() >= n_vocab)
      return Bad(path, fmt::format("{} must hold token ids between 0 and {}", path, n_vocab - 1),
                 "invalid_token");
    tokens.push_back(t.get<int32_t>());
  }
  return tokens;
}

namespace {

ApiResult<std::string> ParseContent(const Json& content, const std::string& path) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) return Bad(path, path + " must be a string or a list of parts", "invalid_type");
  std::string text;
  for (const Json& part : content) {
    if (!part.is_object()) return Bad(path, path + " has a part that is no object", "invalid_type");
    const auto type = part.find("type");
    const auto value = part.find("text");
    if (type == part.end() || *type != "text" || value == part.end() || !value->is_string())
      return Bad(path, path + R"( may only have parts {"type": "text", "text": "..."})", "unsupported");
    text += value->get<std::string>();
  }
  return text;
}

ApiResult<ToolCall> ParseToolCall(const Json& call, const std::string& path, const Limits& limits) {
  if (!call.is_object()) return Bad(path, path + " must be an object", "invalid_type");
  const Fields f(call, path + ".");
  MOEND_API_ASSIGN(const auto type, f.String("type"));
  const Json* function = f.Find("function");
  if (type.value_or("function") != "function" || !function || !function->is_object())
    return Bad(
        path,
        path + R"( must be {"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}})",
        "invalid_value");
  const Fields of(*function, f.Path("function") + ".");
  MOEND_API_ASSIGN(const auto id, f.String("id"));
  MOEND_API_ASSIGN(const auto name, of.String("name"));
  if (!name || name->empty()) return Bad(of.Path("name"), of.Path("name") + " is missing", "missing");
  ToolCall out{.id = id.value_or(""), .name = *name, .arguments = "{}"};
  const Json* arguments = of.Find("arguments");
  if (!arguments || *arguments == "") return out;
  // A text of JSON, bounded as the body is; some clients send the object itself.
  Json parsed = *arguments;
  if (arguments->is_string()) {
    auto inner = ParseBody(arguments->get_ref<const std::string&>(), limits);
    parsed = inner ? std::move(*inner) : Json();
  }
  if (!parsed.is_object())
    return Bad(of.Path("arguments"), of.Path("arguments") + " must be a JSON object, as a text",
               "invalid_value");
  out.arguments = Dump(parsed);
  return out;
}

// `before`: the messages that this one may answer.
ApiResult<ChatMessage> ParseMessage(const Json& m, const std::string& path,
                                    std::span<const ChatMessage> before, const Limits& limits) {
  if (!m.is_object()) return Bad(path, path + " must be an object", "invalid_type");
  const Fields f(m, path + ".");
  MOEND_API_ASSIGN(const auto role, f.String("role"));
  if (!role) return Bad(path + ".role", path + ".role is missing", "missing");
  ChatMessage message;
  if (*role == "developer") {
    message.role = "system";
  } else if (*role == "system" || *role == "user" || *role == "assistant" || *role == "tool") {
    message.role = *role;
  } else {
    return Bad(path + ".role", path + ".role must be system, developer, user, assistant or tool",
               "invalid_value");
  }
  const auto not_empty = [](const Json* j) { return j && !(j->is_array() && j->empty()); };
  if (not_empty(f.Find("function_call")))
    return Bad(f.Path("function_call"),
               f.Path("function_call") + " is not supported by this server; use tool_calls", "unsupported");
  if (const Json* calls = f.Find("tool_calls"); not_empty(calls)) {
    if (message.role != "assistant")
      return Bad(f.Path("tool_calls"), f.Path("tool_calls") + " may only be the assistant's",
                 "invalid_value");
    if (!calls->is_array())
      return Bad(f.Path("tool_calls"), f.Path("tool_calls") + " must be a list", "invalid_type");
    for (std::size_t i = 0; i < calls->size(); ++i) {
      MOEND_API_ASSIGN(auto call,
                       ParseToolCall((*calls)[i], fmt::format("{}[{}]", f.Path("tool_calls"), i), limits));
      message.tool_calls.push_back(std::move(call));
    }
  }
  if (message.role == "assistant") {
    MOEND_API_ASSIGN(auto thoughts, f.String("reasoning_content"));
    message.reasoning_content = std::move(thoughts).value_or("");
  }
  if (message.role == "tool") {
    MOEND_API_ASSIGN(auto id, f.String("tool_call_id"));
    MOEND_API_ASSIGN(auto name, f.String("name"));
    message.tool_call_id = std::move(id).value_or("");
    message.name = std::move(name).value_or("");
    // Some templates want the name, which few clients send.
    for (const ChatMessage& b : before)
      for (const ToolCall& call : b.tool_calls)
        if (message.name.empty() && !call.id.empty() && call.id == message.tool_call_id)
          message.name = call.name;
  }
  const Json* content = f.Find("content");
  if (!content && !message.tool_calls.empty()) return message;
  if (!content) return Bad(path + ".content", path + ".content is missing", "missing");
  MOEND_API_ASSIGN(message.content, ParseContent(*content, path + ".content"));
  return message;
}

ApiResult<GenerationRequest> Parse(bool chat, const Json& body, const Limits& limits,
                                   const RequestDefaults& defaults) {
  GenerationRequest r;
  r.chat = chat;
  r.pick.sampler = defaults.sampler;
  std::random_device device;  // the seed of requests that name none
  r.pick.sampler.seed = (static_cast<uint64_t>(device()) << 32) | device();
  const Fields fields(body);
  if (auto ok = ReadFields(chat, {fields, limits, defaults, r}); !ok)
    return std::unexpected(std::move(ok.error()));
  return r;
}

}  // namespace

ApiResult<void> ReadMessages(const char* name, const Reading& to) {
  const Json* messages = to.fields.Find(name);
  if (!messages) return Bad(name, "messages is missing", "missing");
  if (!messages->is_array() || messages->empty())
    return Bad(name, "messages must be a list with at least one message", "invalid_type");
  if (static_cast<int64_t>(messages->size()) > to.limits.messages)
    return Bad(name, fmt::format("at most {} messages are allowed", to.limits.messages), "too_many");
  for (std::size_t i = 0; i < messages->size(); ++i) {
    MOEND_API_ASSIGN(ChatMessage m, ParseMessage((*messages)[i], fmt::format("messages[{}]", i),
                                                 to.request.messages, to.limits));
    to.request.messages.push_back(std::move(m));
  }
  return {};
}

ApiResult<void> ReadPrompt(const char* name, const Reading& to) {
  const Json* prompt = to.fields.Find(name);
  if (!prompt) return Bad(name, "prompt is missing", "missing");
  if (prompt->is_array() && prompt->size() == 1 && ((*prompt)[0].is_string() || (*prompt)[0].is_array()))
    prompt = &(*prompt)[0];
  if (prompt->is_string()) {
    to.request.prompt = prompt->get<std::string>();
    return {};
  }
  if (!prompt->is_array()) return Bad(name, "prompt must be a string or a list of token ids", "invalid_type");
  if (!prompt->empty() && (*prompt)[0].is_string())
    return Bad(name, "prompt may be one string; send one request a prompt", "unsupported");
  MOEND_API_ASSIGN(to.request.prompt_tokens, TokenArray(*prompt, name, to.defaults.n_vocab));
  if (to.request.prompt_tokens.empty()) return Bad(name, "prompt has no tokens", "invalid_value");
  return {};
}

ApiResult<GenerationRequest> ParseChatRequest(const Json& body, const Limits& limits,
                                              const RequestDefaults& defaults) {
  return Parse(true, body, limits, defaults);
}

ApiResult<GenerationRequest> ParseCompletionRequest(const Json& body, const Limits& limits,
                                                    const RequestDefaults& defaults) {
  return Parse(false, body, limits, defaults);
}

int64_t TextBytes(const ChatMessage& m) {
  int64_t bytes = std::ssize(m.content) + std::ssize(m.reasoning_content);
  for (const ToolCall& call : m.tool_calls) bytes += std::ssize(call.name) + std::ssize(call.arguments);
  return bytes;
}

ApiResult<TokenizeRequest> ParseTokenizeRequest(const Json& body) {
  const Fields f(body);
  TokenizeRequest r;
  MOEND_API_ASSIGN(auto content, f.String("content"));
  if (!content) {
    MOEND_API_ASSIGN(content, f.String("prompt"));  // vLLM's name
  }
  if (!content) return Bad("content", "content is missing", "missing");
  r.content = std::move(*content);
  MOEND_API_ASSIGN(const auto add_special, f.Boolean("add_special"));
  r.add_special = add_special.value_or(false);
  MOEND_API_ASSIGN(const auto parse_special, f.Boolean("parse_special"));
  r.parse_special = parse_special.value_or(true);
  MOEND_API_ASSIGN(const auto with_pieces, f.Boolean("with_pieces"));
  r.with_pieces = with_pieces.value_or(false);
  return r;
}

ApiResult<std::vector<int32_t>> ParseDetokenizeRequest(const Json& body, int64_t n_vocab) {
  const Json* tokens = Fields(body).Find("tokens");
  if (!tokens || !tokens->is_array())
    return Bad("tokens", "tokens must be a list of token ids", "invalid_type");
  return TokenArray(*tokens, "tokens", n_vocab);
}

}  // namespace moend::serve
