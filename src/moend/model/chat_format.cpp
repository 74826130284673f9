#include "moend/model/chat_format.h"

#ifdef MOEND_HAVE_LLAMA_CHAT
#include <chat.h>
#include <json-schema-to-grammar.h>
#endif

#include <algorithm>
#include <exception>
#include <new>
#include <stdexcept>

#include "moend/model/big_stack.h"

namespace moend {

using Json = nlohmann::ordered_json;

std::string StrictJson(const std::string& grammar) {
  // Any value's strings may hold line ends, any escape may be half of a character, and "\ " is taken for one;
  // a key that is not among the named ones may begin with a backslash.
  constexpr std::string_view kControls = "\\\\\\x00-\\x1F\\x7F";
  constexpr std::string_view kAnyHex = "\"u\" [0-9a-fA-F]{4}";
  constexpr std::string_view kWholeCharacter =
      "\"u\" ([0-9a-cA-Ce-fE-F] [0-9a-fA-F]{3} | [dD] [0-7] [0-9a-fA-F]{2})";
  std::string out;
  out.reserve(grammar.size() + 256);
  std::size_t at = 0;
  const auto copy_until = [&](char end) {  // from behind the opening character
    while (at < grammar.size()) {
      const char c = grammar[at++];
      out += c;
      if (c == '\\' && at < grammar.size()) {
        out += grammar[at++];
      } else if (c == end) {
        return;
      }
    }
  };
  while (at < grammar.size()) {
    if (grammar.compare(at, kAnyHex.size(), kAnyHex) == 0) {
      out += kWholeCharacter;
      at += kAnyHex.size();
    } else if (grammar[at] == '"') {
      out += grammar[at++];
      copy_until('"');
    } else if (grammar[at] == '[') {
      const auto begin = out.size();
      out += grammar[at++];
      copy_until(']');
      const std::string set = out.substr(begin);
      if (set == R"(["\\/ bfnrt])") {
        out.replace(begin, set.size(), R"(["\\/bfnrt])");
      } else if (set.starts_with("[^\"")) {
        out.insert(begin + 2, kControls);
      }
    } else {
      out += grammar[at++];
    }
  }
  return out;
}

#ifdef MOEND_HAVE_LLAMA_CHAT
namespace {

// Where the rule `name` of a grammar is, its line end excluded; npos and 0 where there is none.
std::pair<std::size_t, std::size_t> Rule(const std::string& grammar, std::string_view name) {
  const std::string head = fmt::format("{} ::= ", name);
  auto at = grammar.starts_with(head) ? 0 : grammar.find("\n" + head);
  if (at == std::string::npos) return {at, 0};
  at += at > 0;
  return {at, std::min(grammar.find('\n', at), grammar.size()) - at};
}

// The rule of a grammar that must call lets text go before the call, without end ("until-12? tool-calls"):
// models that would rather not call write on for ever.
std::string CallAtOnce(std::string grammar) {
  const auto [begin, size] = Rule(grammar, "root");
  if (begin == std::string::npos) return grammar;
  std::string rule = grammar.substr(begin, size);
  const auto call = rule.find("? tool-call");
  const auto text = call == std::string::npos ? call : rule.rfind("until-", call);
  if (text == std::string::npos || rule.find(' ', text) != call + 1) return grammar;
  return grammar.replace(begin, size, rule.erase(text, call + 2 - text));
}

// Where calls stand in marks of their own, one after the other are let through even where one is to be made:
// the rule is "(tool-call space)+", or "(tool-call? space)+" where none need be.
std::string CallOnce(std::string grammar) {
  const auto [begin, size] = Rule(grammar, "tool-calls");
  if (begin == std::string::npos) return grammar;
  for (const std::string call : {"tool-call space", "tool-call? space"})
    if (grammar.substr(begin, size) == "tool-calls ::= (" + call + ")+")
      return grammar.replace(begin, size, "tool-calls ::= " + call);
  return grammar;
}

std::vector<common_chat_msg> Messages(const Json& list) {
  std::vector<common_chat_msg> out;
  for (const Json& m : list) {
    common_chat_msg message;
    message.role = m.value("role", "");
    message.content = m.value("content", "");
    message.reasoning_content = m.value("reasoning_content", "");
    message.tool_call_id = m.value("tool_call_id", "");
    message.tool_name = m.value("name", "");
    if (const auto calls = m.find("tool_calls"); calls != m.end())
      for (const Json& c : *calls)
        message.tool_calls.push_back({c.value("name", ""), c.value("arguments", ""), c.value("id", "")});
    out.push_back(std::move(message));
  }
  return out;
}

std::vector<common_chat_tool> Tools(const Json& list) {
  std::vector<common_chat_tool> out;
  for (const Json& tool : list) {
    const Json& f = tool.at("function");
    const auto parameters = f.find("parameters");
    out.push_back({f.value("name", ""), f.value("description", ""),
                   parameters != f.end() && parameters->is_object() ? parameters->dump() : "{}"});
  }
  return out;
}

void SetVariables(common_chat_templates_inputs& in, const Json& variables) {
  in.chat_template_kwargs.clear();
  for (const auto& [name, value] : variables.items()) {
    in.chat_template_kwargs[name] = value.dump();
    if (name == "enable_thinking" && value.is_boolean()) in.enable_thinking = value.get<bool>();
  }
}

// The prompt of a chat as it is shown, otherwise as `in`.
std::string Shown(const common_chat_templates* templates, common_chat_templates_inputs& in,
                  const Json& shown) {
  in.messages = Messages(shown.at("messages"));
  in.tools = Tools(shown.at("tools"));
  in.tool_choice = COMMON_CHAT_TOOL_CHOICE_NONE;  // no need of a grammar
  SetVariables(in, shown.at("variables"));
  return common_chat_templates_apply(templates, in).prompt;
}

}  // namespace

bool HasChatFormats() {
  return true;
}

struct ChatFormat::Impl {
  common_chat_templates_ptr templates;
};

ChatFormat::ChatFormat(const std::string& source, const std::string& bos, const std::string& eos)
    : impl_(std::make_unique<Impl>()) {
  impl_->templates = common_chat_templates_init(nullptr, source, bos, eos);
}
ChatFormat::~ChatFormat() = default;

Json ChatFormat::Apply(const Json& request) const {
  const common_chat_templates* templates = impl_->templates.get();
  auto caps = common_chat_templates_get_caps(templates);
  common_chat_templates_inputs in;
  in.messages = Messages(request.at("messages"));
  in.tools = Tools(request.at("tools"));
  in.tool_choice = common_chat_tool_choice_parse_oaicompat(request.at("tool_choice").get<std::string>());
  in.parallel_tool_calls = request.at("parallel").is_boolean() ? request.at("parallel").get<bool>()
                                                               : caps["supports_parallel_tool_calls"];
  const Json& schema = request.at("schema");
  if (schema.is_object()) in.json_schema = schema.dump();
  in.add_generation_prompt = request.at("add_generation_prompt").get<bool>();
  in.reasoning_format =
      request.at("split").get<bool>() ? COMMON_REASONING_FORMAT_AUTO : COMMON_REASONING_FORMAT_NONE;
  SetVariables(in, request.at("variables"));
  common_chat_params p = common_chat_templates_apply(templates, in);

  Json out = Json::object();
  out["calls"] = true;
  if (!in.tools.empty() && in.tool_choice != COMMON_CHAT_TOOL_CHOICE_NONE && p.grammar.empty()) {
    // Some formats need no grammar while the model may choose; without one when it must call, there is no
    // format.
    auto must = in;
    must.tool_choice = COMMON_CHAT_TOOL_CHOICE_REQUIRED;
    out["calls"] = !common_chat_templates_apply(templates, must).grammar.empty();
  }
  if (const auto shown = request.find("shown"); shown != request.end()) {
    // Few formats rewrite messages; where this one does not, the template alone is enough, which is sooner
    // done.
    in.force_pure_content = true;
    const bool rewrites = common_chat_templates_apply(templates, in).prompt != p.prompt;
    in.force_pure_content = !rewrites;
    p.prompt = Shown(templates, in, *shown);
  }
  out["prompt"] = std::move(p.prompt);
  out["generation_prompt"] = std::move(p.generation_prompt);
  out["preserved"] = std::move(p.preserved_tokens);
  out["stops"] = std::move(p.additional_stops);
  out["thinking"] = p.supports_thinking ? p.thinking_start_tag : std::string();
  out["kind"] = static_cast<int>(p.format);
  out["parser"] = std::move(p.parser);
  out["lazy"] = p.grammar_lazy;
  out["begun"] = !p.grammar_lazy;
  if (in.tool_choice == COMMON_CHAT_TOOL_CHOICE_REQUIRED) p.grammar = CallAtOnce(p.grammar);
  if (!in.parallel_tool_calls) p.grammar = CallOnce(p.grammar);
  out["grammar"] = StrictJson(p.grammar);
  if (schema.is_object() && p.grammar.empty()) {  // a format that knows none: then there is nothing beside it
    out["grammar"] = SchemaToGrammar(in.json_schema);
    out["begun"] = out["lazy"] = false;
    out["parser"] = "";
  }
  Json& triggers = out["triggers"] = Json::array();
  for (const auto& t : p.grammar_triggers) {
    std::string text = t.value;
    if (t.type == COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN) continue;  // no format has any
    if (t.type == COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL) text = "^" + text + "$";
    triggers.push_back({{"text", text}, {"regex", t.type != COMMON_GRAMMAR_TRIGGER_TYPE_WORD}});
  }
  return out;
}

std::string ChatFormat::Prompt(const Json& shown) const {
  common_chat_templates_inputs in;
  in.add_generation_prompt = false;
  in.force_pure_content = true;
  return Shown(impl_->templates.get(), in, shown);
}

std::string SchemaToGrammar(const std::string& schema) {
  return StrictJson(json_schema_to_grammar(common_json::parse(schema), /*force_gbnf=*/true));
}

struct AnswerParser::Impl {
  common_chat_parser_params params;
};

AnswerParser::AnswerParser(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
AnswerParser::~AnswerParser() = default;

Expected<std::unique_ptr<AnswerParser>> AnswerParser::Make(const AnswerFormat& format) {
  auto impl = std::make_unique<Impl>();
  try {
    impl->params.format = static_cast<common_chat_format>(format.kind);
    impl->params.generation_prompt = format.generation_prompt;
    impl->params.reasoning_format = COMMON_REASONING_FORMAT_AUTO;
    impl->params.parser.load(format.parser);
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& e) {
    return Fail(ErrorCode::kInternal, "the format of the model's answers cannot be read: {}", e.what());
  }
  return std::unique_ptr<AnswerParser>(new AnswerParser(std::move(impl)));
}

Expected<Answer> AnswerParser::Parse(std::string_view text, bool partial) const {
  // The parser recurses with every bracket. Texts have unbalanced ones, too, so that this counts some too
  // many.
  constexpr int kShallow = 24, kDeepest = 1000;
  constexpr int64_t kStack = int64_t{64} << 20;
  int depth = 0, deepest = 0;
  for (const char c : text) {
    if (c == '{' || c == '[') deepest = std::max(deepest, ++depth);
    if ((c == '}' || c == ']') && depth > 0) --depth;
  }
  if (deepest > kDeepest)
    return Fail(ErrorCode::kTooLong, "the answer has more than {} brackets in each other", kDeepest);

  Answer out;
  std::string error;
  bool no_memory = false;
  const auto parse = [&] {
    try {
      common_chat_msg m = common_chat_parse(std::string(text), partial, impl_->params);
      out.reasoning = std::move(m.reasoning_content);
      out.content = std::move(m.content);
      for (auto& call : m.tool_calls)
        out.tool_calls.push_back({std::move(call.id), std::move(call.name), std::move(call.arguments)});
    } catch (const std::bad_alloc&) {
      no_memory = true;
    } catch (const std::exception& e) {
      error = e.what();
      if (error.empty()) error = "it cannot be read";
    }
  };
  if (deepest > kShallow) {
    MOEND_TRY(RunWithStack(kStack, parse));
  } else {
    parse();
  }
  if (no_memory) return Fail(ErrorCode::kOutOfMemory, "no memory to read an answer of {} bytes", text.size());
  if (!error.empty()) return Fail(ErrorCode::kInvalidArgument, "{}", error);
  return out;
}

#else

bool HasChatFormats() {
  return false;
}
struct ChatFormat::Impl {};
ChatFormat::ChatFormat(const std::string&, const std::string&, const std::string&) {}
ChatFormat::~ChatFormat() = default;
Json ChatFormat::Apply(const Json&) const {
  throw std::runtime_error("this build of moend has no formats of tool calls");
}
std::string ChatFormat::Prompt(const Json&) const {
  throw std::runtime_error("this build of moend has no formats of tool calls");
}
std::string SchemaToGrammar(const std::string&) {
  throw std::runtime_error("this build of moend has no grammars of JSON schemas");
}
struct AnswerParser::Impl {};
AnswerParser::AnswerParser(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
AnswerParser::~AnswerParser() = default;
Expected<std::unique_ptr<AnswerParser>> AnswerParser::Make(const AnswerFormat&) {
  return Fail(ErrorCode::kInternal, "this build of moend has no formats of answers");
}
Expected<Answer> AnswerParser::Parse(std::string_view, bool) const {
  return Fail(ErrorCode::kInternal, "this build of moend has no formats of answers");
}

#endif

}  // namespace moend
