// A request as a route gets it, and the answer that it gives.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "moend/serve/api_error.h"
#include "moend/serve/http_head.h"

namespace moend::serve {

inline constexpr const char* kJson = "application/json";

class Connection;

struct HttpRequest {
  RequestHead head;
  std::string path;  // decoded, without the query
  std::string body;

  std::string_view method() const { return head.method; }
  std::string_view header(std::string_view name) const { return head.Get(name); }  // name in lower case
};

// Writes an answer whose length is not known in advance, in HTTP/1.1 as chunks.
class BodyWriter {
 public:
  BodyWriter(Connection& connection, bool chunked) : connection_(connection), chunked_(chunked) {}
  // False when the client is gone.
  bool Write(std::string_view bytes);
  bool Alive() const;
  bool End();  // of the body

 private:
  Connection& connection_;
  bool chunked_;
};

struct HttpResponse {
  int status = 200;
  std::vector<std::pair<std::string, std::string>> headers = {};
  std::string content_type = {}, body = {};
  // Instead of a body: called once, after the head is sent. Returns whether the answer is whole; if not, the
  // connection is closed.
  std::function<bool(BodyWriter&)> stream = {};

  void SetHeader(std::string name, std::string value) {
    headers.emplace_back(std::move(name), std::move(value));
  }
  void SetContent(std::string content, std::string type) {
    body = std::move(content);
    content_type = std::move(type);
  }
};

// The answer that an error is, with everything that belongs to it: type, Retry-After, WWW-Authenticate.
void SetError(HttpResponse& response, const ApiError& error);

// Sends an answer. `more_headers`: whole lines. False when the connection is of no use any more: the client
// is gone, or the end of the answer is the end of the connection.
bool SendResponse(Connection& connection, const RequestHead& head, const HttpResponse& response,
                  bool keep_alive, std::string_view more_headers);

// The whole text of an error's answer, which closes the connection.
std::string ErrorText(const ApiError& error, std::string_view more_headers = {});

// %41 to A; nothing for what is no escape.
std::string DecodePath(std::string_view path);

}  // namespace moend::serve
