// Where the server's messages go; the library itself prints nothing.
#pragma once

#include <fmt/format.h>

#include <functional>
#include <string>

namespace moend::serve {

enum class LogLevel { kInfo, kWarning, kError };

class Log {
 public:
  using Sink = std::function<void(LogLevel, const std::string&)>;  // called by several threads
  Log() = default;
  explicit Log(Sink sink) : sink_(std::move(sink)) {}

  template <class... Args>
  void Info(fmt::format_string<Args...> text, Args&&... args) const {
    Write(LogLevel::kInfo, fmt::format(text, std::forward<Args>(args)...));
  }
  template <class... Args>
  void Warning(fmt::format_string<Args...> text, Args&&... args) const {
    Write(LogLevel::kWarning, fmt::format(text, std::forward<Args>(args)...));
  }
  template <class... Args>
  void Error(fmt::format_string<Args...> text, Args&&... args) const {
    Write(LogLevel::kError, fmt::format(text, std::forward<Args>(args)...));
  }

 private:
  void Write(LogLevel level, const std::string& text) const {
    if (sink_) sink_(level, text);
  }
  Sink sink_;
};

}  // namespace moend::serve
