#include "moend/serve/api_error.h"

#include <nlohmann/json.hpp>

namespace moend::serve {

ApiError BadField(std::string param, std::string message, std::string code) {
  return {.status = 400, .message = std::move(message), .param = std::move(param), .code = std::move(code)};
}

ApiError FromError(const Error& error) {
  switch (error.code) {
    case ErrorCode::kInvalidArgument:
    case ErrorCode::kUnsupported:
      return {.status = 400, .message = error.message};
    case ErrorCode::kTooLong:
      return {.status = 400, .message = error.message, .code = "context_length_exceeded"};
    case ErrorCode::kNotFound:
      return {.status = 404, .message = error.message};
    case ErrorCode::kBudget:
    case ErrorCode::kOutOfMemory:
      return {.status = 503, .message = error.message, .code = "out_of_memory", .retry_after = 1};
    case ErrorCode::kCancelled:
      return {.status = 503, .message = error.message, .code = "cancelled", .retry_after = 1};
    default:
      return {.status = 500, .message = error.message};
  }
}

ApiError ShuttingDown() {
  return {.status = 503, .message = "the server is shutting down", .code = "shutting_down", .retry_after = 5};
}

std::string_view ErrorType(int status) {
  switch (status) {
    case 401:
      return "authentication_error";
    case 404:
      return "not_found_error";
    case 429:
      return "rate_limit_error";
    case 503:
      return "unavailable_error";
    default:
      return status >= 500 ? "server_error" : "invalid_request_error";
  }
}

std::string ToJson(const ApiError& error) {
  nlohmann::ordered_json j;
  auto& e = j["error"];
  e["message"] = error.message;
  e["type"] = ErrorType(error.status);
  if (error.param.empty()) {
    e["param"] = nullptr;
  } else {
    e["param"] = error.param;
  }
  if (error.code.empty()) {
    e["code"] = nullptr;
  } else {
    e["code"] = error.code;
  }
  return j.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace moend::serve
