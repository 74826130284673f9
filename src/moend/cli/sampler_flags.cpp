#include "moend/cli/sampler_flags.h"

#include <fmt/format.h>

#include <cstdint>

#include "moend/base/number.h"

namespace moend::cli {

CLI::Validator Between(double low, double high) {
  return CLI::Validator(
      [low, high](std::string& text) {
        const auto value = ParseNumber<double>(text);
        const bool ok = value && *value >= low && *value <= high;
        return ok ? std::string() : fmt::format("Value {} not in range {} to {}", text, low, high);
      },
      "");
}

void AddSamplerFlags(CLI::App& command, SamplerOptions& sampler, const std::string& help) {
  command.add_option("--temp,--temperature", sampler.temperature, "0: always the likeliest token" + help)
      ->capture_default_str()
      ->check(Between(0, 2))
      ->type_name("T");
  command.add_option("--top-k", sampler.top_k, "only the K likeliest tokens; 0: all" + help)
      ->capture_default_str()
      ->check(CLI::Range(int64_t{-1}, int64_t{INT32_MAX}))
      ->type_name("K");
  command.add_option("--top-p", sampler.top_p, "only the likeliest with this sum; 1: all" + help)
      ->capture_default_str()
      ->check(Between(0, 1))
      ->type_name("P");
  command.add_option("--min-p", sampler.min_p, "only those with this share of the likeliest; 0: all" + help)
      ->capture_default_str()
      ->check(Between(0, 1))
      ->type_name("P");
}

}  // namespace moend::cli
