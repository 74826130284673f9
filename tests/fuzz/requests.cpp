// What reads requests: the JSON of the routes.
#include <cmath>

#include "moend/serve/json.h"
#include "moend/serve/request.h"
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/refused.h"

namespace moend::fuzz {
namespace {

using namespace serve;

template <class Parse>
Parser BodyParser(std::string name, std::vector<std::string> seeds, const Parse& parse) {
  return {.name = std::move(name),
          .seeds = std::move(seeds),
          .words = {"\"stream\": true", "\"stop\": [\"a\"]", "\"max_tokens\": 5", "\"temperature\": 0.5",
                    "\"top_p\": 0.9", "\"seed\": -1", "\"logit_bias\": {\"5\": 1}", "\"n\": 1",
                    "\"logprobs\": true", "\"role\": \"system\"", "\"tools\": []",
                    "\"response_format\": {\"type\": \"text\"}", "\\u0000", "\\ud800", "[[[[",
                    "\"min_p\": 0.1", "\"typical_p\": 1", "\"ignore_eos\": true", ", "},
          .run = [parse](const std::string& input) -> Outcome {
            const Limits limits;
            const auto body = ParseBody(input, limits);
            if (!body) return Refused(body.error());
            RequestDefaults defaults;
            defaults.n_vocab = 1000;
            const auto request = parse(*body, limits, defaults);
            if (!request) return Refused(request.error());
            const auto wrong = [](const char* what) { return Outcome{.accepted = true, .wrong = what}; };
            const PickOptions& pick = request->pick;
            for (const double x :
                 {double{pick.sampler.temperature}, double{pick.sampler.top_p}, double{pick.sampler.min_p},
                  pick.frequency_penalty, pick.presence_penalty, pick.repeat_penalty})
              if (!std::isfinite(x)) return wrong("a number of the sampler is not finite");
            if (std::ssize(request->stop) > limits.stops) return wrong("more stops than allowed");
            if (std::ssize(request->messages) > limits.messages) return wrong("more messages than allowed");
            for (const int32_t token : request->prompt_tokens)
              if (token < 0 || token >= defaults.n_vocab) return wrong("a token that there is not");
            for (const auto& [token, bias] : pick.logit_bias)
              if (token < 0 || token >= defaults.n_vocab || !std::isfinite(bias))
                return wrong("a bias of no token");
            if (!request->json_schema.empty() && !request->grammar.empty())
              return wrong("two forms of an answer");
            if (request->tool_choice == ToolChoice::kRequired && request->tools.empty())
              return wrong("a call is asked for without a tool");
            return {.accepted = true, .said = request->stream ? "stream" : "whole"};
          }};
}

}  // namespace

void AddServerParsers(std::vector<Parser>& parsers) {
  parsers.push_back(BodyParser(
      "chat_request",
      {R"({"model": "m", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], )"
       R"("max_tokens": 16, "temperature": 0.7, "stop": ["\n"], "stream": false})",
       R"({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "top_p": 0.9, "seed": 7, )"
       R"("logprobs": true, "top_logprobs": 3, "stream": true, "stream_options": {"include_usage": true}})",
       R"({"messages": [{"role": "assistant", "content": null, "tool_calls": [{"id": "c", "type": "function", "function": )"
       R"({"name": "f", "arguments": "{\"a\": 1}"}}]}, {"role": "tool", "tool_call_id": "c", "content": "2"}], "tools": )"
       R"([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], "tool_choice": "required", )"
       R"("reasoning_effort": "low", "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}})"},
      ParseChatRequest));
  parsers.push_back(
      BodyParser("completion_request",
                 {R"({"prompt": "Once", "max_tokens": 4, "logit_bias": {"3": -100}, "echo": false})",
                  R"({"prompt": [1, 2, 3], "n_predict": -1, "repeat_penalty": 1.1, "min_tokens": 2, )"
                  R"("guided_choice": ["a", "b"]})"},
                 ParseCompletionRequest));
}

}  // namespace moend::fuzz
