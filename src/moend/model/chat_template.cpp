#include "moend/model/chat_template.h"

#include <llama.h>

#include <algorithm>
#include <climits>
#include <exception>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "moend/model/chat_fallback.h"
#include "moend/model/chat_format.h"
#include "moend/model/jinja.h"
#include "moend/model/json_schema.h"

namespace moend {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::size_t kMaxText = INT_MAX / 4;
constexpr std::size_t kMaxSource = 1 << 20;  // real ones have at most some ten KiB

// Marks a seam (PromptText) in a message while the template moves it about: characters that Unicode has set
// aside for use within a program, U+FDD0 U+FDEF U+FDD1. In a message they make a seam more, which changes
// nothing.
constexpr std::string_view kSeam = "\xEF\xB7\x90\xEF\xB7\xAF\xEF\xB7\x91";

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
  if (value.is_object()) {
    Json marked = Json::object();
    for (auto& [name, inner] : value.items()) marked[WithSeams(name, special)] = std::move(inner);
    value = std::move(marked);
  }
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

// A first byte says how it went; the text follows. A request for ChatFormat names its template in "format".
class Runner {
 public:
  Runner(std::string source, std::string with_tools, std::string bos, std::string eos)
      : source_(std::move(source)),
        with_tools_(std::move(with_tools)),
        bos_(std::move(bos)),
        eos_(std::move(eos)) {}

  std::string operator()(std::string_view packed) {
    Json request = Json::from_msgpack(packed);
    if (const auto which = request.find("format"); which != request.end())
      return Write(Apply(which->get<std::string>(), request));
    if (!jinja_) jinja_ = std::make_unique<JinjaTemplate>(source_);
    return Write(jinja_->Render(std::move(request.at("jinja"))));
  }

 private:
  static std::string Write(const JinjaResult& result) {
    return static_cast<char>('0' + result.kind) + result.text;
  }
  JinjaResult Apply(const std::string& which, const Json& request) {
    try {
      JinjaResult result{JinjaResult::kText, {}};
      if (request.contains("prompt_only")) {
        Json::to_msgpack({{"prompt", Format(which).Prompt(request)}}, result.text);
      } else {
        Json::to_msgpack(Format(which).Apply(request), result.text);
      }
      return result;
    } catch (const std::bad_alloc&) {
      throw;
    } catch (const std::exception& e) {
      return JinjaFailure(e.what());
    }
  }
  const ChatFormat& Format(const std::string& which) {
    auto& format = formats_[which];
    if (!format) format = std::make_unique<ChatFormat>(Source(which), bos_, eos_);
    return *format;
  }
  std::string Source(const std::string& which) const {
    if (which == "own") return source_;
    if (which == "tools") return with_tools_;
    return FallbackTemplate(which == "begun"      ? Thinking::kBegun
                            : which == "optional" ? Thinking::kOptional
                                                  : Thinking::kNone);
  }

  std::string source_, with_tools_, bos_, eos_;
  std::unique_ptr<JinjaTemplate> jinja_;
  std::map<std::string, std::unique_ptr<ChatFormat>> formats_;
};

bool IsPlain(const ChatMessage& m) {
  return m.role != "tool" && m.reasoning_content.empty() && m.tool_calls.empty();
}

// A request for ChatFormat; the texts of the chat as `mark` makes them.
template <class Mark>
Json FormatRequest(std::span<const ChatMessage> messages, Json tools, const ChatOptions& options,
                   Mark&& mark) {
  Json request = {{"tools", std::move(tools)},
                  {"add_generation_prompt", options.add_generation_prompt},
                  {"split", options.split_reasoning},
                  {"parallel", nullptr},
                  {"schema", nullptr},
                  {"variables", Json::object()},
                  {"messages", Json::array()}};
  request["tool_choice"] = options.tool_choice == ToolChoice::kAuto   ? "auto"
                           : options.tool_choice == ToolChoice::kNone ? "none"
                                                                      : "required";
  if (options.parallel_tool_calls) request["parallel"] = *options.parallel_tool_calls;
  mark(request["tools"]);
  for (const ChatMessage& m : messages) {
    Json message = {{"role", m.role}, {"content", m.content}, {"reasoning_content", m.reasoning_content}};
    for (const char* name : {"content", "reasoning_content"}) mark(message[name]);
    if (m.role == "tool") {
      message["tool_call_id"] = m.tool_call_id;
      message["name"] = m.name;
      for (const char* name : {"tool_call_id", "name"}) mark(message[name]);
    }
    if (!m.tool_calls.empty()) message["tool_calls"] = Json::array();
    for (const ToolCall& call : m.tool_calls) {
      Json c = {{"id", call.id}, {"name", call.name}};
      mark(c);
      // Within the JSON: its escapes may spell a special token, too.
      Json arguments = Json::parse(call.arguments, nullptr, /*allow_exceptions=*/false);
      mark(arguments);
      c["arguments"] = arguments.dump(-1, ' ', false, Json::error_handler_t::replace);
      message["tool_calls"].push_back(std::move(c));
    }
    request["messages"].push_back(std::move(message));
  }
  return request;
}

Expected<void> RelaxTools(Json& tools) {
  for (Json& tool : tools)
    if (const auto f = tool.find("function"); f != tool.end() && f->contains("parameters")) {
      Json& parameters = (*f)["parameters"];
      if (parameters.is_object()) MOEND_TRY(MakeEnforceable(parameters, /*relaxed=*/true));
    }
  return {};
}

Expected<Json> UserVariables(const ChatOptions& options) {
  if (options.variables.empty()) return Json::object();
  Json more = Json::parse(options.variables, nullptr, /*allow_exceptions=*/false);
  if (!more.is_object())
    return Fail(ErrorCode::kInvalidArgument, "the variables for a chat template must be a JSON object");
  for (const char* ours : {"messages", "tools", "bos_token", "eos_token", "add_generation_prompt"})
    if (more.contains(ours))
      return Fail(ErrorCode::kInvalidArgument, "the chat template's variable {} cannot be set", ours);
  return more;
}

AnswerFormat ReadFormat(const Json& reply) {
  AnswerFormat format;
  format.parser = reply.at("parser").get<std::string>();
  format.kind = reply.at("kind").get<int>();
  format.generation_prompt = reply.at("generation_prompt").get<std::string>();
  format.preserved = reply.at("preserved").get<std::vector<std::string>>();
  format.stops = reply.at("stops").get<std::vector<std::string>>();
  format.grammar.text = reply.at("grammar").get<std::string>();
  format.grammar.lazy = reply.at("lazy").get<bool>();
  for (const Json& t : reply.at("triggers"))
    format.grammar.triggers.push_back({t.at("text").get<std::string>(), t.at("regex").get<bool>()});
  if (reply.at("begun").get<bool>()) format.grammar.begun = format.generation_prompt;
  return format;
}

Json Variables(std::span<const ChatMessage> messages, bool add_generation_prompt) {
  Json out = Json::object();
  Json& list = out["messages"] = Json::array();
  for (const ChatMessage& m : messages) list.push_back({{"role", m.role}, {"content", m.content}});
  out["add_generation_prompt"] = add_generation_prompt;
  return out;
}

}  // namespace

ChatTemplate::ChatTemplate(std::string source, std::string bos, std::string eos, const SpecialTokens& special,
                           std::string with_tools)
    : source_(std::move(source)),
      with_tools_(std::move(with_tools)),
      bos_(std::move(bos)),
      eos_(std::move(eos)),
      special_(special),
      worker_([runner = std::make_shared<Runner>(source_, with_tools_, bos_, eos_)](
                  std::string_view request) { return (*runner)(request); }) {}

Expected<std::string> ChatTemplate::Ask(const Json& request) const {
  std::string packed;
  Json::to_msgpack(request, packed);
  MOEND_ASSIGN(std::string reply, worker_.Call(packed));
  if (reply.empty()) return Fail(ErrorCode::kInternal, "it gave no answer");
  const int kind = reply[0] - '0';
  reply.erase(0, 1);
  if (kind == JinjaResult::kText) return reply;
  if (kind == JinjaResult::kRefused)
    return Fail(ErrorCode::kInvalidArgument, "the model's chat template refuses these messages: {}", reply);
  return Fail(ErrorCode::kUnsupported, "{}", reply);
}

Expected<std::string> ChatTemplate::RunJinja(std::span<const ChatMessage> messages,
                                             const ChatOptions& options) const {
  Json variables = Variables(messages, options.add_generation_prompt);
  variables["bos_token"] = bos_;
  variables["eos_token"] = eos_;
  MOEND_ASSIGN(const Json more, UserVariables(options));
  for (const auto& [name, value] : more.items()) AddSeams(variables[name] = value, special_);
  // As llama-server: templates that look at it think unless they are told not to.
  if (!variables.contains("enable_thinking")) variables["enable_thinking"] = true;
  return Ask({{"jinja", std::move(variables)}});
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

Expected<Json> ChatTemplate::Apply(const std::string& which, Json request) const {
  request["format"] = which;
  MOEND_ASSIGN(const std::string reply, Ask(request));
  Json out = Json::from_msgpack(reply, /*strict=*/true, /*allow_exceptions=*/false);
  if (!out.is_object()) return Fail(ErrorCode::kInternal, "the chat template's process sent no object");
  return out;
}

// What is written between thoughts and answer is the template's business, not the messages'.
Expected<AnswerFormat> ChatTemplate::PlainFormat(const ChatOptions& options) const {
  constexpr std::size_t kMostKept = 64;
  {
    const std::lock_guard lock(probing_);
    if (const auto kept = plain_formats_.find(options.variables); kept != plain_formats_.end())
      return kept->second;
  }
  const ChatMessage hello{"user", "Hello"};
  Json request = FormatRequest({&hello, 1}, Json::array(), options, [](Json&) {});
  MOEND_ASSIGN(request["variables"], UserVariables(options));
  AnswerFormat format;
  const auto reply = Apply("own", std::move(request));
  if (!reply && reply.error().code == ErrorCode::kOutOfMemory) return std::unexpected(reply.error());
  // A template that cannot be analyzed writes text.
  if (reply && !reply->at("thinking").get_ref<const std::string&>().empty()) format = ReadFormat(*reply);
  const std::lock_guard lock(probing_);
  if (plain_formats_.size() >= kMostKept) plain_formats_.clear();
  plain_formats_[options.variables] = format;
  return format;
}

Expected<ChatPrompt> ChatTemplate::Prepare(std::span<const ChatMessage> messages,
                                           const ChatOptions& options) const {
  const bool plain =
      options.tools.empty() && options.json_schema.empty() && std::ranges::all_of(messages, IsPlain);
  const Way way = Probe();
  if (plain) {
    ChatPrompt out;
    MOEND_ASSIGN(out.prompt, Render(messages, options));
    if (way == Way::kJinja && options.split_reasoning && options.add_generation_prompt) {
      MOEND_ASSIGN(out.format, PlainFormat(options));
    }
    return out;
  }
  if (!HasChatFormats())
    return Fail(ErrorCode::kUnsupported, "this build of moend has no tools and JSON schemas in chats");
  std::size_t bytes = options.tools.size();
  for (const ChatMessage& m : messages) {
    bytes += m.content.size() + m.reasoning_content.size();
    for (const ToolCall& call : m.tool_calls) bytes += call.arguments.size();
  }
  if (bytes > kMaxText)
    return Fail(ErrorCode::kTooLong, "a chat of more than {} bytes is longer than what can be formatted",
                kMaxText);
  Json tools =
      options.tools.empty() ? Json::array() : Json::parse(options.tools, nullptr, /*allow_exceptions=*/false);
  if (!tools.is_array()) return Fail(ErrorCode::kInvalidArgument, "tools must be a JSON list");
  Json schema = nullptr;
  if (!options.json_schema.empty()) {
    schema = Json::parse(options.json_schema, nullptr, /*allow_exceptions=*/false);
    if (!schema.is_object()) return Fail(ErrorCode::kInvalidArgument, "a JSON schema must be a JSON object");
    MOEND_TRY(MakeEnforceable(schema, /*relaxed=*/false));
  }
  if (way != Way::kJinja) return PrepareFallback(messages, options, tools, schema, {});

  MOEND_ASSIGN(const Json variables, UserVariables(options));
  const std::string which = !tools.empty() && !with_tools_.empty() ? "tools" : "own";
  // The prompt has the tools as they are, with seams in the chat's texts; the answer is held to what of them
  // can be.
  Json shown = FormatRequest(messages, tools, options, [this](Json& text) { AddSeams(text, special_); });
  MOEND_TRY(RelaxTools(tools));
  Json held = FormatRequest(messages, tools, options, [](Json&) {});
  held["schema"] = schema;
  held["variables"] = variables;
  shown["schema"] = schema;
  shown["variables"] = variables;
  AddSeams(shown["variables"], special_);
  Json request = std::move(held);
  if (!options.add_generation_prompt) {
    request = std::move(shown);
    request["prompt_only"] = true;
  } else if (shown != request) {
    request["shown"] = std::move(shown);
  }
  auto reply = Apply(which, request);
  if (!reply && reply.error().code == ErrorCode::kInvalidArgument && !tools.empty()) {
    // Perhaps it refuses messages of tools because it knows none.
    const ChatMessage hello{"user", "Hello"};
    const auto simple = Apply(which, FormatRequest({&hello, 1}, tools, options, [](Json&) {}));
    if (simple && !simple->at("calls").get<bool>())
      return PrepareFallback(messages, options, tools, schema, simple->at("thinking").get<std::string>());
  }
  if (!reply && reply.error().code == ErrorCode::kUnsupported) {
    const std::string& why = reply.error().message;
    if (const auto at = why.find("JSON schema "); at != std::string::npos)
      return Fail(ErrorCode::kInvalidArgument, "a schema cannot be used: {}", why.substr(at));
    return Fail(ErrorCode::kUnsupported, "the model's chat template failed on these messages: {}", why);
  }
  if (!reply) return Forward(reply);
  ChatPrompt out;
  if (options.add_generation_prompt) {
    if (!reply->at("calls").get<bool>())
      return PrepareFallback(messages, options, tools, schema, reply->at("thinking").get<std::string>());
    out.format = ReadFormat(*reply);
  }
  out.prompt = TakeSeams(reply->at("prompt").get_ref<const std::string&>());
  return out;
}

Expected<ChatPrompt> ChatTemplate::PrepareFallback(std::span<const ChatMessage> messages,
                                                   const ChatOptions& options, const Json& tools,
                                                   const Json& schema, const std::string& thinking) const {
  ChatPrompt out;
  ChatOptions plain{.add_generation_prompt = options.add_generation_prompt, .variables = options.variables};
  MOEND_ASSIGN(out.prompt, Render(AsPlainChat(messages, tools), plain));
  if (!options.add_generation_prompt) return out;
  const std::string_view end = out.prompt.text;
  const std::string which = thinking != "<think>"                                    ? "plain"
                            : end.ends_with("<think>\n") || end.ends_with("<think>") ? "begun"
                                                                                     : "optional";
  const ChatMessage hello{"user", "Hello"};
  Json request = FormatRequest({&hello, 1}, tools, options, [](Json&) {});
  request["schema"] = schema;
  MOEND_ASSIGN(const Json reply, Apply(which, std::move(request)));
  out.format = ReadFormat(reply);
  return out;
}

}  // namespace moend
