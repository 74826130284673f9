#include "moend/calibrate/default_text.h"

#include <algorithm>
#include <vector>

#include "moend/calibrate/text_assets.h"

namespace moend {
namespace {

constexpr std::string_view kMark = "%%% ";

std::string_view WithoutLastNewline(std::string_view text) {
  if (text.ends_with('\n')) text.remove_suffix(1);
  return text;
}

// The turns so far as text, and none left.
Expected<void> Close(std::vector<ChatMessage>& turns, const Tokenizer& tokenizer, std::string& out) {
  if (turns.empty()) return {};
  if (tokenizer.has_chat_template()) {
    auto rendered = tokenizer.ApplyChatTemplate(turns, {.add_generation_prompt = false});
    // A template that nobody but the model's own makers can render must not keep the model from being
    // calibrated.
    if (!rendered && rendered.error().code != ErrorCode::kUnsupported) return Forward(rendered);
    if (rendered) {
      out += rendered->text;
      if (!out.ends_with('\n')) out += '\n';
      turns.clear();
      return {};
    }
  }
  for (const ChatMessage& turn : turns)
    out += (turn.role == "user" ? "User: " : "Assistant: ") + turn.content + "\n\n";
  turns.clear();
  return {};
}

}  // namespace

std::string_view MixedText() {
  return assets::mixed_text;
}

Expected<std::string> RenderMarkedText(std::string_view text, const Tokenizer& tokenizer) {
  std::string out;
  std::vector<ChatMessage> turns;
  std::string_view role = "text";
  while (true) {
    std::size_t mark = text.starts_with(kMark) ? 0 : text.find("\n%%% ");
    const bool last = mark == std::string_view::npos;
    if (!last && mark + 1 < text.size() && text[mark] == '\n') ++mark;
    const std::string_view body = text.substr(0, last ? text.size() : mark);
    if (role == "text") {
      MOEND_TRY(Close(turns, tokenizer, out));
      out += body;
    } else {
      turns.push_back({std::string(role), std::string(WithoutLastNewline(body))});
    }
    if (last) break;
    text.remove_prefix(mark + kMark.size());
    const std::size_t end = std::min(text.find('\n'), text.size());
    role = text.substr(0, end);
    if (role != "text" && role != "user" && role != "assistant")
      return Fail(ErrorCode::kCorrupt, "a marked text has the mark \"{}\"; possible: text, user, assistant",
                  role.substr(0, 40));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  MOEND_TRY(Close(turns, tokenizer, out));
  return out;
}

Expected<std::string> DefaultCalibrationText(const Tokenizer& tokenizer) {
  return RenderMarkedText(MixedText(), tokenizer);
}

}  // namespace moend
