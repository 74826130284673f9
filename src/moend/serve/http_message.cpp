#include "moend/serve/http_message.h"

#include <fmt/format.h>

#include <charconv>

#include "moend/serve/connection.h"

namespace moend::serve {
namespace {

std::string_view Reason(int status) {
  switch (status) {
    case 200:
      return "OK";
    case 204:
      return "No Content";
    case 400:
      return "Bad Request";
    case 401:
      return "Unauthorized";
    case 403:
      return "Forbidden";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 408:
      return "Request Timeout";
    case 411:
      return "Length Required";
    case 413:
      return "Payload Too Large";
    case 414:
      return "URI Too Long";
    case 415:
      return "Unsupported Media Type";
    case 417:
      return "Expectation Failed";
    case 429:
      return "Too Many Requests";
    case 431:
      return "Request Header Fields Too Large";
    case 500:
      return "Internal Server Error";
    case 501:
      return "Not Implemented";
    case 503:
      return "Service Unavailable";
    case 505:
      return "HTTP Version Not Supported";
    default:
      return "Error";
  }
}

// The head up to the framing, which the caller adds, and the empty line.
std::string Head(const HttpResponse& r, std::string_view more_headers) {
  std::string out = fmt::format("HTTP/1.1 {} {}\r\n", r.status, Reason(r.status));
  if (!r.content_type.empty()) out += fmt::format("Content-Type: {}\r\n", r.content_type);
  for (const auto& [name, value] : r.headers) out += fmt::format("{}: {}\r\n", name, value);
  out += more_headers;
  return out;
}

}  // namespace

bool BodyWriter::Write(std::string_view bytes) {
  if (bytes.empty()) return Alive();
  if (!chunked_) return connection_.Send(bytes);
  const std::string size = fmt::format("{:x}\r\n", bytes.size());
  return connection_.Send(size) && connection_.Send(bytes) && connection_.Send("\r\n");
}

bool BodyWriter::Alive() const {
  return !connection_.PeerGone();
}

bool BodyWriter::End() {
  return !chunked_ || connection_.Send("0\r\n\r\n");
}

void SetError(HttpResponse& response, const ApiError& error) {
  response.status = error.status;
  response.stream = nullptr;
  response.SetContent(ToJson(error), "application/json");
  if (error.status == 401) response.SetHeader("WWW-Authenticate", "Basic realm=\"moend\", Bearer");
  if (error.retry_after > 0) response.SetHeader("Retry-After", std::to_string(error.retry_after));
}

bool SendResponse(Connection& connection, const RequestHead& head, const HttpResponse& response,
                  bool keep_alive, std::string_view more_headers) {
  std::string out = Head(response, more_headers);
  const bool chunked = response.stream && !head.http10;
  if (response.stream && !chunked) keep_alive = false;  // the end of the connection ends the answer
  if (chunked) {
    out += "Transfer-Encoding: chunked\r\n";
  } else if (!response.stream && response.status != 204) {
    out += fmt::format("Content-Length: {}\r\n", response.body.size());
  }
  if (!keep_alive) {
    out += "Connection: close\r\n";
  } else if (head.http10) {
    out += "Connection: keep-alive\r\n";
  }
  out += "\r\n";
  const bool with_body = head.method != "HEAD" && response.status != 204;
  if (!response.stream) {
    // A short answer goes out in one packet.
    constexpr std::size_t kOnePacket = 1 << 16;
    if (!with_body) return connection.Send(out) && keep_alive;
    if (response.body.size() > kOnePacket)
      return connection.Send(out) && connection.Send(response.body) && keep_alive;
    out += response.body;
    return connection.Send(out) && keep_alive;
  }
  if (!connection.Send(out)) return false;
  if (!with_body) return keep_alive;
  BodyWriter writer(connection, chunked);
  return response.stream(writer) && writer.End() && keep_alive;
}

std::string ErrorText(const ApiError& error, std::string_view more_headers) {
  HttpResponse response;
  SetError(response, error);
  return Head(response, more_headers) +
         fmt::format("Content-Length: {}\r\nConnection: close\r\n\r\n", response.body.size()) + response.body;
}

std::string DecodePath(std::string_view path) {
  std::string out;
  for (std::size_t i = 0; i < path.size(); ++i) {
    unsigned value = 0;
    if (path[i] == '%' && i + 2 < path.size()) {
      const char* digits = path.data() + i + 1;
      const auto [end, error] = std::from_chars(digits, digits + 2, value, 16);
      if (error == std::errc() && end == digits + 2) {
        out.push_back(static_cast<char>(value));
        i += 2;
        continue;
      }
    }
    out.push_back(path[i]);
  }
  return out;
}

}  // namespace moend::serve
