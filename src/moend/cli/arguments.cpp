#include "moend/cli/arguments.h"

#include <array>
#include <string_view>

namespace moend::cli {
namespace {

struct Translation {
  std::string_view given;
  std::string_view ours;  // empty: there is none
  std::string_view why;
};

constexpr std::string_view kUsePlan = "the cache's bits are the plan's; see 'moend solve --help'";

constexpr std::array kTranslations = {
    Translation{"-np", "--parallel", ""},
    Translation{"-sys", "--system-prompt", ""},
    Translation{"-ngl", "--gpu-layers", ""},
    Translation{"-dev", "--device", ""},
    Translation{"-ctk", "", kUsePlan},
    Translation{"-ctv", "", kUsePlan},
    Translation{"-fa", "", "attention is always fused"},
    Translation{"-ub", "", "a prompt is always read in blocks of 512 tokens"},
    Translation{"-hf", "", "nothing is downloaded; give a GGUF file with -m"},
    Translation{"-cnv", "--chat", ""},
};

// Whether the word behind this flag is a user's text, which may look like anything.
bool TakesText(std::string_view flag) {
  return flag == "-p" || flag == "--prompt" || flag == "-sys" || flag == "--system-prompt";
}

int HexDigit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

}  // namespace

Expected<std::vector<std::string>> TranslateArguments(int argc, const char* const* argv) {
  std::vector<std::string> arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string_view word = argv[i];
    arguments.emplace_back(word);
    if (i > 1 && TakesText(argv[i - 1])) continue;
    // CLI11 would take the next word for the value, be it another flag.
    if (word.starts_with("--") && word.find('=') == word.size() - 1)
      return Fail(ErrorCode::kInvalidArgument, "the value of {} may not be empty",
                  word.substr(0, word.size() - 1));
    for (const Translation& t : kTranslations) {
      if (word != t.given) continue;
      if (t.ours.empty()) return Fail(ErrorCode::kInvalidArgument, "there is no flag {}: {}", word, t.why);
      arguments.back() = t.ours;
    }
  }
  return arguments;
}

std::string Unescape(const std::string& text) {
  std::string plain;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '\\' || i + 1 == text.size()) {
      plain += text[i];
      continue;
    }
    const char c = text[++i];
    switch (c) {
      case 'n':
        plain += '\n';
        break;
      case 't':
        plain += '\t';
        break;
      case 'r':
        plain += '\r';
        break;
      case '\\':
      case '\'':
      case '"':
        plain += c;
        break;
      case 'x':
        if (i + 2 < text.size() && HexDigit(text[i + 1]) >= 0 && HexDigit(text[i + 2]) >= 0) {
          plain += static_cast<char>(HexDigit(text[i + 1]) * 16 + HexDigit(text[i + 2]));
          i += 2;
          break;
        }
        [[fallthrough]];
      default:
        plain += {'\\', c};
    }
  }
  return plain;
}

}  // namespace moend::cli
