#include "moend/serve/cors.h"

#include <fmt/format.h>

#include <algorithm>

namespace moend::serve {
namespace {

// What follows "://" of a http or https origin; empty for anything else.
std::string_view HostOf(std::string_view origin) {
  for (const std::string_view scheme : {"http://", "https://"})
    if (origin.starts_with(scheme)) return origin.substr(scheme.size());
  return {};
}

bool IsLocal(std::string_view origin) {
  std::string_view host = HostOf(origin);
  const auto colon = host.rfind(':');
  if (colon != std::string_view::npos && host.find(']', colon) == std::string_view::npos)
    host = host.substr(0, colon);
  return host == "localhost" || host == "127.0.0.1" || host == "[::1]";
}

}  // namespace

Expected<Cors> Cors::Create(const std::vector<std::string>& origins) {
  Cors cors;
  for (const std::string& origin : origins) {
    if (origin == "*") {
      cors.any_ = true;
    } else if (origin == "localhost") {
      cors.local_ = true;
    } else {
      const std::string_view host = HostOf(origin);
      const auto visible = [](char c) { return c > 0x20 && c < 0x7f && c != '/' && c != '*' && c != ','; };
      if (host.empty() || !std::ranges::all_of(host, visible))
        return Fail(ErrorCode::kInvalidArgument,
                    "\"{}\" is no origin; one is https://host[:port] without a path, or * or localhost",
                    origin);
      cors.origins_.push_back(Lowercase(origin));
    }
  }
  return cors;
}

bool Cors::IsPreflight(const RequestHead& head) const {
  return enabled() && head.method == "OPTIONS" && !head.Get("origin").empty() &&
         !head.Get("access-control-request-method").empty();
}

bool Cors::Allows(std::string_view origin) const {
  if (origin.empty()) return false;
  return any_ || (local_ && IsLocal(origin)) ||
         std::ranges::find(origins_, Lowercase(origin)) != origins_.end();
}

std::string Cors::Headers(const RequestHead& head) const {
  if (!enabled()) return {};
  std::string out = any_ ? "" : "Vary: Origin\r\n";
  const std::string_view origin = head.Get("origin");
  if (!Allows(origin)) return out;
  out += fmt::format("Access-Control-Allow-Origin: {}\r\n", any_ ? std::string_view("*") : origin);
  if (IsPreflight(head)) {
    out +=
        "Access-Control-Allow-Methods: GET, HEAD, POST, OPTIONS\r\n"
        "Access-Control-Max-Age: 600\r\n";
    // OpenAI's clients add headers of their own; none of them gives a page more than the key does.
    const std::string_view wanted = head.Get("access-control-request-headers");
    out += fmt::format("Access-Control-Allow-Headers: {}\r\n",
                       wanted.empty() ? std::string_view("authorization, content-type") : wanted);
  } else {
    out += "Access-Control-Expose-Headers: Retry-After\r\n";
  }
  return out;
}

}  // namespace moend::serve
