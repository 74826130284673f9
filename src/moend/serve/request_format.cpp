// Fields that say what the answer must look like, what the model may do, and whether it thinks.
#include <algorithm>

#include "moend/serve/request_fields.h"

namespace moend::serve {
namespace {

using Done = ApiResult<void>;

// Several fields say the same in other words; two of them in one request would say different things.
Done SetForm(const char* name, const Reading& to, std::string schema, std::string grammar) {
  GenerationRequest& r = to.request;
  if (!r.json_schema.empty() || !r.grammar.empty())
    return Bad(name,
               fmt::format("{} stands beside another field that says what the answer must look like", name),
               "invalid_value");
  r.json_schema = std::move(schema);
  r.grammar = std::move(grammar);
  if (!r.grammar.empty() && !r.tools.empty() && r.tool_choice != ToolChoice::kNone)
    return Bad(name, fmt::format("{} cannot stand beside tools, whose calls have a form of their own", name),
               "invalid_value");
  return {};
}

Done SetSchema(const std::string& name, const Reading& to, const Json& schema) {
  if (!schema.is_object())
    return Bad(name, fmt::format("{} must be a JSON schema, an object", name), "invalid_type");
  return SetForm(name.c_str(), to, Dump(schema), {});
}

// A text as a literal of a grammar.
std::string Literal(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '\n') {
      out += "\\n";
    } else if (c == '\r') {
      out += "\\r";
    } else {
      if (c == '"' || c == '\\') out += '\\';
      out += c;
    }
  }
  return out + '"';
}

Done CheckTool(const Json& tool, const std::string& path) {
  if (!tool.is_object()) return Bad(path, path + " must be an object", "invalid_type");
  const Fields f(tool, path + ".");
  MOEND_API_ASSIGN(const auto type, f.String("type"));
  if (type.value_or("function") != "function")
    return Bad(f.Path("type"), f.Path("type") + " may only be function", "unsupported");
  const Json* function = f.Find("function");
  if (!function || !function->is_object())
    return Bad(f.Path("function"), f.Path("function") + " must be an object",
               function ? "invalid_type" : "missing");
  const Fields of(*function, f.Path("function") + ".");
  constexpr std::size_t kLongestName = 256;
  MOEND_API_ASSIGN(const auto named, of.String("name"));
  if (!named) return Bad(of.Path("name"), of.Path("name") + " is missing", "missing");
  if (named->empty() || named->size() > kLongestName)
    return Bad(of.Path("name"), fmt::format("{} must have 1 to {} bytes", of.Path("name"), kLongestName),
               "invalid_value");
  MOEND_API_ASSIGN([[maybe_unused]] const auto text, of.String("description"));
  if (const Json* p = of.Find("parameters"); p && !p->is_object())
    return Bad(of.Path("parameters"), of.Path("parameters") + " must be a JSON schema, an object",
               "invalid_type");
  return {};
}

const std::string& NameOf(const Json& tool) {
  return tool.at("function").at("name").get_ref<const std::string&>();
}

}  // namespace

Done ReadTools(const char* name, const Reading& to) {
  const Json* tools = to.fields.Find(name);
  if (!tools) return {};
  if (!tools->is_array()) return Bad(name, "tools must be a list", "invalid_type");
  if (std::ssize(*tools) > to.limits.tools)
    return Bad(name, fmt::format("at most {} tools are allowed", to.limits.tools), "too_many");
  for (std::size_t i = 0; i < tools->size(); ++i) {
    const std::string path = fmt::format("tools[{}]", i);
    if (auto ok = CheckTool((*tools)[i], path); !ok) return ok;
    for (std::size_t j = 0; j < i; ++j)
      if (NameOf((*tools)[j]) == NameOf((*tools)[i]))
        return Bad(path + ".function.name", fmt::format("{} has the name of tools[{}]", path, j),
                   "invalid_value");
  }
  to.request.tools = *tools;
  return {};
}

Done ReadToolChoice(const char* name, const Reading& to) {
  const Json* choice = to.fields.Find(name);
  if (!choice) return {};
  GenerationRequest& r = to.request;
  if (*choice == "none") {
    r.tool_choice = ToolChoice::kNone;
    return {};
  }
  if (*choice == "auto") return {};
  const auto function = choice->is_object() ? choice->find("function") : choice->end();
  const bool named = choice->is_object() && choice->value("type", Json()) == "function" &&
                     function != choice->end() && function->is_object() && function->contains("name");
  if (*choice != "required" && !named)
    return Bad(
        name,
        R"(tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}})",
        "invalid_value");
  if (r.tools.empty())
    return Bad(name, "tool_choice asks for a call, and there are no tools", "invalid_value");
  r.tool_choice = ToolChoice::kRequired;
  if (!named) return {};
  const Json wanted = function->at("name");
  const auto found =
      std::ranges::find_if(r.tools, [&](const Json& tool) { return Json(NameOf(tool)) == wanted; });
  if (found == r.tools.end())
    return Bad(name, fmt::format("tool_choice names {}, which is not among the tools", Dump(wanted)),
               "invalid_value");
  r.tools = Json::array({Json(*found)});
  r.parallel_tool_calls = false;  // this one, once; unless the request says otherwise
  return {};
}

Done ReadParallelToolCalls(const char* name, const Reading& to) {
  MOEND_API_ASSIGN(const auto on, to.fields.Boolean(name));
  if (on) to.request.parallel_tool_calls = on;
  return {};
}

Done ReadResponseFormat(const char* name, const Reading& to) {
  const Json* format = to.fields.Find(name);
  if (!format) return {};
  if (!format->is_object()) return Bad(name, "response_format must be an object", "invalid_type");
  const Json type = format->value("type", Json());
  if (type == "text") return {};
  if (type == "json_object") {  // llama-server takes a schema here, too
    const Json schema = format->value("schema", Json());
    return SetSchema("response_format.schema", to, schema.is_null() ? Json{{"type", "object"}} : schema);
  }
  if (type == "json_schema") {
    const Json inner = format->value("json_schema", Json());
    if (!inner.is_object() || !inner.contains("schema"))
      return Bad("response_format.json_schema",
                 R"(response_format.json_schema must be {"name": ..., "schema": {...}})", "invalid_type");
    return SetSchema("response_format.json_schema.schema", to, inner.at("schema"));
  }
  return Bad(name, R"(response_format.type must be "text", "json_object" or "json_schema")", "unsupported");
}

Done ReadJsonSchema(const char* name, const Reading& to) {
  const Json* schema = to.fields.Find(name);
  if (!schema || (schema->is_array() && schema->empty())) return {};
  if (!schema->is_string()) return SetSchema(name, to, *schema);
  auto parsed = ParseBody(schema->get_ref<const std::string&>(), to.limits);  // vLLM's may be a text
  return SetSchema(name, to, parsed ? std::move(*parsed) : Json());
}

Done ReadGrammar(const char* name, const Reading& to) {
  MOEND_API_ASSIGN(auto grammar, to.fields.String(name));
  if (!grammar || grammar->empty()) return {};
  return SetForm(name, to, {}, std::move(*grammar));
}

Done ReadGuidedChoice(const char* name, const Reading& to) {
  const Json* choices = to.fields.Find(name);
  if (!choices || (choices->is_array() && choices->empty())) return {};
  if (!choices->is_array() || !std::ranges::all_of(*choices, [](const Json& c) { return c.is_string(); }))
    return Bad(name, fmt::format("{} must be a list of texts", name), "invalid_type");
  std::string grammar = "root ::= ";
  for (std::size_t i = 0; i < choices->size(); ++i) {
    const auto& text = (*choices)[i].get_ref<const std::string&>();
    if (text.empty()) return Bad(name, fmt::format("{}[{}] is empty", name, i), "invalid_value");
    grammar += (i > 0 ? " | " : "") + Literal(text);
  }
  return SetForm(name, to, {}, std::move(grammar));
}

Done ReadTemplateVariables(const char* name, const Reading& to) {
  const Json* variables = to.fields.Find(name);
  if (!variables) return {};
  if (!variables->is_object()) return Bad(name, "chat_template_kwargs must be an object", "invalid_type");
  to.request.template_variables.update(*variables);
  return {};
}

// "none" is OpenAI's for not at all.
Done ReadReasoningEffort(const char* name, const Reading& to) {
  MOEND_API_ASSIGN(const auto effort, to.fields.String(name));
  if (!effort) return {};
  constexpr std::string_view kEfforts[] = {"none", "minimal", "low", "medium", "high", "xhigh", "max"};
  if (std::ranges::find(kEfforts, *effort) == std::end(kEfforts))
    return Bad(name, "reasoning_effort must be none, minimal, low, medium, high, xhigh or max",
               "invalid_value");
  to.request.template_variables["enable_thinking"] = *effort != "none";
  if (*effort != "none") to.request.template_variables["reasoning_effort"] = *effort;
  return {};
}

Done ReadEnableThinking(const char* name, const Reading& to) {
  MOEND_API_ASSIGN(const auto on, to.fields.Boolean(name));
  if (on) to.request.template_variables["enable_thinking"] = *on;
  return {};
}

Done ReadReasoningFormat(const char* name, const Reading& to) {
  MOEND_API_ASSIGN(const auto format, to.fields.String(name));
  if (!format) return {};
  if (*format != "none" && *format != "auto" && *format != "deepseek")
    return Bad(name, "reasoning_format must be none, auto or deepseek", "unsupported");
  to.request.split_reasoning = *format != "none";
  return {};
}

}  // namespace moend::serve
