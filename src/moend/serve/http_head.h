// The head of an HTTP/1.x request, parsed strictly (RFC 9112) before anything else sees the bytes: what is
// ambiguous is refused, so that a proxy and we cannot disagree on where a request ends.
#pragma once

#include <cstdint>
#include <expected>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "moend/serve/api_error.h"
#include "moend/serve/limits.h"

namespace moend::serve {

struct RequestHead {
  std::string method;                                       // GET, HEAD, POST or OPTIONS
  std::string target;                                       // "/path?query"
  std::vector<std::pair<std::string, std::string>> fields;  // names in lower case, values trimmed
  int64_t content_length = 0;
  bool chunked = false;
  bool http10 = false;  // HTTP/1.0: knows no chunks
  bool keep_alive = true;
  bool expects_continue = false;

  // The value of a field, or empty. Repeated fields: the first.
  std::string_view Get(std::string_view name) const;
  std::string_view path() const;  // target without the query
};

// `text` ends with the empty line. Errors: 400, 405, 411, 413, 414, 415, 417, 431, 501, 505.
ApiResult<RequestHead> ParseRequestHead(std::string_view text, const Limits& limits);

std::string Lowercase(std::string_view s);  // ASCII

// Incremental decoder of a chunked body.
class ChunkDecoder {
 public:
  explicit ChunkDecoder(int64_t max_bytes) : max_bytes_(max_bytes) {}
  // Consumes bytes of `in` and appends data to `out`; returns how many were consumed, or an HTTP status.
  std::expected<std::size_t, int> Feed(std::string_view in, std::string& out);
  bool done() const { return state_ == State::kDone; }

 private:
  enum class State {
    kSize,
    kExtension,
    kSizeEnd,
    kData,
    kDataCr,
    kDataLf,
    kTrailer,
    kTrailerLine,
    kLastLf,
    kDone
  };
  State state_ = State::kSize;
  int64_t max_bytes_;
  int64_t left_ = 0;
  int64_t digits_ = 0;
  int64_t overhead_ = 0;  // bytes of extensions and trailers, bounded
};

}  // namespace moend::serve
