#include "tests/fuzz/fuzz.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "tests/fuzz/memory.h"

namespace moend::fuzz {
namespace {

constexpr std::size_t kMostBytes = 1 << 16;  // of an input
constexpr std::size_t kMostKept = 2000;      // inputs that are changed further
// A parser may take this much memory: some bytes for each of the input, and what it always takes.
constexpr int64_t kBytesPerByte = 400, kAlways = int64_t{8} << 20;

std::string current;

std::size_t Below(std::mt19937_64& random, std::size_t n) {
  return n == 0 ? 0 : random() % n;
}

constexpr uint64_t kNumbers[] = {0,
                                 1,
                                 2,
                                 3,
                                 7,
                                 8,
                                 15,
                                 16,
                                 63,
                                 64,
                                 65,
                                 127,
                                 128,
                                 255,
                                 256,
                                 1023,
                                 1024,
                                 4096,
                                 32767,
                                 32768,
                                 65535,
                                 65536,
                                 0x7fffffff,
                                 0x80000000,
                                 0xffffffff,
                                 0x100000000,
                                 0x3fffffffffffffff,
                                 0x7fffffffffffffff,
                                 0x8000000000000000,
                                 0xffffffffffffffff};
constexpr const char* kNumerals[] = {"0",
                                     "-1",
                                     "1",
                                     "255",
                                     "65536",
                                     "2147483647",
                                     "2147483648",
                                     "4294967296",
                                     "9223372036854775807",
                                     "9223372036854775808",
                                     "18446744073709551616",
                                     "-9223372036854775809",
                                     "1e308",
                                     "1e309",
                                     "-1e309",
                                     "4.9e-324",
                                     "1e-400",
                                     "0.1",
                                     "-0",
                                     "1e5",
                                     "00",
                                     "nan",
                                     "inf",
                                     "null",
                                     "true",
                                     "[]",
                                     "{}",
                                     "\"\""};

bool IsDigit(char c) {
  return c >= '0' && c <= '9';
}

// A number in the text, with its sign and fraction: begin and length; length 0 where there is none.
std::pair<std::size_t, std::size_t> SomeNumber(const std::string& s, std::mt19937_64& random) {
  const std::size_t start = Below(random, s.size());
  const auto found = std::find_if(s.begin() + static_cast<std::ptrdiff_t>(start), s.end(), IsDigit);
  auto end = found;
  while (end != s.end() && (IsDigit(*end) || *end == '.' || *end == 'e' || *end == '-')) ++end;
  return {static_cast<std::size_t>(found - s.begin()), static_cast<std::size_t>(end - found)};
}

// Digits and what stands in quotes are left out: they are the input's own.
std::string Kind(const Outcome& outcome) {
  std::string kind = outcome.accepted ? "+" : "-";
  bool quoted = false;
  for (const char c : outcome.said) {
    if (c == '"') quoted = !quoted;
    if (!quoted && !IsDigit(c)) kind += c;
  }
  return kind;
}

std::string Shown(std::string_view input) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string shown;
  for (const char c : input.substr(0, 4000)) {
    const auto byte = static_cast<uint8_t>(c);
    if (byte >= 32 && byte < 127 && c != '\\') {
      shown += c;
    } else {
      shown += std::string("\\x") + kHex[byte >> 4] + kHex[byte & 15];
    }
  }
  return shown;
}

}  // namespace

std::string_view Current() {
  return current;
}

void Mutate(std::string& s, const std::vector<std::string>& others, const std::vector<std::string>& words,
            std::mt19937_64& random) {
  const std::size_t at = Below(random, s.size());
  const auto offset = static_cast<std::ptrdiff_t>(at);
  switch (random() % 10) {
    case 0:  // a bit
      if (!s.empty()) s[at] = static_cast<char>(s[at] ^ (1 << random() % 8));
      break;
    case 1:  // a byte
      if (!s.empty()) s[at] = static_cast<char>(random());
      break;
    case 2: {  // a number as it is stored
      const uint64_t number = kNumbers[Below(random, std::size(kNumbers))];
      const std::size_t bytes = std::size_t{1} << random() % 4;
      if (s.size() >= bytes) std::memcpy(s.data() + Below(random, s.size() - bytes + 1), &number, bytes);
      break;
    }
    case 3: {  // a number as it is written
      const auto [begin, length] = SomeNumber(s, random);
      if (length > 0) s.replace(begin, length, kNumerals[Below(random, std::size(kNumerals))]);
      break;
    }
    case 4:  // a piece less
      s.erase(at, 1 + Below(random, std::min<std::size_t>(s.size() - at, 64)));
      break;
    case 5: {  // a piece twice
      const std::string piece = s.substr(at, 1 + Below(random, 64));
      s.insert(Below(random, s.size() + 1), piece);
      break;
    }
    case 6:  // the end is missing
      s.resize(at);
      break;
    case 7: {  // a piece of another
      const std::string& other = others[Below(random, others.size())];
      const std::size_t from = Below(random, other.size());
      const std::string piece = other.substr(from, 1 + Below(random, 256));
      if (random() % 2) {
        s.insert(at, piece);
      } else {
        s.replace(at, std::min(piece.size(), s.size() - at), piece);
      }
      break;
    }
    case 8:  // a word of the language
      if (!words.empty()) {
        const std::string& word = words[Below(random, words.size())];
        if (random() % 2) {
          s.insert(at, word);
        } else {
          s.replace(at, std::min(word.size(), s.size() - at), word);
        }
      }
      break;
    default: {  // two bytes change places
      if (s.empty()) break;
      std::iter_swap(s.begin() + offset, s.begin() + static_cast<std::ptrdiff_t>(Below(random, s.size())));
      break;
    }
  }
  if (s.size() > kMostBytes) s.resize(kMostBytes);
}

Report Run(const Parser& parser, int64_t executions, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::string> kept = parser.seeds;
  std::set<std::string> kinds;
  Report report;
  const auto execute = [&](std::string input) {
    if (parser.seal) parser.seal(input);
    current = std::move(input);
    const int64_t before = StartCounting();
    const Outcome outcome = parser.run(current);
    const int64_t most = MostCounted() - before;
    ++report.executions;
    report.accepted += outcome.accepted;
    std::string wrong = outcome.wrong;
    const int64_t allowed = kAlways + kBytesPerByte * static_cast<int64_t>(current.size());
    if (most > allowed)
      wrong =
          "it takes " + std::to_string(most) + " bytes, where " + std::to_string(allowed) + " are allowed";
    if (!outcome.accepted && outcome.said.empty()) wrong = "it refuses the input and does not say why";
    if (!wrong.empty() && report.wrong.empty())
      report.wrong = wrong + "\nexecution " + std::to_string(report.executions) + " of seed " +
                     std::to_string(seed) + ": " + Shown(current);
    if (kinds.insert(Kind(outcome)).second && kept.size() < kMostKept) kept.push_back(current);
  };
  for (const std::string& good : parser.seeds) execute(good);
  while (report.executions < executions && report.wrong.empty()) {
    // Half of the time a good one, and one change: most of what is changed much is refused at once.
    std::string input = kept[Below(random, random() % 2 ? parser.seeds.size() : kept.size())];
    for (auto changes = random() % 2 ? 1 : 1 + random() % 4; changes > 0; --changes)
      Mutate(input, kept, parser.words, random);
    execute(std::move(input));
  }
  report.outcomes = std::ssize(kinds);
  return report;
}

std::vector<Parser> Parsers() {
  std::vector<Parser> parsers;
#ifndef MOEND_FUZZ_BYTES_ONLY  // those that need next to nothing of the rest
  AddFileParsers(parsers);
  AddServerParsers(parsers);
  AddChatParsers(parsers);
#endif
  AddHttpParsers(parsers);
  AddStoreParsers(parsers);
  return parsers;
}

}  // namespace moend::fuzz
