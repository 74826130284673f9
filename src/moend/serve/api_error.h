// Errors as OpenAI's API shapes them: {"error": {"message", "type", "param", "code"}} and an HTTP status.
#pragma once

#include <expected>
#include <string>
#include <string_view>

#include "moend/base/error.h"

namespace moend::serve {

struct ApiError {
  int status = 500;
  std::string message = {};
  std::string param = {};  // the field at fault; empty: null
  std::string code = {};   // a word for programs; empty: null
  int retry_after = 0;     // seconds, for 429 and 503; 0: no header
};

template <class T>
using ApiResult = std::expected<T, ApiError>;

// 400 with the field at fault.
[[nodiscard]] ApiError BadField(std::string param, std::string message, std::string code = {});

// What an error of the library means to a client. Messages of internal errors are kept: they name no secrets,
// and the operator reads them in the client's report.
[[nodiscard]] ApiError FromError(const Error& error);

[[nodiscard]] ApiError ShuttingDown();

std::string_view ErrorType(int status);  // "invalid_request_error", ...
std::string ToJson(const ApiError& error);

}  // namespace moend::serve

// MOEND_API_ASSIGN(auto x, Function());  as MOEND_ASSIGN, for ApiResult.
#define MOEND_API_ASSIGN(declaration, expression)                                   \
  auto MOEND_CONCAT(api_result_, __LINE__) = (expression);                          \
  if (!MOEND_CONCAT(api_result_, __LINE__))                                         \
    return std::unexpected(std::move(MOEND_CONCAT(api_result_, __LINE__).error())); \
  declaration = std::move(*MOEND_CONCAT(api_result_, __LINE__))
