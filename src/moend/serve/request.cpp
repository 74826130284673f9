#include "moend/serve/request.h"

#include <charconv>
#include <random>

namespace moend::serve {
namespace {

std::unexpected<ApiError> Bad(std::string param, std::string message, std::string code = {}) {
  return std::unexpected(BadField(std::move(param), std::move(message), std::move(code)));
}

// A field that moend does not have, unless it holds the value that means "off".
ApiResult<void> Refuse(const Fields& f, const char* name, const Json& off) {
  const Json* j = f.Find(name);
  if (!j || *j == off || (j->is_array() && j->empty())) return {};
  return Bad(f.Path(name), fmt::format("{} is not supported by this server", f.Path(name)), "unsupported");
}

// Token ids of an array. Empty when the value is something else than an array of numbers.
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

ApiResult<std::vector<std::string>> ParseStop(const Fields& f, const Limits& limits) {
  std::vector<std::string> stop;
  const Json* j = f.Find("stop");
  if (!j) return stop;
  const auto add = [&](const Json& s) -> ApiResult<void> {
    if (!s.is_string()) return Bad("stop", "stop must be a string or a list of strings", "invalid_type");
    auto text = s.get<std::string>();
    if (static_cast<int64_t>(text.size()) > limits.stop_bytes)
      return Bad("stop", fmt::format("a stop string may have {} bytes", limits.stop_bytes), "too_long");
    if (text.empty()) return Bad("stop", "a stop string may not be empty", "invalid_value");
    stop.push_back(std::move(text));
    return {};
  };
  if (!j->is_array()) {
    if (auto ok = add(*j); !ok) return std::unexpected(std::move(ok.error()));
    return stop;
  }
  if (static_cast<int64_t>(j->size()) > limits.stops)
    return Bad("stop", fmt::format("at most {} stop strings are allowed", limits.stops), "too_many");
  for (const Json& s : *j)
    if (auto ok = add(s); !ok) return std::unexpected(std::move(ok.error()));
  return stop;
}

ApiResult<std::vector<std::pair<int32_t, float>>> ParseLogitBias(const Fields& f, const Limits& limits,
                                                                 int64_t n_vocab) {
  std::vector<std::pair<int32_t, float>> bias;
  const Json* j = f.Find("logit_bias");
  if (!j) return bias;
  if (!j->is_object()) return Bad("logit_bias", "logit_bias must be an object", "invalid_type");
  if (static_cast<int64_t>(j->size()) > limits.logit_bias)
    return Bad("logit_bias", fmt::format("logit_bias may have {} entries", limits.logit_bias), "too_many");
  for (const auto& [key, value] : j->items()) {
    int32_t token = -1;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), token);
    if (error != std::errc() || end != key.data() + key.size() || token < 0 || token >= n_vocab)
      return Bad("logit_bias", fmt::format("logit_bias has a key that is no token id below {}", n_vocab),
                 "invalid_token");
    if (!value.is_number() || !(std::abs(value.get<double>()) <= 100.0))
      return Bad("logit_bias", "logit_bias values must be between -100 and 100", "out_of_range");
    bias.emplace_back(token, value.get<float>());
  }
  return bias;
}

// What both routes share.
ApiResult<GenerationRequest> ParseCommon(const Json& body, const Limits& limits,
                                         const RequestDefaults& defaults) {
  const Fields f(body);
  GenerationRequest r;
  r.pick.sampler = defaults.sampler;
  MOEND_API_ASSIGN(const auto model, f.String("model"));  // one model is loaded; the name is not compared

  MOEND_API_ASSIGN(const auto stream, f.Boolean("stream"));
  r.stream = stream.value_or(false);
  if (const Json* options = f.Find("stream_options")) {
    if (!options->is_object())
      return Bad("stream_options", "stream_options must be an object", "invalid_type");
    if (!r.stream)
      return Bad("stream_options", "stream_options is only allowed with stream: true", "invalid_value");
    MOEND_API_ASSIGN(const auto usage, Fields(*options, "stream_options.").Boolean("include_usage"));
    r.include_usage = usage.value_or(false);
  }

  const int64_t most = limits.max_tokens > 0 ? limits.max_tokens : INT32_MAX;
  MOEND_API_ASSIGN(const auto max_tokens, f.Integer("max_tokens", 1, most));
  MOEND_API_ASSIGN(const auto max_completion, f.Integer("max_completion_tokens", 1, most));
  r.max_tokens = max_completion.value_or(max_tokens.value_or(-1));

  SamplerOptions& s = r.pick.sampler;
  MOEND_API_ASSIGN(const auto temperature, f.Number("temperature", 0, 2));
  if (temperature) s.temperature = static_cast<float>(*temperature);
  MOEND_API_ASSIGN(const auto top_p, f.Number("top_p", 0, 1));
  if (top_p) s.top_p = static_cast<float>(*top_p);
  MOEND_API_ASSIGN(const auto top_k, f.Integer("top_k", -1, INT32_MAX));
  if (top_k) s.top_k = *top_k;
  MOEND_API_ASSIGN(const auto min_p, f.Number("min_p", 0, 1));
  if (min_p) s.min_p = static_cast<float>(*min_p);
  // Any 64-bit integer is a seed, negative ones included.
  MOEND_API_ASSIGN(const auto seed, f.Integer("seed", INT64_MIN, INT64_MAX));
  if (seed) {
    s.seed = static_cast<uint64_t>(*seed);
  } else {
    std::random_device device;
    s.seed = (static_cast<uint64_t>(device()) << 32) | device();
  }

  MOEND_API_ASSIGN(const auto frequency, f.Number("frequency_penalty", -2, 2));
  MOEND_API_ASSIGN(const auto presence, f.Number("presence_penalty", -2, 2));
  r.pick.frequency_penalty = frequency.value_or(0);
  r.pick.presence_penalty = presence.value_or(0);
  MOEND_API_ASSIGN(r.pick.logit_bias, ParseLogitBias(f, limits, defaults.n_vocab));
  MOEND_API_ASSIGN(r.stop, ParseStop(f, limits));

  MOEND_API_ASSIGN(const auto n, f.Integer("n", 1, 128));
  if (n.value_or(1) != 1)
    return Bad("n", "n must be 1: this server gives one choice a request", "unsupported");
  MOEND_API_ASSIGN(const auto cache_prompt, f.Boolean("cache_prompt"));
  r.cache_prompt = cache_prompt.value_or(true);
  MOEND_API_ASSIGN(const auto kv_layers, f.Boolean("kv_layers"));
  r.kv_layers = kv_layers.value_or(false);
  return r;
}

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

ApiResult<ChatMessage> ParseMessage(const Json& m, const std::string& path) {
  if (!m.is_object()) return Bad(path, path + " must be an object", "invalid_type");
  const Fields f(m, path + ".");
  MOEND_API_ASSIGN(const auto role, f.String("role"));
  if (!role) return Bad(path + ".role", path + ".role is missing", "missing");
  ChatMessage message;
  if (*role == "developer") {
    message.role = "system";
  } else if (*role == "system" || *role == "user" || *role == "assistant") {
    message.role = *role;
  } else {
    return Bad(path + ".role", path + ".role must be system, developer, user or assistant", "invalid_value");
  }
  for (const char* name : {"tool_calls", "function_call"})
    if (auto ok = Refuse(f, name, Json()); !ok) return std::unexpected(std::move(ok.error()));
  const Json* content = f.Find("content");
  if (!content) return Bad(path + ".content", path + ".content is missing", "missing");
  MOEND_API_ASSIGN(message.content, ParseContent(*content, path + ".content"));
  return message;
}

}  // namespace

ApiResult<GenerationRequest> ParseChatRequest(const Json& body, const Limits& limits,
                                              const RequestDefaults& defaults) {
  MOEND_API_ASSIGN(GenerationRequest r, ParseCommon(body, limits, defaults));
  r.chat = true;
  const Fields f(body);
  for (const char* name : {"tools", "functions", "audio", "modalities", "prediction"})
    if (auto ok = Refuse(f, name, Json()); !ok) return std::unexpected(std::move(ok.error()));
  if (const Json* format = f.Find("response_format"))
    if (!format->is_object() || format->value("type", Json()) != "text")
      return Bad("response_format", R"(response_format may only be {"type": "text"})", "unsupported");

  const Json* messages = f.Find("messages");
  if (!messages) return Bad("messages", "messages is missing", "missing");
  if (!messages->is_array() || messages->empty())
    return Bad("messages", "messages must be a list with at least one message", "invalid_type");
  if (static_cast<int64_t>(messages->size()) > limits.messages)
    return Bad("messages", fmt::format("at most {} messages are allowed", limits.messages), "too_many");
  for (std::size_t i = 0; i < messages->size(); ++i) {
    MOEND_API_ASSIGN(ChatMessage m, ParseMessage((*messages)[i], fmt::format("messages[{}]", i)));
    r.messages.push_back(std::move(m));
  }

  if (const Json* variables = f.Find("chat_template_kwargs")) {
    if (!variables->is_object())
      return Bad("chat_template_kwargs", "chat_template_kwargs must be an object", "invalid_type");
    r.template_variables = variables->dump();
  }

  MOEND_API_ASSIGN(const auto logprobs, f.Boolean("logprobs"));
  MOEND_API_ASSIGN(const auto top, f.Integer("top_logprobs", 0, limits.top_logprobs));
  if (top && !logprobs.value_or(false))
    return Bad("top_logprobs", "top_logprobs needs logprobs: true", "invalid_value");
  if (logprobs.value_or(false)) r.pick.top_logprobs = static_cast<int>(top.value_or(0));
  return r;
}

ApiResult<GenerationRequest> ParseCompletionRequest(const Json& body, const Limits& limits,
                                                    const RequestDefaults& defaults) {
  MOEND_API_ASSIGN(GenerationRequest r, ParseCommon(body, limits, defaults));
  const Fields f(body);
  if (auto ok = Refuse(f, "suffix", Json("")); !ok) return std::unexpected(std::move(ok.error()));
  if (auto ok = Refuse(f, "echo", Json(false)); !ok) return std::unexpected(std::move(ok.error()));
  MOEND_API_ASSIGN(const auto best_of, f.Integer("best_of", 1, 20));
  if (best_of.value_or(1) != 1) return Bad("best_of", "best_of must be 1", "unsupported");

  MOEND_API_ASSIGN(const auto parse_special, f.Boolean("parse_special"));
  r.parse_special = parse_special.value_or(true);
  const Json* prompt = f.Find("prompt");
  if (!prompt) return Bad("prompt", "prompt is missing", "missing");
  if (prompt->is_array() && prompt->size() == 1 && ((*prompt)[0].is_string() || (*prompt)[0].is_array()))
    prompt = &(*prompt)[0];
  if (prompt->is_string()) {
    r.prompt = prompt->get<std::string>();
  } else if (prompt->is_array()) {
    if (!prompt->empty() && (*prompt)[0].is_string())
      return Bad("prompt", "prompt may be one string; send one request a prompt", "unsupported");
    MOEND_API_ASSIGN(r.prompt_tokens, TokenArray(*prompt, "prompt", defaults.n_vocab));
    if (r.prompt_tokens.empty()) return Bad("prompt", "prompt has no tokens", "invalid_value");
  } else {
    return Bad("prompt", "prompt must be a string or a list of token ids", "invalid_type");
  }
  MOEND_API_ASSIGN(const auto logprobs, f.Integer("logprobs", 0, limits.top_logprobs));
  if (logprobs) r.pick.top_logprobs = static_cast<int>(*logprobs);
  return r;
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
