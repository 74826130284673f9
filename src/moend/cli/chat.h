// The conversation of `moend run --chat`.
#pragma once

#include <memory>
#include <string>

#include "moend/base/error.h"
#include "moend/engine/engine.h"
#include "moend/engine/generate.h"

namespace moend::cli {

// Reads a message a line from stdin and answers each, until its end or a Ctrl-C at the prompt; a Ctrl-C while
// the model speaks ends that answer only.
Expected<void> Chat(std::shared_ptr<Engine> engine, const Plan& plan, const SessionOptions& session_options,
                    const GenerateOptions& options, const std::string& system,
                    const std::string& template_variables);

}  // namespace moend::cli
