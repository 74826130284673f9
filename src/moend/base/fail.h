// How our own code makes an Error. Not installed; comes with error.h.
#pragma once

#include <fmt/format.h>

#include <utility>

#include "moend/base/error.h"

namespace moend {

// return Fail(ErrorCode::kBudget, "{} bytes are less than the smallest possible {}", have, need);
template <class... Args>
[[nodiscard]] std::unexpected<Error> Fail(ErrorCode code, fmt::format_string<Args...> text, Args&&... args) {
  return std::unexpected(Error{code, fmt::format(text, std::forward<Args>(args)...)});
}

}  // namespace moend
