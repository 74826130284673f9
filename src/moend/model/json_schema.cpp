#include "moend/model/json_schema.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace moend {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kDeepest = 64;
constexpr int kMostRepetitions = 2000;  // libllama takes more for any number
constexpr std::array<std::string_view, 21> kUnknownWords = {"not",
                                                            "if",
                                                            "then",
                                                            "else",
                                                            "contains",
                                                            "minContains",
                                                            "maxContains",
                                                            "multipleOf",
                                                            "patternProperties",
                                                            "propertyNames",
                                                            "uniqueItems",
                                                            "minProperties",
                                                            "maxProperties",
                                                            "$dynamicRef",
                                                            "dependentRequired",
                                                            "dependencies",
                                                            "$recursiveRef",
                                                            "dependentSchemas",
                                                            "additionalItems",
                                                            "unevaluatedItems",
                                                            "unevaluatedProperties"};
// What says nothing about values, and may stand beside anything.
constexpr std::array<std::string_view, 17> kNotes = {
    "title",       "description", "default",  "examples",  "example", "$schema", "$id", "$comment", "$defs",
    "definitions", "deprecated",  "readOnly", "writeOnly", "$anchor", "strict",  "id",  "nullable"};
constexpr std::array<std::string_view, 4> kBounds = {"minimum", "maximum", "exclusiveMinimum",
                                                     "exclusiveMaximum"};

template <std::size_t n>
bool Has(const std::array<std::string_view, n>& list, std::string_view name) {
  return std::ranges::find(list, name) != list.end();
}

// A pattern (ECMA 262) in the converter's words, and such that no string that it takes is broken JSON;
// nothing where that is not possible.
std::optional<std::string> StrictPattern(std::string_view pattern) {
  constexpr std::string_view kNone = R"("\\\x00-\x1F\x7F)";  // what a string has to escape
  if (pattern.size() < 2 || pattern.front() != '^' || !pattern.ends_with('$')) return std::nullopt;
  std::string out;
  const auto forbidden = [](unsigned char c) { return c < 0x20 || c == 0x7f || c == '"' || c == '\\'; };
  for (std::size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c == '\\') {
      if (++i == pattern.size()) return std::nullopt;
      const char e = pattern[i];
      if (e == 'd') {
        out += "[0-9]";
      } else if (e == 'w') {
        out += "[a-zA-Z0-9_]";
      } else if (e == 's') {
        out += "[ ]";
      } else if (e == 'S') {
        out += fmt::format("[^ {}]", kNone);
      } else if (e == 'D') {
        out += fmt::format("[^0-9{}]", kNone);
      } else if (e == 'W') {
        out += fmt::format("[^a-zA-Z0-9_{}]", kNone);
      } else if (std::string_view("^$.[]()|{}*+?").find(e) != std::string_view::npos) {
        out += c;
        out += e;
      } else if (std::string_view("/-_:@#%&=!~,;<>'` ").find(e) != std::string_view::npos) {
        out += e;
      } else {
        return std::nullopt;
      }
    } else if ((c == '^' && i > 0) || (c == '$' && i + 1 < pattern.size())) {
      return std::nullopt;
    } else if (c == '(' && pattern.substr(i + 1).starts_with("?") &&
               !pattern.substr(i + 1).starts_with("?:")) {
      return std::nullopt;  // looks around
    } else if (c == '(' && pattern.substr(i + 1).starts_with("?:")) {
      out += "(?:";
      i += 2;
    } else if (c == '*' || c == '+' || c == '?' || c == '{') {
      const auto end = c == '{' ? pattern.find('}', i) : i;
      if (end == std::string_view::npos ||
          (c == '{' &&
           pattern.substr(i + 1, end - i - 1).find_first_not_of("0123456789,") != std::string_view::npos))
        return std::nullopt;
      out += pattern.substr(i, end - i + 1);
      i = end;
      if (i + 1 < pattern.size() && std::string_view("*+?{").find(pattern[i + 1]) != std::string_view::npos)
        return std::nullopt;  // lazy or possessive
    } else if (c == '.') {
      out += fmt::format("[^{}]", kNone);
    } else if (c == '[') {
      out += '[';
      const bool negated = i + 1 < pattern.size() && pattern[i + 1] == '^';
      if (negated) {
        out += "^";
        out += kNone;
        ++i;
      }
      bool closed = false, range = false;
      unsigned char last = 0;
      while (++i < pattern.size() && !closed) {
        auto m = static_cast<unsigned char>(pattern[i]);
        if (m == ']') {
          closed = true;
          break;
        }
        if (m == '\\') {
          if (++i == pattern.size()) return std::nullopt;
          const char e = pattern[i];
          if (e == 'd' || e == 'w') {
            if (range) return std::nullopt;
            out += e == 'd' ? "0-9" : "a-zA-Z0-9_";
            last = 0;
            continue;
          }
          if (std::string_view("[]").find(e) != std::string_view::npos) {
            out += '\\';
          } else if (std::string_view("^$.()|{}*+?/_:@ ").find(e) == std::string_view::npos) {
            return std::nullopt;
          }
          m = static_cast<unsigned char>(e);
        }
        if (m == '-' && !range && last != 0 && i + 1 < pattern.size() && pattern[i + 1] != ']') {
          range = true;
          out += '-';
          continue;
        }
        if (!negated && (forbidden(m) ||
                         (range && (m < last || (last <= '"' && m >= '"') || (last <= '\\' && m >= '\\')))))
          return std::nullopt;
        out += static_cast<char>(m);
        last = range ? 0 : m;
        range = false;
      }
      if (!closed) return std::nullopt;
      out += ']';
    } else if (forbidden(static_cast<unsigned char>(c))) {
      return std::nullopt;
    } else {
      out += c;
    }
  }
  return out;
}

class Visitor {
 public:
  Visitor(const Json& root, bool relaxed) : root_(root), relaxed_(relaxed) {}

  Expected<void> Visit(Json& node, const std::string& path, int depth) {
    if (depth > kDeepest)
      return Fail(ErrorCode::kTooLong, "the schema nests more than {} levels deep", kDeepest);
    if (node.is_boolean()) {
      if (!node.get<bool>()) MOEND_TRY(Refuse(path, "false"));
      node = Json::object();
    }
    if (!node.is_object()) return Fail(ErrorCode::kInvalidArgument, "the schema's {} is no object", path);
    for (const std::string_view name : kUnknownWords)
      if (const auto it = node.find(name); it != node.end()) {
        if (!IsOff(name, *it)) MOEND_TRY(Refuse(path, name));
        node.erase(it);
      }
    if (const auto all = node.find("allOf"); all != node.end()) {
      if (!all->is_array() || all->size() != 1) {
        MOEND_TRY(Refuse(path, "allOf"));
      } else {  // how generators put a description beside a reference
        Json only = (*all)[0];
        node.erase(all);
        MOEND_TRY(Alone(node, path, "allOf"));
        if (only.is_object()) {
          for (const auto& [name, value] : node.items())
            if (!only.contains(name)) only[name] = value;
          node = std::move(only);
        }
      }
    }
    if (const auto ref = node.find("$ref"); ref != node.end() && !Resolves(*ref)) {
      MOEND_TRY(Refuse(path, ref->is_string() ? "$ref " + ref->get<std::string>() : "$ref"));
      node.erase(ref);
    }
    for (const char* alone : {"$ref", "anyOf", "oneOf"})
      if (node.contains(alone)) MOEND_TRY(Alone(node, path, alone));
    MOEND_TRY(Values(node, path));
    MOEND_TRY(Object(node, path));
    MOEND_TRY(Array(node, path));
    for (const char* name : {"properties", "$defs", "definitions"})
      if (const auto it = node.find(name); it != node.end() && it->is_object())
        for (auto& [key, value] : it->items())
          MOEND_TRY(Visit(value, fmt::format("{}/{}/{}", path, name, key), depth + 1));
    for (const char* name : {"anyOf", "oneOf", "prefixItems", "items"})
      if (const auto it = node.find(name); it != node.end() && it->is_array())
        for (std::size_t i = 0; i < it->size(); ++i)
          MOEND_TRY(Visit((*it)[i], fmt::format("{}/{}/{}", path, name, i), depth + 1));
    if (const auto it = node.find("items"); it != node.end() && !it->is_array())
      MOEND_TRY(Visit(*it, path + "/items", depth + 1));
    if (const auto it = node.find("additionalProperties"); it != node.end() && it->is_object())
      MOEND_TRY(Visit(*it, path + "/additionalProperties", depth + 1));
    return {};
  }

 private:
  Expected<void> Refuse(const std::string& path, std::string_view what) const {
    if (relaxed_) return {};
    return Fail(ErrorCode::kInvalidArgument, "the schema's {} has \"{}\", which is not supported", path,
                what);
  }

  // Into the schema itself, and not to all of it.
  bool Resolves(const Json& ref) const {
    if (!ref.is_string() || !ref.get_ref<const std::string&>().starts_with("#/")) return false;
    std::string_view rest = std::string_view(ref.get_ref<const std::string&>()).substr(1);
    const Json* at = &root_;
    while (!rest.empty()) {
      rest.remove_prefix(1);
      const std::string name(rest.substr(0, rest.find('/')));
      rest.remove_prefix(name.size());
      const auto next = at->is_object() ? at->find(name) : at->end();
      if (next == at->end()) return false;
      at = &*next;
    }
    return true;
  }

  static bool IsOff(std::string_view name, const Json& value) {
    if (name == "uniqueItems") return value == false;
    if (name.starts_with("unevaluated") || name == "additionalItems") return value.is_boolean();
    return (name == "minProperties" || name == "minContains") && value == 0;
  }

  // The converter looks at `name` only.
  Expected<void> Alone(Json& node, const std::string& path, std::string_view name) const {
    for (const auto& [other, value] : node.items())
      if (other != name && !Has(kNotes, other))
        MOEND_TRY(Refuse(path, fmt::format("{} beside {}", other, name)));
    return {};
  }

  // Numbers and strings.
  Expected<void> Values(Json& node, const std::string& path) const {
    const auto type = node.find("type");
    const bool integer = type != node.end() && *type == "integer";
    for (const std::string_view bound : kBounds)
      if (const auto it = node.find(bound); it != node.end()) {
        if (!integer) MOEND_TRY(Refuse(path, fmt::format("{} of a number that is no integer", bound)));
        // Beyond these the converter's own numbers end.
        if (!integer || !it->is_number() || std::abs(it->get<double>()) > 1e15) {
          if (integer) MOEND_TRY(Refuse(path, fmt::format("{} {}", bound, it->dump())));
          node.erase(it);
        }
      }
    if (const auto it = node.find("pattern"); it != node.end()) {
      const auto strict = it->is_string() ? StrictPattern(it->get_ref<const std::string&>()) : std::nullopt;
      if (strict) {
        for (const char* other : {"minLength", "maxLength"})
          if (node.contains(other)) MOEND_TRY(Refuse(path, fmt::format("{} beside pattern", other)));
        *it = *strict;
      } else {
        MOEND_TRY(
            Refuse(path, fmt::format("pattern {}", it->dump(-1, ' ', true, Json::error_handler_t::replace))));
        node.erase(it);
      }
    }
    for (const char* name : {"minLength", "maxLength", "minItems", "maxItems"})
      if (const auto it = node.find(name);
          it != node.end() && (!it->is_number_unsigned() || *it > kMostRepetitions)) {
        MOEND_TRY(Refuse(
            path, fmt::format("{} {}", name, it->dump(-1, ' ', true, Json::error_handler_t::replace))));
        node.erase(it);
      }
    return {};
  }

  Expected<void> Object(Json& node, const std::string& path) const {
    const auto properties = node.find("properties");
    const bool named = properties != node.end() && properties->is_object();
    if (const auto required = node.find("required"); required != node.end() && required->is_array())
      for (const Json& name : *required)
        if (name.is_string() && !(named && properties->contains(name.get<std::string>())))
          MOEND_TRY(Refuse(path, fmt::format("required {}, which properties lack",
                                             name.dump(-1, ' ', true, Json::error_handler_t::replace))));
    const auto additional = node.find("additionalProperties");
    if (!named || additional == node.end() || *additional == false) return {};
    // The converter makes the names of all other keys from these, letter by letter.
    for (const auto& [name, value] : properties->items())
      if (!std::ranges::all_of(name, [](char c) {
            return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
          })) {
        MOEND_TRY(Refuse(path, fmt::format("additionalProperties beside a property {}",
                                           Json(name).dump(-1, ' ', true, Json::error_handler_t::replace))));
        node["additionalProperties"] = false;
        return {};
      }
    return {};
  }

  Expected<void> Array(Json& node, const std::string& path) const {
    const auto prefix = node.find("prefixItems");
    const auto items = node.find("items");
    if (prefix != node.end() && items != node.end()) {
      if (*items != false) MOEND_TRY(Refuse(path, "items beside prefixItems"));
      node.erase("items");
    }
    if (prefix != node.end() || (items != node.end() && items->is_array()))
      for (const char* name : {"minItems", "maxItems"})
        if (node.contains(name)) {
          MOEND_TRY(Refuse(path, fmt::format("{} beside a list of items", name)));
          node.erase(name);
        }
    return {};
  }

  const Json root_;  // as it came
  bool relaxed_;
};

bool IsDeeper(const Json& value, int levels) {
  if (!value.is_structured()) return false;
  return levels == 0 ||
         std::ranges::any_of(value, [&](const Json& inner) { return IsDeeper(inner, levels - 1); });
}

}  // namespace

Expected<void> MakeEnforceable(Json& schema, bool relaxed) {
  // Before anything else recurses. A level of a schema may be three of JSON.
  if (IsDeeper(schema, 3 * kDeepest))
    return Fail(ErrorCode::kTooLong, "the schema nests more than {} levels deep", kDeepest);
  return Visitor(schema, relaxed).Visit(schema, "#", 0);
}

}  // namespace moend
