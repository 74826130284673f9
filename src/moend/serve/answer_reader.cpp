#include "moend/serve/answer_reader.h"

#include <algorithm>

#include "moend/serve/response.h"

namespace moend::serve {
namespace {

// The end of `now` behind `given`, which grows by it. Where the reader has changed its mind about what was
// given already there is none.
std::string Grow(std::string& given, const std::string& now) {
  if (!now.starts_with(given)) return {};
  std::string more = now.substr(given.size());
  given += more;
  return more;
}

}  // namespace

void AnswerDelta::Append(AnswerDelta next) {
  reasoning += next.reasoning;
  content += next.content;
  for (Call& part : next.calls) {
    const auto same = std::ranges::find(calls, part.index, &Call::index);
    if (same == calls.end()) {
      calls.push_back(std::move(part));
    } else {
      same->arguments += part.arguments;
    }
  }
}

Expected<std::unique_ptr<AnswerReader>> AnswerReader::Make(const AnswerFormat& format) {
  if (format.parser.empty()) return std::unique_ptr<AnswerReader>();
  MOEND_ASSIGN(auto parser, AnswerParser::Make(format));
  return std::unique_ptr<AnswerReader>(new AnswerReader(std::move(parser)));
}

AnswerDelta AnswerReader::Push(std::string_view text) {
  constexpr std::size_t kShare = 256;  // of an answer, that it has to grow by
  text_ += text;
  if (text_.size() - read_ <= text_.size() / kShare || text.empty()) return {};
  read_ = text_.size();
  auto now = parser_->Parse(text_, /*partial=*/true);
  return now ? Give(std::move(*now)) : AnswerDelta{};
}

AnswerDelta AnswerReader::Finish(bool cut) {
  auto now = parser_->Parse(text_, cut);
  if (!now && !cut) now = parser_->Parse(text_, /*partial=*/true);
  AnswerDelta rest = now ? Give(std::move(*now)) : AnswerDelta{};
  // A call of a function that there is not, or half of one: better seen than lost.
  if (given_.reasoning.empty() && given_.content.empty() && given_.tool_calls.empty())
    rest.content = Grow(given_.content, text_);
  return rest;
}

AnswerDelta AnswerReader::Give(Answer now) {
  AnswerDelta delta{.reasoning = Grow(given_.reasoning, now.reasoning),
                    .content = Grow(given_.content, now.content)};
  for (std::size_t i = 0; i < now.tool_calls.size(); ++i) {
    ToolCall& call = now.tool_calls[i];
    if (call.name.empty()) break;  // its name is not complete
    AnswerDelta::Call part{.index = i};
    if (i == given_.tool_calls.size()) {
      if (call.id.empty()) call.id = RandomId("call_");
      part.id = call.id;
      part.name = call.name;
      given_.tool_calls.push_back({call.id, call.name, {}});
    }
    part.arguments = Grow(given_.tool_calls[i].arguments, call.arguments);
    if (!part.name.empty() || !part.arguments.empty()) delta.calls.push_back(std::move(part));
  }
  return delta;
}

}  // namespace moend::serve
