// Errors are values: no function of the library throws across its border, aborts, exits or prints.
#pragma once

#include <expected>
#include <string>
#include <utility>

namespace moend {

enum class ErrorCode {
  kInvalidArgument,  // a value given by the caller is out of range
  kNotFound,         // a file, a name or a key that does not exist
  kIo,               // the system refused to read or write
  kCorrupt,          // a file whose content contradicts itself or its size
  kUnsupported,      // well formed, but not something moend runs
  kMismatch,         // made for another model or another schema version
  kBudget,           // a memory budget that cannot be met
  kTooLong,          // more tokens than the context holds
  kOutOfMemory,      // the allocator refused
  kCancelled,        // stopped on request; what was finished is kept
  kInternal,         // a broken invariant of ours
};

// `message` is one sentence for a person: it names the file or value, what is wrong with it, and what would
// be right.
struct Error {
  ErrorCode code = ErrorCode::kInternal;
  std::string message;
};

template <class T>
using Expected = std::expected<T, Error>;

// Hands the error of `result` on: `if (!r) return Forward(r);`
template <class T>
[[nodiscard]] std::unexpected<Error> Forward(Expected<T>& result) {
  return std::unexpected(std::move(result.error()));
}

}  // namespace moend

#define MOEND_CONCAT_INNER(a, b) a##b
#define MOEND_CONCAT(a, b) MOEND_CONCAT_INNER(a, b)

// MOEND_ASSIGN(auto x, Function());  declares x from an Expected, or returns its error.
#define MOEND_ASSIGN(declaration, expression)                       \
  auto MOEND_CONCAT(moend_result_, __LINE__) = (expression);        \
  if (!MOEND_CONCAT(moend_result_, __LINE__))                       \
    return ::moend::Forward(MOEND_CONCAT(moend_result_, __LINE__)); \
  declaration = std::move(*MOEND_CONCAT(moend_result_, __LINE__))

// MOEND_TRY(Function());  returns the error of an Expected<void>, or goes on.
#define MOEND_TRY(expression)                                                                   \
  do {                                                                                          \
    if (auto moend_status = (expression); !moend_status) return ::moend::Forward(moend_status); \
  } while (false)

// Our own code makes its messages with {fmt}, which who uses the library need not know of.
#ifdef MOEND_OWN_CODE
#include "moend/base/fail.h"
#endif
