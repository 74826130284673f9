#include "moend/eval/text.h"

namespace moend::eval {
namespace {

constexpr uint32_t kRawByte = 0xDC00;  // unpaired surrogates carry ill-formed bytes, as Python's do

bool IsAsciiDigit(char c) {
  return c >= '0' && c <= '9';
}

}  // namespace

uint32_t NextCodePoint(std::string_view text, std::size_t& i) {
  const auto byte = [&](std::size_t at) { return static_cast<uint8_t>(text[at]); };
  const uint8_t first = byte(i++);
  if (first < 0x80) return first;
  const std::size_t more = first >= 0xF0 && first < 0xF5 ? 3 : first >= 0xE0 ? 2 : first >= 0xC2 ? 1 : 0;
  if (more == 0 || first >= 0xF5 || i + more > text.size()) return kRawByte + first;
  uint32_t c = first & (0x3Fu >> more);
  for (std::size_t k = 0; k < more; ++k) {
    if ((byte(i + k) & 0xC0) != 0x80) return kRawByte + first;
    c = c << 6 | (byte(i + k) & 0x3Fu);
  }
  constexpr uint32_t kSmallest[] = {0, 0x80, 0x800, 0x10000};
  if (c < kSmallest[more] || c > 0x10FFFF || (c >= 0xD800 && c < 0xE000)) return kRawByte + first;
  i += more;
  return c;
}

void AppendUtf8(uint32_t c, std::string& out) {
  const auto put = [&](uint32_t b) { out.push_back(static_cast<char>(static_cast<uint8_t>(b))); };
  if (c < 0x80) {
    put(c);
  } else if (c >= kRawByte && c < kRawByte + 0x100) {
    put(c - kRawByte);
  } else if (c < 0x800) {
    put(0xC0 | c >> 6), put(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    put(0xE0 | c >> 12), put(0x80 | (c >> 6 & 0x3F)), put(0x80 | (c & 0x3F));
  } else {
    put(0xF0 | c >> 18), put(0x80 | (c >> 12 & 0x3F)), put(0x80 | (c >> 6 & 0x3F)), put(0x80 | (c & 0x3F));
  }
}

std::vector<uint32_t> CodePoints(std::string_view text) {
  std::vector<uint32_t> out;
  out.reserve(text.size());
  for (std::size_t i = 0; i < text.size();) out.push_back(NextCodePoint(text, i));
  return out;
}

bool IsSpace(uint32_t c) {
  return (c >= 9 && c <= 13) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

bool IsWordCharacter(uint32_t c) {
  if (c < 0x80) return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
  if (c < 0xC0)  // Latin-1 signs; of them ª ² ³ µ ¹ º ¼ ½ ¾ are letters or numbers
    return c == 0xAA || c == 0xB2 || c == 0xB3 || c == 0xB5 || c == 0xB9 || c == 0xBA ||
           (c >= 0xBC && c <= 0xBE);
  const bool punctuation = c == 0xD7 || c == 0xF7 || (c >= 0x2000 && c <= 0x206F) ||
                           (c >= 0x20A0 && c <= 0x20CF) || (c >= 0x2190 && c <= 0x23FF) ||
                           (c >= 0x2500 && c <= 0x27BF) || (c >= 0x3000 && c <= 0x3004) ||
                           (c >= 0x3008 && c <= 0x3020) || (c >= 0xFF01 && c <= 0xFF0F) ||
                           (c >= 0xFF1A && c <= 0xFF20) || (c >= kRawByte && c < kRawByte + 0x100);
  return !punctuation && !IsSpace(c);
}

uint32_t ToLower(uint32_t c) {
  if (c < 0x80) return c >= 'A' && c <= 'Z' ? c + 32 : c;
  if ((c >= 0xC0 && c <= 0xDE && c != 0xD7) || (c >= 0x391 && c <= 0x3A9 && c != 0x3A2) ||
      (c >= 0x410 && c <= 0x42F))
    return c + 32;
  if (c >= 0x400 && c <= 0x40F) return c + 80;
  // Latin Extended-A: pairs, upper case on even code points but on odd ones in two stretches.
  const bool odd_upper = (c >= 0x139 && c <= 0x148) || (c >= 0x179 && c <= 0x17E);
  if (odd_upper) return c % 2 == 1 ? c + 1 : c;
  if (c >= 0x100 && c <= 0x177 && c != 0x130 && c != 0x131 && c != 0x138 && c != 0x149)
    return c % 2 == 0 ? c + 1 : c;
  if (c == 0x178) return 0xFF;
  return c;
}

std::string Lower(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (std::size_t i = 0; i < text.size();) AppendUtf8(ToLower(NextCodePoint(text, i)), out);
  return out;
}

std::string_view Trim(std::string_view text) {
  std::size_t begin = 0;
  for (std::size_t i = 0; i < text.size() && IsSpace(NextCodePoint(text, i));) begin = i;
  std::size_t end = begin;
  for (std::size_t i = begin; i < text.size();)
    if (!IsSpace(NextCodePoint(text, i))) end = i;
  return text.substr(begin, end - begin);
}

std::vector<std::string> SplitWords(std::string_view text) {
  std::vector<std::string> words;
  bool inside = false;
  for (std::size_t i = 0; i < text.size();) {
    const uint32_t c = NextCodePoint(text, i);
    if (IsSpace(c)) {
      inside = false;
      continue;
    }
    if (!inside) words.emplace_back();
    inside = true;
    AppendUtf8(c, words.back());
  }
  return words;
}

std::string FoldSpaces(std::string_view text) {
  std::string out;
  for (const std::string& word : SplitWords(text)) {
    if (!out.empty()) out += ' ';
    out += word;
  }
  return out;
}

std::string Fold(std::string_view text) {
  return FoldSpaces(Lower(text));
}

std::string ReplaceAll(std::string_view text, std::string_view from, std::string_view to) {
  std::string out;
  if (from.empty()) return std::string(text);
  for (std::size_t at; (at = text.find(from)) != std::string_view::npos;) {
    out.append(text.substr(0, at)).append(to);
    text.remove_prefix(at + from.size());
  }
  return out.append(text);
}

std::string_view FirstLine(std::string_view text) {
  text.remove_prefix(std::min(text.find_first_not_of('\n'), text.size()));
  return text.substr(0, text.find('\n'));
}

std::vector<std::string_view> DigitRuns(std::string_view text) {
  std::vector<std::string_view> runs;
  for (std::size_t i = 0; i < text.size();) {
    std::size_t end = i;
    while (end < text.size() && IsAsciiDigit(text[end])) ++end;
    if (end > i) runs.push_back(text.substr(i, end - i));
    i = end + 1;
  }
  return runs;
}

}  // namespace moend::eval
