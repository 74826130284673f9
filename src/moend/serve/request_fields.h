// Every field that OpenAI's routes, llama-server's and vLLM's know, and what becomes of it here. A field
// either works; or is refused, where ignoring it would give another answer than was asked for; or changes
// nothing about the answer and is ignored. docs/serving.md says the same to users. Fields that are not in the
// table are ignored.
#pragma once

#include <span>
#include <string_view>

#include "moend/serve/request.h"

namespace moend::serve {

enum class Use { kWorks, kRefused, kIgnored };
enum class Routes { kBoth, kChat, kCompletion };

struct Reading {
  const Fields& fields;
  const Limits& limits;
  const RequestDefaults& defaults;
  GenerationRequest& request;
};

struct RequestField {
  const char* name;
  Routes routes;
  Use use;
  // kWorks: takes the field, which may be absent, into the request.
  ApiResult<void> (*read)(const char* name, const Reading& to) = nullptr;
  // kRefused: a JSON list of the values that ask for nothing. Empty lists always do.
  const char* off = "[]";
};

// In the order in which they are read.
std::span<const RequestField> RequestFields();

// Goes through the table for one of the two routes.
ApiResult<void> ReadFields(bool chat, const Reading& to);

// request_format.cpp: what the answer must look like, and what the model may do.
ApiResult<void> ReadTools(const char* name, const Reading& to);
ApiResult<void> ReadToolChoice(const char* name, const Reading& to);
ApiResult<void> ReadParallelToolCalls(const char* name, const Reading& to);
ApiResult<void> ReadResponseFormat(const char* name, const Reading& to);
ApiResult<void> ReadJsonSchema(const char* name, const Reading& to);
ApiResult<void> ReadGrammar(const char* name, const Reading& to);
ApiResult<void> ReadGuidedChoice(const char* name, const Reading& to);
ApiResult<void> ReadTemplateVariables(const char* name, const Reading& to);
ApiResult<void> ReadReasoningEffort(const char* name, const Reading& to);
ApiResult<void> ReadEnableThinking(const char* name, const Reading& to);
ApiResult<void> ReadReasoningFormat(const char* name, const Reading& to);

// request.cpp
ApiResult<void> ReadMessages(const char* name, const Reading& to);
ApiResult<void> ReadPrompt(const char* name, const Reading& to);
// Token ids of an array.
ApiResult<std::vector<int32_t>> TokenArray(const Json& array, const std::string& path, int64_t n_vocab);
[[nodiscard]] std::unexpected<ApiError> Bad(std::string param, std::string message, std::string code = {});

}  // namespace moend::serve
