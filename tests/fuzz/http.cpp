// What reads HTTP: heads and chunked bodies.
#include "moend/serve/http_head.h"
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/refused.h"

namespace moend::fuzz {

namespace {

using namespace serve;

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

}  // namespace

void AddHttpParsers(std::vector<Parser>& parsers) {
  parsers.push_back(HeadParser());
  parsers.push_back(ChunkParser());
}

}  // namespace moend::fuzz
