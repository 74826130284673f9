// The few functions of common.h and log.h that the parts taken here call. The whole of them would bring downloads,
// command lines and threads along.
#include <stdexcept>

#include "common.h"
#include "log.h"

std::string string_join(const std::vector<std::string>& values, const std::string& separator) {
  std::string out;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (i > 0) out += separator;
    out += values[i];
  }
  return out;
}

std::vector<std::string> string_split(const std::string& text, const std::string& delimiter) {
  std::vector<std::string> parts;
  std::size_t from = 0;
  for (std::size_t at; (at = text.find(delimiter, from)) != std::string::npos; from = at + delimiter.size())
    parts.push_back(text.substr(from, at - from));
  parts.push_back(text.substr(from));
  return parts;
}

std::string string_repeat(const std::string& text, std::size_t times) {
  std::string out;
  out.reserve(text.size() * times);
  for (std::size_t i = 0; i < times; ++i) out += text;
  return out;
}

void string_replace_all(std::string& text, const std::string& what, const std::string& with) {
  if (what.empty()) return;
  for (std::size_t at = 0; (at = text.find(what, at)) != std::string::npos; at += with.size())
    text.replace(at, what.size(), with);
}

// moend has a tokenizer of its own.
std::vector<llama_token> common_tokenize(const llama_vocab*, const std::string&, bool, bool) {
  throw std::runtime_error("there is no tokenizer");
}
std::string common_token_to_piece(const llama_vocab*, llama_token, bool) {
  throw std::runtime_error("there is no tokenizer");
}

// Nothing is printed.
int common_log_get_verbosity_thold() {
  return -1;
}
common_log* common_log_main() {
  return nullptr;
}
void common_log_add(common_log*, ggml_log_level, const char*, ...) {}
