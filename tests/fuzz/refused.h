// What the server's parsers say to an input that they refuse.
#pragma once

#include <string>

#include "moend/serve/api_error.h"
#include "tests/fuzz/fuzz.h"

namespace moend::fuzz {

inline Outcome Refused(const serve::ApiError& error) {
  if (error.status < 400 || error.status > 599)
    return {.said = error.message, .wrong = "an error of no status"};
  return {.said = std::to_string(error.status) + error.message};
}

}  // namespace moend::fuzz
