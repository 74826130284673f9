#include "moend/serve/request_fields.h"

#include <charconv>
#include <cmath>

namespace moend::serve {
namespace {

using enum Use;
using enum Routes;
using Done = ApiResult<void>;

// Reads a number into a member of the sampler's options or the like, when it is there.
template <class T>
Done Take(ApiResult<std::optional<T>> value, auto& into) {
  if (!value) return std::unexpected(std::move(value.error()));
  if (*value) into = static_cast<std::remove_reference_t<decltype(into)>>(**value);
  return {};
}

Done ReadModel(const char* name, const Reading& to) {
  // One model is loaded; the name is not compared.
  MOEND_API_ASSIGN([[maybe_unused]] const auto model, to.fields.String(name));
  return {};
}

Done ReadStream(const char* name, const Reading& to) {
  return Take(to.fields.Boolean(name), to.request.stream);
}

Done ReadStreamOptions(const char* name, const Reading& to) {
  const Json* options = to.fields.Find(name);
  if (!options) return {};
  if (!options->is_object()) return Bad(name, "stream_options must be an object", "invalid_type");
  if (!to.request.stream)
    return Bad(name, "stream_options is only allowed with stream: true", "invalid_value");
  return Take(Fields(*options, "stream_options.").Boolean("include_usage"), to.request.include_usage);
}

Done ReadMaxTokens(const char* name, const Reading& to) {
  const int64_t most = to.limits.max_tokens > 0 ? to.limits.max_tokens : INT32_MAX;
  MOEND_API_ASSIGN(const auto n, to.fields.Integer(name, -1, most));
  if (n == 0)
    return Bad(name, fmt::format("{} must be between 1 and {}, or -1 for no limit", name, most),
               "out_of_range");
  if (n) to.request.max_tokens = *n < 0 ? kUnlimited : *n;
  return {};
}

Done ReadTemperature(const char* name, const Reading& to) {
  return Take(to.fields.Number(name, 0, 2), to.request.pick.sampler.temperature);
}
Done ReadTopP(const char* name, const Reading& to) {
  return Take(to.fields.Number(name, 0, 1), to.request.pick.sampler.top_p);
}
Done ReadMinP(const char* name, const Reading& to) {
  return Take(to.fields.Number(name, 0, 1), to.request.pick.sampler.min_p);
}
Done ReadTypicalP(const char* name, const Reading& to) {
  return Take(to.fields.Number(name, 0, 1), to.request.pick.sampler.typical_p);
}
Done ReadTopK(const char* name, const Reading& to) {
  return Take(to.fields.Integer(name, -1, INT32_MAX), to.request.pick.sampler.top_k);
}

Done ReadSeed(const char* name, const Reading& to) {
  // Any 64-bit integer is a seed, but -1: as for llama.cpp that is a random one, which the request has
  // already.
  MOEND_API_ASSIGN(const auto seed, to.fields.Integer(name, INT64_MIN, INT64_MAX));
  if (seed && *seed != -1) to.request.pick.sampler.seed = static_cast<uint64_t>(*seed);
  return {};
}

Done ReadFrequencyPenalty(const char* name, const Reading& to) {
  return Take(to.fields.Number(name, -2, 2), to.request.pick.frequency_penalty);
}
Done ReadPresencePenalty(const char* name, const Reading& to) {
  return Take(to.fields.Number(name, -2, 2), to.request.pick.presence_penalty);
}
Done ReadRepeatPenalty(const char* name, const Reading& to) {
  return Take(to.fields.Number(name, 0.01, 100), to.request.pick.repeat_penalty);
}
// vLLM's looks back on everything.
Done ReadRepetitionPenalty(const char* name, const Reading& to) {
  if (to.fields.Find(name)) to.request.pick.repeat_last_n = -1;
  return ReadRepeatPenalty(name, to);
}
Done ReadRepeatLastN(const char* name, const Reading& to) {
  return Take(to.fields.Integer(name, -1, INT32_MAX), to.request.pick.repeat_last_n);
}

Done ReadIgnoreEos(const char* name, const Reading& to) {
  return Take(to.fields.Boolean(name), to.request.pick.ignore_eos);
}
Done ReadMinTokens(const char* name, const Reading& to) {
  return Take(to.fields.Integer(name, 0, INT32_MAX), to.request.pick.min_tokens);
}

Done ReadParseSpecial(const char* name, const Reading& to) {
  return Take(to.fields.Boolean(name), to.request.parse_special);
}

Done ReadStopTokens(const char* name, const Reading& to) {
  const Json* j = to.fields.Find(name);
  if (!j) return {};
  if (!j->is_array()) return Bad(name, "stop_token_ids must be a list of token ids", "invalid_type");
  if (std::ssize(*j) > to.limits.stops)
    return Bad(name, fmt::format("at most {} stop tokens are allowed", to.limits.stops), "too_many");
  MOEND_API_ASSIGN(to.request.pick.stop_tokens, TokenArray(*j, name, to.defaults.n_vocab));
  return {};
}

Done ReadStop(const char* name, const Reading& to) {
  const Json* j = to.fields.Find(name);
  if (!j) return {};
  const auto add = [&](const Json& s) -> Done {
    if (!s.is_string()) return Bad(name, "stop must be a string or a list of strings", "invalid_type");
    auto text = s.get<std::string>();
    if (static_cast<int64_t>(text.size()) > to.limits.stop_bytes)
      return Bad(name, fmt::format("a stop string may have {} bytes", to.limits.stop_bytes), "too_long");
    if (text.empty()) return Bad(name, "a stop string may not be empty", "invalid_value");
    to.request.stop.push_back(std::move(text));
    return {};
  };
  if (!j->is_array()) return add(*j);
  if (static_cast<int64_t>(j->size()) > to.limits.stops)
    return Bad(name, fmt::format("at most {} stop strings are allowed", to.limits.stops), "too_many");
  for (const Json& s : *j)
    if (auto ok = add(s); !ok) return ok;
  return {};
}

Done ReadLogitBias(const char* name, const Reading& to) {
  const Json* j = to.fields.Find(name);
  if (!j) return {};
  if (!j->is_object()) return Bad(name, "logit_bias must be an object", "invalid_type");
  if (static_cast<int64_t>(j->size()) > to.limits.logit_bias)
    return Bad(name, fmt::format("logit_bias may have {} entries", to.limits.logit_bias), "too_many");
  for (const auto& [key, value] : j->items()) {
    int32_t token = -1;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), token);
    if (error != std::errc() || end != key.data() + key.size() || token < 0 || token >= to.defaults.n_vocab)
      return Bad(name, fmt::format("logit_bias has a key that is no token id below {}", to.defaults.n_vocab),
                 "invalid_token");
    if (!value.is_number() || !(std::abs(value.get<double>()) <= 100.0))
      return Bad(name, "logit_bias values must be between -100 and 100", "out_of_range");
    to.request.pick.logit_bias.emplace_back(token, value.get<float>());
  }
  return {};
}

template <int kMost>
Done ReadOne(const char* name, const Reading& to) {
  MOEND_API_ASSIGN(const auto n, to.fields.Integer(name, 1, kMost));
  if (n.value_or(1) == 1) return {};
  return Bad(name, fmt::format("{} must be 1: this server gives one choice a request", name), "unsupported");
}

Done ReadCachePrompt(const char* name, const Reading& to) {
  return Take(to.fields.Boolean(name), to.request.cache_prompt);
}
Done ReadKvLayers(const char* name, const Reading& to) {
  return Take(to.fields.Boolean(name), to.request.kv_layers);
}

Done ReadChatLogprobs(const char* name, const Reading& to) {
  MOEND_API_ASSIGN(const auto on, to.fields.Boolean(name));
  if (on.value_or(false)) to.request.pick.top_logprobs = 0;
  return {};
}
Done ReadTopLogprobs(const char* name, const Reading& to) {
  MOEND_API_ASSIGN(const auto top, to.fields.Integer(name, 0, to.limits.top_logprobs));
  if (top && to.request.pick.top_logprobs < 0)
    return Bad(name, "top_logprobs needs logprobs: true", "invalid_value");
  if (top) to.request.pick.top_logprobs = static_cast<int>(*top);
  return {};
}
Done ReadCompletionLogprobs(const char* name, const Reading& to) {
  return Take(to.fields.Integer(name, 0, to.limits.top_logprobs), to.request.pick.top_logprobs);
}

constexpr RequestField kFields[] = {
    // OpenAI's, and what llama-server and vLLM add to them.
    {"model", kBoth, kWorks, ReadModel},
    {"messages", kChat, kWorks, ReadMessages},
    {"prompt", kCompletion, kWorks, ReadPrompt},
    {"stream", kBoth, kWorks, ReadStream},
    {"stream_options", kBoth, kWorks, ReadStreamOptions},
    // Of several of these the last one counts.
    {"n_predict", kBoth, kWorks, ReadMaxTokens},
    {"max_tokens", kBoth, kWorks, ReadMaxTokens},
    {"max_completion_tokens", kBoth, kWorks, ReadMaxTokens},
    {"temperature", kBoth, kWorks, ReadTemperature},
    {"top_k", kBoth, kWorks, ReadTopK},
    {"typical_p", kBoth, kWorks, ReadTypicalP},
    {"top_p", kBoth, kWorks, ReadTopP},
    {"min_p", kBoth, kWorks, ReadMinP},
    {"seed", kBoth, kWorks, ReadSeed},
    {"frequency_penalty", kBoth, kWorks, ReadFrequencyPenalty},
    {"presence_penalty", kBoth, kWorks, ReadPresencePenalty},
    {"repetition_penalty", kBoth, kWorks, ReadRepetitionPenalty},
    {"repeat_penalty", kBoth, kWorks, ReadRepeatPenalty},
    {"repeat_last_n", kBoth, kWorks, ReadRepeatLastN},
    {"logit_bias", kBoth, kWorks, ReadLogitBias},
    {"stop", kBoth, kWorks, ReadStop},
    {"stop_token_ids", kBoth, kWorks, ReadStopTokens},
    {"ignore_eos", kBoth, kWorks, ReadIgnoreEos},
    {"min_tokens", kBoth, kWorks, ReadMinTokens},
    {"chat_template_kwargs", kChat, kWorks, ReadTemplateVariables},
    {"parse_special", kCompletion, kWorks, ReadParseSpecial},
    {"n", kBoth, kWorks, ReadOne<128>},
    {"best_of", kCompletion, kWorks, ReadOne<20>},
    {"logprobs", kChat, kWorks, ReadChatLogprobs},
    {"top_logprobs", kChat, kWorks, ReadTopLogprobs},
    {"logprobs", kCompletion, kWorks, ReadCompletionLogprobs},
    {"tools", kChat, kWorks, ReadTools},
    {"tool_choice", kChat, kWorks, ReadToolChoice},
    {"parallel_tool_calls", kChat, kWorks, ReadParallelToolCalls},
    {"response_format", kBoth, kWorks, ReadResponseFormat},
    {"json_schema", kBoth, kWorks, ReadJsonSchema},
    {"guided_json", kBoth, kWorks, ReadJsonSchema},
    {"guided_choice", kBoth, kWorks, ReadGuidedChoice},
    {"grammar", kBoth, kWorks, ReadGrammar},
    {"guided_grammar", kBoth, kWorks, ReadGrammar},
    {"reasoning_effort", kChat, kWorks, ReadReasoningEffort},
    {"enable_thinking", kChat, kWorks, ReadEnableThinking},
    {"reasoning_format", kChat, kWorks, ReadReasoningFormat},
    {"cache_prompt", kBoth, kWorks, ReadCachePrompt},
    {"kv_layers", kBoth, kWorks, ReadKvLayers},

    // What the answer must look like.
    {"grammar_lazy", kBoth, kRefused, {}, "[false]"},
    {"grammar_triggers", kBoth, kRefused},
    {"guided_regex", kBoth, kRefused, {}, R"([""])"},
    {"structured_outputs", kBoth, kRefused},
    {"structural_tag", kBoth, kRefused, {}, R"([""])"},
    {"suffix", kBoth, kRefused, {}, R"([""])"},
    {"echo", kBoth, kRefused, {}, "[false]"},
    {"n_indent", kBoth, kRefused, {}, "[0]"},
    {"bad_words", kBoth, kRefused},
    {"allowed_token_ids", kBoth, kRefused},
    {"include_stop_str_in_output", kBoth, kRefused, {}, "[false]"},
    {"skip_special_tokens", kBoth, kRefused, {}, "[true]"},
    {"modalities", kBoth, kRefused, {}, R"([["text"]])"},
    {"audio", kBoth, kRefused},
    {"verbosity", kBoth, kRefused, {}, R"(["medium"])"},
    {"t_max_predict_ms", kBoth, kRefused, {}, "[-1, 0]"},
    {"t_max_prompt_ms", kBoth, kRefused, {}, "[-1, 0]"},
    // How the prompt is made.
    {"messages", kCompletion, kRefused},
    {"prompt", kChat, kRefused},
    {"tools", kCompletion, kRefused},
    {"tool_choice", kCompletion, kRefused, {}, R"(["none", "auto"])"},
    {"functions", kBoth, kRefused},
    {"function_call", kBoth, kRefused, {}, R"(["none", "auto"])"},
    {"web_search_options", kBoth, kRefused},
    {"documents", kBoth, kRefused},
    {"system_prompt", kBoth, kRefused, {}, R"([""])"},
    {"chat_template", kBoth, kRefused, {}, R"([""])"},
    {"chat_template_kwargs", kCompletion, kRefused, {}, "[{}]"},
    {"chat_format", kBoth, kRefused},
    {"chat_parser", kBoth, kRefused, {}, R"([""])"},
    {"add_generation_prompt", kBoth, kRefused, {}, "[true]"},
    {"generation_prompt", kBoth, kRefused, {}, R"([""])"},
    {"continue_final_message", kBoth, kRefused, {}, "[false]"},
    {"add_special_tokens", kChat, kRefused, {}, "[false]"},
    {"add_special_tokens", kCompletion, kRefused, {}, "[true]"},
    {"parse_special", kChat, kRefused, {}, "[false]"},
    {"truncate_prompt_tokens", kBoth, kRefused},
    {"prompt_embeds", kBoth, kRefused},
    {"image_data", kBoth, kRefused},
    {"multimodal_data", kBoth, kRefused},
    {"input_prefix", kBoth, kRefused, {}, R"([""])"},
    {"input_suffix", kBoth, kRefused, {}, R"([""])"},
    {"input_extra", kBoth, kRefused},
    {"preserved_tokens", kBoth, kRefused},
    // Whether and how the model thinks.
    {"reasoning", kBoth, kRefused},
    {"reasoning_effort", kCompletion, kRefused, {}, R"(["none"])"},
    {"reasoning_format", kCompletion, kRefused, {}, R"(["none", "auto"])"},
    {"reasoning_budget_tokens", kBoth, kRefused, {}, "[-1]"},
    {"thinking", kBoth, kRefused, {}, R"([{"type": "disabled"}])"},
    {"thinking_budget_tokens", kBoth, kRefused, {}, "[-1]"},
    {"thinking_token_budget", kBoth, kRefused, {}, "[-1]"},
    {"thinking_forced_open", kBoth, kRefused, {}, "[false]"},
    {"enable_thinking", kCompletion, kRefused},
    // How tokens are picked.
    {"samplers", kBoth, kRefused},
    {"mirostat", kBoth, kRefused, {}, "[0]"},
    {"dry_multiplier", kBoth, kRefused, {}, "[0]"},
    {"xtc_probability", kBoth, kRefused, {}, "[0]"},
    {"top_n_sigma", kBoth, kRefused, {}, "[-1, 0]"},
    {"dynatemp_range", kBoth, kRefused, {}, "[0]"},
    {"adaptive_target", kBoth, kRefused, {}, "[-1]"},
    {"tfs_z", kBoth, kRefused, {}, "[1]"},
    {"min_keep", kBoth, kRefused, {}, "[0, 1]"},
    {"penalize_nl", kBoth, kRefused, {}, "[false]"},
    {"use_beam_search", kBoth, kRefused, {}, "[false]"},
    {"logits_processors", kBoth, kRefused},
    {"lora", kBoth, kRefused},
    // What the reply has beside the text.
    {"best_of", kChat, kRefused, {}, "[1]"},
    {"top_logprobs", kCompletion, kRefused, {}, "[0]"},
    {"n_cmpl", kBoth, kRefused, {}, "[1]"},
    {"n_probs", kBoth, kRefused, {}, "[0]"},
    {"post_sampling_probs", kBoth, kRefused, {}, "[false]"},
    {"prompt_logprobs", kBoth, kRefused, {}, "[0]"},
    {"return_tokens", kBoth, kRefused, {}, "[false]"},
    {"return_token_ids", kBoth, kRefused, {}, "[false]"},
    {"return_tokens_as_token_ids", kBoth, kRefused, {}, "[false]"},
    // Promises that are not kept here.
    {"cache_salt", kBoth, kRefused, {}, R"([""])"},
    {"kv_transfer_params", kBoth, kRefused},
    {"vllm_xargs", kBoth, kRefused, {}, "[{}]"},

    // Nothing about the answer depends on these, or only together with a field that is refused.
    {"user", kBoth, kIgnored},
    {"metadata", kBoth, kIgnored},
    {"store", kBoth, kIgnored},
    {"service_tier", kBoth, kIgnored},
    {"safety_identifier", kBoth, kIgnored},
    {"prompt_cache_key", kBoth, kIgnored},
    {"prompt_cache_retention", kBoth, kIgnored},
    {"prediction", kBoth, kIgnored},
    {"parallel_tool_calls", kCompletion, kIgnored},
    {"parse_tool_calls", kBoth, kIgnored},
    {"guided_decoding_backend", kBoth, kIgnored},
    {"guided_whitespace_pattern", kBoth, kIgnored},
    {"mirostat_tau", kBoth, kIgnored},
    {"mirostat_eta", kBoth, kIgnored},
    {"dry_base", kBoth, kIgnored},
    {"dry_allowed_length", kBoth, kIgnored},
    {"dry_penalty_last_n", kBoth, kIgnored},
    {"dry_sequence_breakers", kBoth, kIgnored},
    {"xtc_threshold", kBoth, kIgnored},
    {"dynatemp_exponent", kBoth, kIgnored},
    {"adaptive_decay", kBoth, kIgnored},
    {"length_penalty", kBoth, kIgnored},
    {"early_stopping", kBoth, kIgnored},
    {"spaces_between_special_tokens", kBoth, kIgnored},
    {"include_reasoning", kBoth, kIgnored},
    {"reasoning_control", kBoth, kIgnored},
    {"reasoning_budget_message", kBoth, kIgnored},
    {"reasoning_budget_start_tag", kBoth, kIgnored},
    {"reasoning_budget_end_tag", kBoth, kIgnored},
    {"reasoning_budget_end_tags", kBoth, kIgnored},
    {"mm_processor_kwargs", kBoth, kIgnored},
    {"n_keep", kBoth, kIgnored},
    {"n_discard", kBoth, kIgnored},
    {"n_cache_reuse", kBoth, kIgnored},
    {"id_slot", kBoth, kIgnored},
    {"backend_sampling", kBoth, kIgnored},
    {"speculative.n_max", kBoth, kIgnored},
    {"speculative.n_min", kBoth, kIgnored},
    {"speculative.p_min", kBoth, kIgnored},
    {"speculative.type", kBoth, kIgnored},
    {"speculative.ngram_size_n", kBoth, kIgnored},
    {"speculative.ngram_size_m", kBoth, kIgnored},
    {"speculative.ngram_min_hits", kBoth, kIgnored},
    {"response_fields", kBoth, kIgnored},
    {"return_progress", kBoth, kIgnored},
    {"timings_per_token", kBoth, kIgnored},
    {"sse_ping_interval", kBoth, kIgnored},
    {"verbose", kBoth, kIgnored},
    {"priority", kBoth, kIgnored},
    {"request_id", kBoth, kIgnored},
};

// A field that moend does not have, unless its value asks for nothing.
Done Refuse(const RequestField& field, const Reading& to) {
  const Json* j = to.fields.Find(field.name);
  if (!j || (j->is_array() && j->empty())) return {};
  const Json off = Json::parse(field.off);
  for (const Json& value : off)
    if (*j == value) return {};
  return Bad(field.name, fmt::format("{} is not supported by this server", field.name), "unsupported");
}

}  // namespace

std::span<const RequestField> RequestFields() {
  return kFields;
}

ApiResult<void> ReadFields(bool chat, const Reading& to) {
  for (const RequestField& field : kFields) {
    if (field.use == kIgnored || field.routes == (chat ? kCompletion : kChat)) continue;
    auto ok = field.use == kWorks ? field.read(field.name, to) : Refuse(field, to);
    if (!ok) return ok;
  }
  return {};
}

}  // namespace moend::serve
