#include "moend/model/jinja.h"

#ifdef MOEND_HAVE_LLAMA_CHAT
#include <jinja/caps.h>
#include <jinja/lexer.h>
#include <jinja/parser.h>
#include <jinja/runtime.h>
#endif

#include <algorithm>
#include <exception>
#include <new>
#include <string_view>

namespace moend {

#ifdef MOEND_HAVE_LLAMA_CHAT
namespace {

using Json = nlohmann::ordered_json;

jinja::value ToValue(const Json& j) {
  if (j.is_boolean()) return jinja::mk_val<jinja::value_bool>(j.get<bool>());
  if (j.is_number_integer()) return jinja::mk_val<jinja::value_int>(j.get<int64_t>());
  if (j.is_number()) return jinja::mk_val<jinja::value_float>(j.get<double>());
  if (j.is_string()) return jinja::mk_val<jinja::value_string>(j.get_ref<const std::string&>());
  if (j.is_array()) {
    auto array = jinja::mk_val<jinja::value_array>();
    for (const Json& item : j) array->push_back(ToValue(item));
    return array;
  }
  if (j.is_object()) {
    auto object = jinja::mk_val<jinja::value_object>();
    for (const auto& [key, item] : j.items()) object->insert(key, ToValue(item));
    return object;
  }
  return jinja::mk_val<jinja::value_none>();
}

// The engine's messages are several lines: where it was, the source around it, and last the cause.
std::string Cause(std::string_view text) {
  std::string where;
  if (const auto at = text.find("line "); at != std::string_view::npos)
    where = text.substr(at, text.find(" in source", at) - at);
  constexpr std::string_view kLast = "Error: ";
  if (const auto at = text.rfind(kLast); at != std::string_view::npos) text.remove_prefix(at + kLast.size());
  while (!text.empty() && text.front() == '\n') text.remove_prefix(1);
  std::string out(text.substr(0, text.find('\n')));
  constexpr std::size_t kLongest = 200;
  if (out.size() > kLongest) out.resize(kLongest);
  std::replace_if(
      out.begin(), out.end(), [](unsigned char c) { return c < 0x20 || c >= 0x7f; }, '?');
  return where.empty() || where.size() > 60 ? out : out + " (" + where + ")";
}

// A template that ignores a system message, or refuses it, gets its text in front of the first user's.
void MergeSystem(Json& messages) {
  if (messages.empty() || messages[0].value("role", "") != "system") return;
  if (messages.size() > 1) {
    messages[1]["content"] = messages[0].value("content", "") + "\n\n" + messages[1].value("content", "");
  }
  messages.erase(0);
}

void WrapContents(Json& messages) {
  for (Json& m : messages)
    if (m.contains("content") && m["content"].is_string())
      m["content"] = Json::array({{{"type", "text"}, {"text", m["content"]}}});
}

}  // namespace

bool HasJinja() {
  return true;
}

JinjaResult JinjaFailure(const std::string& what) {
  constexpr std::string_view kRaised = "Jinja Exception: ";
  std::string cause = Cause(what);
  if (cause.find("bad_alloc") != std::string::npos)
    throw std::bad_alloc();  // the engine wraps what it catches
  if (const auto at = cause.find(kRaised); at != std::string::npos)
    return {JinjaResult::kRefused, cause.substr(at + kRaised.size())};
  return {JinjaResult::kFailed, cause.empty() ? "it ended early" : cause};
}

struct JinjaTemplate::Impl {
  jinja::program program;
  std::string source, error;
  bool system_role = true, text_content = true;
};

JinjaTemplate::JinjaTemplate(const std::string& source) : impl_(std::make_unique<Impl>()) {
  try {
    jinja::lexer lexer;
    const jinja::lexer_result tokens = lexer.tokenize(source);
    impl_->program = jinja::parse_from_tokens(tokens);
    impl_->source = tokens.source;
    const jinja::caps caps = jinja::caps_get(impl_->program);
    impl_->system_role = caps.supports_system_role;
    impl_->text_content = caps.supports_string_content;
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& e) {
    impl_->error = Cause(e.what());
    if (impl_->error.empty()) impl_->error = "it is not Jinja";
  }
}

JinjaResult JinjaTemplate::Render(Json variables) const {
  if (!impl_->error.empty()) return {JinjaResult::kFailed, impl_->error};
  try {
    if (auto messages = variables.find("messages"); messages != variables.end()) {
      if (!impl_->system_role) MergeSystem(*messages);
      if (!impl_->text_content) WrapContents(*messages);
    }
    jinja::context context(impl_->source);
    for (const auto& [name, value] : variables.items()) context.set_val(name, ToValue(value));
    // Templates have several names for these.
    if (const auto effort = variables.find("reasoning_effort");
        effort != variables.end() && effort->is_string())
      jinja::caps_apply_reasoning_effort(context, effort->get<std::string>());
    if (const auto keep = variables.find("preserve_reasoning"); keep != variables.end() && keep->is_boolean())
      jinja::caps_apply_preserve_reasoning(context, keep->get<bool>());
    jinja::runtime runtime(context);
    const jinja::value result = runtime.execute(impl_->program);
    return {JinjaResult::kText, jinja::runtime::gather_string_parts(result)->as_string().str()};
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& e) {
    return JinjaFailure(e.what());
  }
}

#else

bool HasJinja() {
  return false;
}
JinjaResult JinjaFailure(const std::string& what) {
  return {JinjaResult::kFailed, what};
}
struct JinjaTemplate::Impl {};
JinjaTemplate::JinjaTemplate(const std::string&) {}
JinjaResult JinjaTemplate::Render(nlohmann::ordered_json) const {
  return {JinjaResult::kFailed, "this build of moend has no Jinja engine"};
}

#endif

JinjaTemplate::~JinjaTemplate() = default;

}  // namespace moend
