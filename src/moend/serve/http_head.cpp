#include "moend/serve/http_head.h"

#include <algorithm>
#include <array>

namespace moend::serve {
namespace {

// No path of ours is nearly as long.
constexpr std::size_t kMaxTarget = 2048;

std::unexpected<ApiError> Refuse(int status, std::string message) {
  return std::unexpected(ApiError{.status = status, .message = std::move(message)});
}

bool IsTokenChar(char c) {
  if ((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) return true;
  return c != '\0' && std::string_view("!#$%&'*+-.^_`|~").find(c) != std::string_view::npos;
}

bool IsFieldChar(char c) {
  const auto u = static_cast<unsigned char>(c);
  return u == '\t' || (u >= 0x20 && u != 0x7f);
}

std::string_view Trim(std::string_view s) {
  const auto begin = s.find_first_not_of(" \t");
  if (begin == std::string_view::npos) return {};
  return s.substr(begin, s.find_last_not_of(" \t") - begin + 1);
}

// Whether a comma separated list has `word` (lower case).
bool HasWord(std::string_view list, std::string_view word) {
  while (!list.empty()) {
    const auto comma = list.find(',');
    if (Lowercase(Trim(list.substr(0, comma))) == word) return true;
    if (comma == std::string_view::npos) break;
    list.remove_prefix(comma + 1);
  }
  return false;
}

ApiResult<RequestHead> ParseRequestLine(std::string_view line) {
  const auto first = line.find(' ');
  const auto last = line.rfind(' ');
  if (first == std::string_view::npos || first == last) return Refuse(400, "malformed request line");
  RequestHead head;
  head.method = line.substr(0, first);
  head.target = line.substr(first + 1, last - first - 1);
  const std::string_view version = line.substr(last + 1);
  if (head.method.empty() || !std::ranges::all_of(head.method, IsTokenChar))
    return Refuse(400, "malformed request line");
  if (!version.starts_with("HTTP/")) return Refuse(400, "malformed request line");
  if (version == "HTTP/1.0") {
    head.http10 = true;
    head.keep_alive = false;
  } else if (version != "HTTP/1.1") {
    return Refuse(505, "only HTTP/1.1 and HTTP/1.0 are spoken here");
  }
  const auto visible = [](char c) { return static_cast<unsigned char>(c) > 0x20 && c != 0x7f; };
  if (!head.target.starts_with('/') || !std::ranges::all_of(head.target, visible))
    return Refuse(400, "the request target must be a path");
  if (head.target.size() > kMaxTarget)
    return Refuse(414, fmt::format("the request target is longer than {} bytes", kMaxTarget));
  constexpr std::array kMethods = {"GET", "HEAD", "POST", "OPTIONS"};
  if (std::ranges::find(kMethods, head.method) == kMethods.end())
    return Refuse(405, "only GET, HEAD, POST and OPTIONS are answered here");
  return head;
}

// Content-Length, Transfer-Encoding and the like: how the body is framed.
ApiResult<void> ReadFraming(RequestHead& head, const Limits& limits) {
  bool has_length = false, has_encoding = false;
  for (const auto& [name, value] : head.fields) {
    if (name == "content-length") {
      if (has_length) return Refuse(400, "more than one Content-Length");
      has_length = true;
      if (value.empty() || value.size() > 18 ||
          !std::ranges::all_of(value, [](char c) { return c >= '0' && c <= '9'; }))
        return Refuse(400, "malformed Content-Length");
      for (const char c : value) head.content_length = head.content_length * 10 + (c - '0');
    } else if (name == "transfer-encoding") {
      if (has_encoding || Lowercase(value) != "chunked")
        return Refuse(501, "the only transfer encoding understood is chunked");
      has_encoding = head.chunked = true;
    } else if (name == "content-encoding") {
      if (Lowercase(value) != "identity") return Refuse(415, "compressed bodies are not understood");
    } else if (name == "connection") {
      if (HasWord(value, "close")) {
        head.keep_alive = false;
      } else if (HasWord(value, "keep-alive")) {
        head.keep_alive = true;
      }
    } else if (name == "expect") {
      if (Lowercase(value) != "100-continue")
        return Refuse(417, "the only expectation understood is 100-continue");
      head.expects_continue = true;
    }
  }
  if (has_length && has_encoding) return Refuse(400, "both Content-Length and Transfer-Encoding");
  // RFC 9112, 6.1: who speaks 1.0 cannot mean it, and others on the way may have read the end elsewhere.
  if (head.http10 && has_encoding) return Refuse(400, "HTTP/1.0 has no Transfer-Encoding");
  if (head.content_length > limits.body_bytes)
    return std::unexpected(
        ApiError{.status = 413,
                 .message = fmt::format("the body is larger than {} bytes", limits.body_bytes),
                 .code = "body_too_large"});
  if (head.method == "POST" && !has_length && !has_encoding)
    return Refuse(411, "a POST needs a Content-Length");
  return {};
}

int HexDigit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

}  // namespace

std::string Lowercase(std::string_view s) {
  std::string out(s);
  for (char& c : out)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return out;
}

std::string_view RequestHead::Get(std::string_view name) const {
  for (const auto& [key, value] : fields)
    if (key == name) return value;
  return {};
}

std::string_view RequestHead::path() const {
  return std::string_view(target).substr(0, target.find('?'));
}

ApiResult<RequestHead> ParseRequestHead(std::string_view text, const Limits& limits) {
  constexpr std::string_view kEnd = "\r\n";
  auto line_end = text.find(kEnd);
  if (line_end == std::string_view::npos) return Refuse(400, "malformed request line");
  MOEND_API_ASSIGN(RequestHead head, ParseRequestLine(text.substr(0, line_end)));
  for (text.remove_prefix(line_end + 2); !text.starts_with(kEnd); text.remove_prefix(line_end + 2)) {
    line_end = text.find(kEnd);
    if (line_end == std::string_view::npos) return Refuse(400, "malformed header");
    const std::string_view line = text.substr(0, line_end);
    const auto colon = line.find(':');
    if (colon == std::string_view::npos || colon == 0 ||
        !std::ranges::all_of(line.substr(0, colon), IsTokenChar) ||
        !std::ranges::all_of(line.substr(colon + 1), IsFieldChar))
      return Refuse(400, "malformed header");
    if (static_cast<int64_t>(head.fields.size()) >= limits.header_count)
      return Refuse(431, fmt::format("more than {} header fields", limits.header_count));
    head.fields.emplace_back(Lowercase(line.substr(0, colon)), std::string(Trim(line.substr(colon + 1))));
  }
  if (auto ok = ReadFraming(head, limits); !ok) return std::unexpected(std::move(ok.error()));
  return head;
}

std::expected<std::size_t, int> ChunkDecoder::Feed(std::string_view in, std::string& out) {
  constexpr int64_t kMaxOverhead = 4096;
  std::size_t i = 0;
  while (i < in.size() && state_ != State::kDone) {
    if (state_ == State::kData) {
      const auto n = std::min<std::size_t>(in.size() - i, static_cast<std::size_t>(left_));
      out.append(in.substr(i, n));
      i += n;
      left_ -= static_cast<int64_t>(n);
      if (left_ == 0) state_ = State::kDataCr;
      continue;
    }
    const char c = in[i++];
    switch (state_) {
      case State::kSize:
        if (const int digit = HexDigit(c); digit >= 0) {
          left_ = left_ * 16 + digit;
          if (++digits_ > 15) return std::unexpected(400);
          if (left_ > max_bytes_ - static_cast<int64_t>(out.size())) return std::unexpected(413);
        } else if (digits_ == 0) {
          return std::unexpected(400);
        } else if (c == ';') {
          state_ = State::kExtension;
        } else if (c == '\r') {
          state_ = State::kSizeEnd;
        } else {
          return std::unexpected(400);
        }
        break;
      case State::kExtension:
        if (++overhead_ > kMaxOverhead) return std::unexpected(400);
        if (c == '\r') state_ = State::kSizeEnd;
        break;
      case State::kSizeEnd:
        if (c != '\n') return std::unexpected(400);
        digits_ = 0;
        state_ = left_ > 0 ? State::kData : State::kTrailer;
        break;
      case State::kDataCr:
        if (c != '\r') return std::unexpected(400);
        state_ = State::kDataLf;
        break;
      case State::kDataLf:
        if (c != '\n') return std::unexpected(400);
        state_ = State::kSize;
        break;
      case State::kTrailer:
        if (++overhead_ > kMaxOverhead) return std::unexpected(400);
        state_ = c == '\r' ? State::kLastLf : State::kTrailerLine;
        break;
      case State::kTrailerLine:
        if (++overhead_ > kMaxOverhead) return std::unexpected(400);
        if (c == '\n') state_ = State::kTrailer;
        break;
      case State::kLastLf:
        if (c != '\n') return std::unexpected(400);
        state_ = State::kDone;
        break;
      case State::kData:
      case State::kDone:
        break;
    }
  }
  return i;
}

}  // namespace moend::serve
