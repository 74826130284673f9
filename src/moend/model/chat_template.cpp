#include "moend/model/chat_template.h"

#include <llama.h>

#include <climits>
#include <exception>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "moend/model/jinja.h"

namespace moend {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::size_t kMaxText = INT_MAX / 4;
constexpr std::size_t kMaxSource = 1 << 20;  // real ones have at most some ten KiB

// Marks a seam (PromptText) in a message while the template moves it about. No UTF-8 text has these bytes.
constexpr std::string_view kSeam = "\xff\xfe\xfd\xff";

// The message with a seam in everything that looks like a special token.
std::string WithSeams(const std::string& text, const SpecialTokens& special) {
  std::string out;
  std::size_t done = 0;
  for (const SpecialMatch& m : special.All(text)) {
    const auto at = static_cast<std::size_t>(m.end - m.begin > 1 ? m.begin + 1 : m.begin);
    if (at < done) continue;  // one there already
    out.append(text, done, at - done);
    out += kSeam;
    done = at;
  }
  return out.append(text, done);
}

// The same for all texts in a value.
void AddSeams(Json& value, const SpecialTokens& special) {
  if (value.is_string()) value = WithSeams(value.get_ref<const std::string&>(), special);
  if (value.is_structured())
    for (Json& inner : value) AddSeams(inner, special);
}

PromptText TakeSeams(const std::string& text) {
  PromptText out;
  std::size_t done = 0;
  for (std::size_t at; (at = text.find(kSeam, done)) != std::string::npos; done = at + kSeam.size()) {
    out.text.append(text, done, at - done);
    if (const auto seam = std::ssize(out.text); out.seams.empty() || out.seams.back() < seam)
      out.seams.push_back(seam);
  }
  out.text.append(text, done);
  return out;
}

// A first byte says how it went; the text follows.
Worker::Work Runner(const std::string& source) {
  auto parsed = std::make_shared<std::unique_ptr<JinjaTemplate>>();
  return [source, parsed](std::string_view request) {
    if (!*parsed) *parsed = std::make_unique<JinjaTemplate>(source);
    const JinjaResult result = (*parsed)->Render(Json::from_msgpack(request));
    return static_cast<char>('0' + result.kind) + result.text;
  };
}

Json Variables(std::span<const ChatMessage> messages, bool add_generation_prompt) {
  Json out = Json::object();
  Json& list = out["messages"] = Json::array();
  for (const ChatMessage& m : messages) list.push_back({{"role", m.role}, {"content", m.content}});
  out["add_generation_prompt"] = add_generation_prompt;
  return out;
}

}  // namespace

ChatTemplate::ChatTemplate(std::string source, std::string bos, std::string eos, const SpecialTokens& special)
    : source_(std::move(source)),
      bos_(std::move(bos)),
      eos_(std::move(eos)),
      special_(special),
      worker_(Runner(source_)) {}

Expected<std::string> ChatTemplate::RunJinja(std::span<const ChatMessage> messages,
                                             const ChatOptions& options) const {
  Json variables = Variables(messages, options.add_generation_prompt);
  variables["bos_token"] = bos_;
  variables["eos_token"] = eos_;
  if (!options.variables.empty()) {
    const Json more = Json::parse(options.variables, nullptr, /*allow_exceptions=*/false);
    if (!more.is_object())
      return Fail(ErrorCode::kInvalidArgument, "the variables for a chat template must be a JSON object");
    for (const auto& [name, value] : more.items()) {
      if (variables.contains(name))
        return Fail(ErrorCode::kInvalidArgument, "the chat template's variable {} cannot be set", name);
      AddSeams(variables[name] = value, special_);
    }
  }
  // As llama-server: templates that look at it think unless they are told not to.
  if (!variables.contains("enable_thinking")) variables["enable_thinking"] = true;
  std::string request;
  Json::to_msgpack(variables, request);
  MOEND_ASSIGN(std::string reply, worker_.Call(request));
  if (reply.empty()) return Fail(ErrorCode::kInternal, "it gave no answer");
  const int kind = reply[0] - '0';
  reply.erase(0, 1);
  if (kind == JinjaResult::kText) return reply;
  if (kind == JinjaResult::kRefused)
    return Fail(ErrorCode::kInvalidArgument, "the model's chat template refuses these messages: {}", reply);
  return Fail(ErrorCode::kUnsupported, "{}", reply);
}

Expected<std::string> ChatTemplate::RunBuiltIn(std::span<const ChatMessage> messages,
                                               bool add_generation_prompt) const {
  std::vector<llama_chat_message> chat;
  for (const ChatMessage& m : messages) chat.push_back({m.role.c_str(), m.content.c_str()});
  const auto apply = [&](char* to, int32_t size) {
    return llama_chat_apply_template(source_.c_str(), chat.data(), chat.size(), add_generation_prompt, to,
                                     size);
  };
  try {
    int32_t n = apply(nullptr, 0);  // only measures
    if (n < 0) return Fail(ErrorCode::kUnsupported, "llama.cpp has none built in that is like it");
    std::string text(static_cast<std::size_t>(n) + 1, '\0');
    n = apply(text.data(), n + 1);
    text.resize(static_cast<std::size_t>(std::max(n, 0)));
    return text;
  } catch (const std::exception& e) {
    return Fail(ErrorCode::kUnsupported, "{}", e.what());
  }
}

ChatTemplate::Way ChatTemplate::Probe() const {
  const std::lock_guard lock(probing_);
  if (way_ != Way::kUnknown) return way_;
  const ChatMessage hello{"user", "Hello"};
  if (!HasJinja()) {
    why_ = "this build has no Jinja engine";
  } else if (source_.size() > kMaxSource) {
    why_ = fmt::format("it has {} bytes, more than {}", source_.size(), kMaxSource);
  } else if (const auto run = RunJinja({&hello, 1}, {});
             run || run.error().code == ErrorCode::kInvalidArgument) {
    return way_ = Way::kJinja;
  } else if (run.error().code == ErrorCode::kOutOfMemory) {
    return Way::kJinja;  // says nothing about the template
  } else {
    why_ = run.error().message;
  }
  return way_ = RunBuiltIn({&hello, 1}, true) ? Way::kBuiltIn : Way::kNone;
}

std::string ChatTemplate::Note() const {
  switch (Probe()) {
    case Way::kBuiltIn:
      return fmt::format(
          "the model's chat template cannot be run ({}); the one of llama.cpp's own that is most like "
          "it takes its place",
          why_);
    case Way::kNone:
      return fmt::format("the model's chat template cannot be run: {}", why_);
    default:
      return {};
  }
}

Expected<PromptText> ChatTemplate::Render(std::span<const ChatMessage> messages,
                                          const ChatOptions& options) const {
  std::vector<ChatMessage> marked;
  std::size_t bytes = 0;
  for (const ChatMessage& m : messages) {
    if (m.role.find('\0') != std::string::npos || m.content.find('\0') != std::string::npos)
      return Fail(ErrorCode::kInvalidArgument, "message {} of the chat has a zero byte", marked.size() + 1);
    bytes += m.role.size() + m.content.size();
    if (bytes > kMaxText)
      return Fail(ErrorCode::kTooLong, "a chat of more than {} bytes is longer than what can be formatted",
                  kMaxText);
    marked.push_back({m.role, WithSeams(m.content, special_)});
  }
  switch (Probe()) {
    case Way::kBuiltIn: {
      MOEND_ASSIGN(const std::string text, RunBuiltIn(marked, options.add_generation_prompt));
      return TakeSeams(text);
    }
    case Way::kNone:
      return Fail(ErrorCode::kUnsupported, "the model's chat template cannot be run: {}", why_);
    default:
      break;
  }
  auto text = RunJinja(marked, options);
  if (!text && text.error().code == ErrorCode::kUnsupported)
    return Fail(ErrorCode::kUnsupported, "the model's chat template failed on these messages: {}",
                text.error().message);
  if (!text) return Forward(text);
  return TakeSeams(*text);
}

}  // namespace moend
