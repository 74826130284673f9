// --temp, --top-k, --top-p and --min-p, for every command that samples.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "moend/engine/sampler.h"

namespace moend::cli {

// A number from low to high. CLI::Range lets a NaN through.
CLI::Validator Between(double low, double high);

// The ranges are those of the server's fields; what is outside of them is wrong usage. `help` ends each
// flag's text, such as ", for requests that do not say"; may be empty.
void AddSamplerFlags(CLI::App& command, SamplerOptions& sampler, const std::string& help = {});

}  // namespace moend::cli
