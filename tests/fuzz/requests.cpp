// What reads requests: HTTP heads, chunked bodies, and the JSON of the routes.
#include <cmath>

#include "moend/serve/http_head.h"
#include "moend/serve/json.h"
#include "moend/serve/request.h"
#include "tests/fuzz/fuzz.h"

namespace moend::fuzz {
namespace {

using namespace serve;

Outcome Refused(const ApiError& error) {
  if (error.status < 400 || error.status > 599)
    return {.said = error.message, .wrong = "an error of no status"};
  return {.said = std::to_string(error.status) + error.message};
}

Parser HeadParser() {
  return {
      .name = "http_head",
      .seeds = {"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                "Content-Length: 12\r\n\r\n",
                "GET /health?x=1 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
                "POST /v1/completions HTTP/1.1\r\nHost: b:80\r\nTransfer-Encoding: chunked\r\n"
                "Content-Type: application/json; charset=utf-8\r\nExpect: 100-continue\r\n\r\n"},
      .words = {"\r\n", "Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n", "Host: x\r\n", " HTTP/1.1",
                "chunked, gzip", "+", "\t", "\r\n ", "OPTIONS", "HEAD", "Connection: close\r\n", "%2e", "\n"},
      .run = [](const std::string& input) -> Outcome {
        const Limits limits;
        const auto head = ParseRequestHead(input, limits);
        if (!head) return Refused(head.error());
        const auto wrong = [](const char* what) { return Outcome{.accepted = true, .wrong = what}; };
        if (head->content_length < 0 || head->content_length > limits.body_bytes)
          return wrong("a body longer than allowed");
        if (head->chunked && (head->content_length != 0 || head->http10))
          return wrong("two ways to tell where the body ends");
        if (std::ssize(head->fields) > limits.header_count) return wrong("more fields than allowed");
        for (const auto& [name, value] : head->fields)
          if (name.empty() || Lowercase(name) != name ||
              value.find_first_of(std::string_view("\r\n\0", 3)) != std::string::npos)
            return wrong("a field that is none");
        if (head->target.empty() || head->target.find_first_of(" \r\n") != std::string::npos)
          return wrong("a target that is none");
        return {.accepted = true, .said = head->method + (head->chunked ? "chunked" : "")};
      }};
}

Parser ChunkParser() {
  return {.name = "http_chunks",
          .seeds = {"5\r\nhello\r\n0\r\n\r\n", "a;x=1\r\n0123456789\r\n1\r\n!\r\n0\r\nTrailer: 1\r\n\r\n"},
          .words = {"\r\n", "0\r\n\r\n", "ffffffffffffffff\r\n", "7fffffffffffffff", ";", "\n"},
          .run = [](const std::string& input) -> Outcome {
            constexpr int64_t kMost = 100;
            ChunkDecoder whole(kMost), split(kMost);
            std::string out, pieces;
            const auto used = whole.Feed(input, out);
            // The same, a byte at a time.
            int status = 0;
            std::size_t consumed = 0;
            for (; consumed < input.size() && !split.done(); ++consumed) {
              const auto fed = split.Feed(std::string_view(input).substr(consumed, 1), pieces);
              if (!fed) {
                status = fed.error();
                break;
              }
            }
            Outcome outcome{.accepted = used.has_value(),
                            .said = used ? "read" : std::to_string(used.error()) + "!"};
            if (std::ssize(out) > kMost) outcome.wrong = "a body longer than allowed";
            if (used ? status != 0 : status != used.error())
              outcome.wrong = "bytes one by one are judged otherwise";
            if (used && (out != pieces || whole.done() != split.done() || *used != consumed))
              outcome.wrong = "bytes one by one are read otherwise";
            return outcome;
          }};
}

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
  parsers.push_back(HeadParser());
  parsers.push_back(ChunkParser());
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
