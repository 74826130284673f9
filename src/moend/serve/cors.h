// Which web pages of other origins may talk to the server (Fetch standard, CORS protocol). Without an origin
// in the list no page may: browsers then keep to the same origin.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "moend/base/error.h"
#include "moend/serve/http_head.h"

namespace moend::serve {

class Cors {
 public:
  // "https://host[:port]" each, or "*" for every origin, or "localhost" for every page of this machine,
  // whatever its port. kInvalidArgument for anything else.
  static Expected<Cors> Create(const std::vector<std::string>& origins);

  bool enabled() const { return any_ || local_ || !origins_.empty(); }
  bool any() const { return any_; }

  // A browser's question whether it may send a request; it carries no key.
  bool IsPreflight(const RequestHead& head) const;
  bool Allows(std::string_view origin) const;
  // The lines that an answer to this request gets; to a preflight also what may be sent.
  std::string Headers(const RequestHead& head) const;

 private:
  std::vector<std::string> origins_;
  bool any_ = false, local_ = false;
};

}  // namespace moend::serve
