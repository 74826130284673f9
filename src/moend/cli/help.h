// How --help looks: a line a flag, its choices and default in words, no internals of the parser.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

namespace moend::cli {

class HelpFormatter : public CLI::Formatter {
 public:
  HelpFormatter();
  std::string make_usage(const CLI::App* app, std::string name) const override;
  std::string make_option_opts(const CLI::Option* option) const override;
  std::string make_option_desc(const CLI::Option* option) const override;
};

}  // namespace moend::cli
