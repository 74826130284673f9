// One row of each suite format as a Context. Errors: kCorrupt for a malformed row, kNotFound for a metric or
// data set that we do not know; their messages lack the file and line, which the caller adds.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "moend/base/error.h"
#include "moend/eval/suite.h"

namespace moend::eval {

enum class SuiteFormat { kMoend, kLongBench, kRuler, kMath, kUnknown };

SuiteFormat GuessFormat(const nlohmann::json& row);

// `name`: the file's name, which tells RULER's tasks and the mathematical data sets apart.
Expected<Context> ParseRow(SuiteFormat format, const nlohmann::json& row, const std::string& name);

}  // namespace moend::eval
