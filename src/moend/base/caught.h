// Where exceptions end: the library's own code returns errors, but the standard containers throw when memory
// is refused.
#pragma once

#include <exception>
#include <string_view>

#include "moend/base/error.h"

namespace moend {

// What was thrown, as an error: kOutOfMemory for memory, kInternal for everything else. `doing` ("reading the
// prompt") becomes part of the sentence where there is memory for it; needs none itself.
Error ErrorOf(const std::exception_ptr& thrown, std::string_view doing = {}) noexcept;

// Runs f, which returns an Expected, and returns what it throws as ErrorOf() does.
template <class F>
auto Caught(std::string_view doing, F&& f) -> decltype(f()) {
  try {
    return f();
  } catch (...) {
    return std::unexpected(ErrorOf(std::current_exception(), doing));
  }
}

template <class F>
auto CatchBadAlloc(F&& f) -> decltype(f()) {
  return Caught({}, std::forward<F>(f));
}

}  // namespace moend
