#include "moend/base/caught.h"

#include <new>
#include <stdexcept>

namespace moend {
namespace {

// Short enough for a string to hold without memory of its own.
constexpr const char* kNoMemory = "out of memory";
constexpr const char* kUnknown = "an exception";

}  // namespace

Error ErrorOf(const std::exception_ptr& thrown, std::string_view doing) noexcept {
  ErrorCode code = ErrorCode::kInternal;
  try {
    try {
      std::rethrow_exception(thrown);
    } catch (const std::bad_alloc&) {
      code = ErrorCode::kOutOfMemory;
    } catch (const std::length_error&) {  // a container that no memory could hold
      code = ErrorCode::kOutOfMemory;
    } catch (const std::exception& e) {
      return {code, doing.empty() ? std::string(e.what()) : fmt::format("{}: {}", doing, e.what())};
    } catch (...) {
    }
    if (code == ErrorCode::kOutOfMemory && !doing.empty())
      return {code, fmt::format("{} while {}", kNoMemory, doing)};
  } catch (...) {
  }
  return {code, code == ErrorCode::kOutOfMemory ? kNoMemory : kUnknown};
}

}  // namespace moend
