// Chat templates in the Jinja language, executed by the engine that the pinned llama.cpp release carries
// (common/jinja). jinja.cpp is the only file that speaks to it, since its interface is not stable.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <string>

namespace moend {

// Whether this build has the engine.
bool HasJinja();

struct JinjaResult {
  enum Kind {
    kText,     // `text` is what the template wrote
    kRefused,  // the template called raise_exception; `text` is what it says
    kFailed,   // not Jinja as the engine knows it; `text` says why, in a line
  };
  Kind kind = kFailed;
  std::string text;
};

// What the engine says when it throws: kRefused or kFailed. std::bad_alloc where that is what it wraps.
JinjaResult JinjaFailure(const std::string& what);

// A parsed template. The engine bounds neither time nor memory and can crash: call this in a Worker only.
class JinjaTemplate {
 public:
  explicit JinjaTemplate(const std::string& source);
  ~JinjaTemplate();

  // `variables` is an object; "messages" among them is a list of {"role", "content"}. Templates that want
  // contents as lists of parts or that know no system role get the messages as they want them.
  JinjaResult Render(nlohmann::ordered_json variables) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moend
