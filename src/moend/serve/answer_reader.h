// What a model writes, told apart as it comes: thoughts, text, and tool calls.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "moend/model/chat_format.h"

namespace moend::serve {

// What is new in an answer.
struct AnswerDelta {
  std::string reasoning = {}, content = {};
  struct Call {
    std::size_t index = 0;           // of the answer's calls
    std::string id = {}, name = {};  // with the first part of a call
    std::string arguments = {};      // JSON; the parts of it make the whole
  };
  std::vector<Call> calls = {};
  bool empty() const { return reasoning.empty() && content.empty() && calls.empty(); }
  // What came next; the parts of a call become one.
  void Append(AnswerDelta next);
};

// Not thread safe.
class AnswerReader {
 public:
  // Null for answers that are text and no more. kInternal: the format cannot be read.
  static Expected<std::unique_ptr<AnswerReader>> Make(const AnswerFormat& format);

  // `text` was written; what of it is certain by now. To read an answer takes time with its length, so that
  // in long ones some parts are waited for.
  AnswerDelta Push(std::string_view text);
  // Nothing follows: `cut` when the answer ended before its end. What is not of the format is text.
  AnswerDelta Finish(bool cut);

  bool has_calls() const { return !given_.tool_calls.empty(); }

 private:
  explicit AnswerReader(std::unique_ptr<AnswerParser> parser) : parser_(std::move(parser)) {}
  AnswerDelta Give(Answer now);

  std::unique_ptr<AnswerParser> parser_;
  std::string text_;
  std::size_t read_ = 0;  // bytes of text_ when it was read last
  Answer given_;
};

}  // namespace moend::serve
