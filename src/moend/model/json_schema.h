// What of a JSON schema a grammar can hold an output to. The converter (SchemaToGrammar) passes over keywords
// that it does not know, and turns some patterns into strings that are no JSON; who asks for a schema should
// hear of it.
#pragma once

#include <nlohmann/json.hpp>

#include "moend/base/error.h"

namespace moend {

// Rewrites `schema` to one that the converter takes at its word. kInvalidArgument names a keyword that cannot
// be had, and where it stands. With `relaxed` such keywords are left out instead. kTooLong for one that nests
// too deep.
Expected<void> MakeEnforceable(nlohmann::ordered_json& schema, bool relaxed);

}  // namespace moend
