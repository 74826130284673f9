// OpenAI's request bodies. Which fields there are, and what becomes of each, is in request_fields.h.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "moend/engine/sampler.h"
#include "moend/model/model.h"
#include "moend/serve/json.h"

namespace moend::serve {

// How the next token is picked.
struct PickOptions {
  SamplerOptions sampler;
  double frequency_penalty = 0, presence_penalty = 0;  // as OpenAI defines them, over generated tokens
  std::vector<std::pair<int32_t, float>> logit_bias;   // added to the logits
  double repeat_penalty = 1;                           // as llama.cpp's, over prompt and answer; 1: none
  int64_t repeat_last_n = 64;                          // tokens that it looks back; -1: all
  bool ignore_eos = false;                             // nothing but the length or a stop ends the answer
  int64_t min_tokens = 0;                              // before the end and stop_tokens become possible
  std::vector<int32_t> stop_tokens;                    // end the answer, and are no part of it
  int top_logprobs = -1;                               // -1: no log probabilities; 0: the chosen token's only
};

inline constexpr int64_t kUnlimited = INT64_MAX;

struct GenerationRequest {
  bool chat = false;
  std::vector<ChatMessage> messages;         // chat
  Json template_variables = Json::object();  // chat: as ChatOptions has them
  Json tools = Json::array();                // chat: OpenAI's list; those that may be called
  ToolChoice tool_choice = ToolChoice::kAuto;
  std::optional<bool> parallel_tool_calls;
  bool split_reasoning = true;         // chat: thoughts are reasoning_content
  std::string json_schema, grammar;    // what the answer is held to; one of them at most
  std::string prompt;                  // completion: text,
  std::vector<int32_t> prompt_tokens;  // or tokens
  bool parse_special = true;           // completion: "<|...|>" in the text become their tokens
  bool stream = false;
  bool include_usage = false;  // stream: a last chunk with the usage
  int64_t max_tokens = -1;     // -1: not given; kUnlimited: what the context has room for
  PickOptions pick;
  std::vector<std::string> stop;
  bool cache_prompt = true;  // extension, as in llama-server: reuse and keep this prompt's cache
  bool kv_layers = false;    // extension: the K/V block lists the layers
};

struct RequestDefaults {
  SamplerOptions sampler;
  int64_t n_vocab = 0;  // bound of token ids
};

// Of everything that the prompt has of it.
int64_t TextBytes(const ChatMessage& message);

ApiResult<GenerationRequest> ParseChatRequest(const Json& body, const Limits& limits,
                                              const RequestDefaults& defaults);
ApiResult<GenerationRequest> ParseCompletionRequest(const Json& body, const Limits& limits,
                                                    const RequestDefaults& defaults);

struct TokenizeRequest {
  std::string content;
  bool add_special = false, parse_special = true, with_pieces = false;
};
ApiResult<TokenizeRequest> ParseTokenizeRequest(const Json& body);
ApiResult<std::vector<int32_t>> ParseDetokenizeRequest(const Json& body, int64_t n_vocab);

}  // namespace moend::serve
