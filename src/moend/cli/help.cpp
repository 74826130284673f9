#include "moend/cli/help.h"

#include <algorithm>

namespace moend::cli {
namespace {

constexpr std::size_t kFlagColumn = 36;

// CLI11 writes a type as "NAME:check"; the check of a list of choices is "{a,b}".
std::string TypeName(const CLI::Option* option) {
  const std::string type = option->get_type_name();
  return type.substr(0, type.find(':'));
}

std::string Choices(const CLI::Option* option) {
  const std::string type = option->get_type_name();
  const std::size_t open = type.find(":{"), close = type.rfind('}');
  if (open == std::string::npos || close == std::string::npos) return {};
  std::string names = type.substr(open + 2, close - open - 2);
  for (std::size_t at = 0; (at = names.find(',', at)) != std::string::npos; at += 2)
    names.replace(at, 1, ", ");
  return names;
}

}  // namespace

HelpFormatter::HelpFormatter() {
  column_width(kFlagColumn);
  label("OPTIONS", "FLAGS");
  label("SUBCOMMAND", "COMMAND");
}

std::string HelpFormatter::make_usage(const CLI::App* app, std::string name) const {
  if (const CLI::App* parent = app->get_parent()) name = parent->get_name() + " " + app->get_name();
  return CLI::Formatter::make_usage(app, name);
}

std::string HelpFormatter::make_option_opts(const CLI::Option* option) const {
  const std::string type = option->get_type_size() != 0 ? TypeName(option) : "";
  return type.empty() ? "" : " " + type;
}

std::string HelpFormatter::make_option_desc(const CLI::Option* option) const {
  std::string text = option->get_description();
  if (const std::string choices = Choices(option); !choices.empty()) text += ": " + choices;
  if (option->get_required() && !option->get_positional()) text += " (required)";
  if (!option->get_default_str().empty()) text += " (default: " + option->get_default_str() + ")";
  return text;
}

}  // namespace moend::cli
