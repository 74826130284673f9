// The little of Unicode text that scoring answers needs, so that it agrees with what the published scorers
// (written in Python) do: white space, word characters, lower case. Ill-formed UTF-8 bytes stand for
// themselves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace moend::eval {

// The code point at text[i]; moves i behind it. An ill-formed byte b reads as 0xDC00 + b and takes one byte.
uint32_t NextCodePoint(std::string_view text, std::size_t& i);
void AppendUtf8(uint32_t code_point, std::string& out);  // writes such a byte back as it was
std::vector<uint32_t> CodePoints(std::string_view text);

bool IsSpace(uint32_t c);  // as Python's str.isspace
// A letter, digit or underscore. Beyond ASCII, everything but spaces and the common punctuation blocks.
bool IsWordCharacter(uint32_t c);
// Latin, Greek and Cyrillic letters; others are returned as they are.
uint32_t ToLower(uint32_t c);

std::string Lower(std::string_view text);
std::string_view Trim(std::string_view text);
std::vector<std::string> SplitWords(std::string_view text);  // at white space, no empty words
std::string FoldSpaces(std::string_view text);               // words joined by one space each
std::string Fold(std::string_view text);                     // FoldSpaces(Lower(text))
// `text` with every `from` replaced.
std::string ReplaceAll(std::string_view text, std::string_view from, std::string_view to);
// Everything before the first line break, after dropping leading ones.
std::string_view FirstLine(std::string_view text);
// Maximal runs of ASCII digits.
std::vector<std::string_view> DigitRuns(std::string_view text);

}  // namespace moend::eval
