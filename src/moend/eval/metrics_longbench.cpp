// The metrics of LongBench v1 that need more than a line.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <set>

#include "moend/eval/metrics.h"
#include "moend/eval/text.h"

namespace moend::eval {
namespace {

bool IsAsciiPunctuation(uint32_t c) {
  return (c > 0x20 && c < 0x30) || (c > 0x39 && c < 0x41) || (c > 0x5A && c < 0x61) || (c > 0x7A && c < 0x7F);
}

// Words after lower-casing, dropping ASCII punctuation and then the articles. Punctuation vanishes before the
// articles are looked for, so "a-b" is the word "ab"; an article ends at any character that is not part of a
// word, so "the—end" loses its article but keeps its dash.
std::vector<std::string> NormalizedWords(std::string_view text) {
  std::vector<uint32_t> kept;
  for (std::size_t i = 0; i < text.size();) {
    const uint32_t c = ToLower(NextCodePoint(text, i));
    if (!IsAsciiPunctuation(c)) kept.push_back(c);
  }
  std::string out;
  for (std::size_t i = 0; i < kept.size();) {
    std::size_t end = i;
    while (end < kept.size() && IsWordCharacter(kept[end])) ++end;
    if (end == i) {
      AppendUtf8(kept[i++], out);
      continue;
    }
    std::string run;
    for (; i < end; ++i) AppendUtf8(kept[i], run);
    out += run == "a" || run == "an" || run == "the" ? " " : run;
  }
  return SplitWords(out);
}

// Words of LCS(x, y) as a set, walking back the table the way the reference implementation does (at a tie it
// drops a word of y), because which words are found decides the score.
template <class Word>
void AddCommonWords(const std::vector<Word>& x, const std::vector<Word>& y, std::set<Word>& out) {
  const std::size_t width = y.size() + 1;
  std::vector<int32_t> table((x.size() + 1) * width, 0);
  for (std::size_t i = 1; i <= x.size(); ++i)
    for (std::size_t j = 1; j <= y.size(); ++j)
      table[i * width + j] = x[i - 1] == y[j - 1]
                                 ? table[(i - 1) * width + j - 1] + 1
                                 : std::max(table[(i - 1) * width + j], table[i * width + j - 1]);
  for (std::size_t i = x.size(), j = y.size(); i > 0 && j > 0;) {
    if (x[i - 1] == y[j - 1]) {
      out.insert(x[i - 1]);
      --i, --j;
    } else if (table[(i - 1) * width + j] > table[i * width + j - 1]) {
      --i;
    } else {
      --j;
    }
  }
}

// Sentences are what full stops separate. One of white space alone counts as one empty word.
std::vector<std::vector<std::string>> Sentences(std::string_view text) {
  std::vector<std::vector<std::string>> sentences;
  while (!text.empty()) {
    const std::size_t stop = std::min(text.find('.'), text.size());
    if (stop > 0) {
      sentences.push_back(SplitWords(text.substr(0, stop)));
      if (sentences.back().empty()) sentences.back().emplace_back();
    }
    text.remove_prefix(std::min(stop + 1, text.size()));
  }
  return sentences;
}

// Length of the longest common subsequence of two lines, in code points.
int64_t CommonLength(const std::vector<uint32_t>& x, const std::vector<uint32_t>& y) {
  std::vector<int64_t> row(y.size() + 1, 0);
  for (const uint32_t c : x) {
    int64_t diagonal = 0;
    for (std::size_t j = 1; j <= y.size(); ++j) {
      const int64_t above = row[j];
      row[j] = c == y[j - 1] ? diagonal + 1 : std::max(above, row[j - 1]);
      diagonal = above;
    }
  }
  return row.back();
}

}  // namespace

double QaF1(std::string_view text, std::string_view answer) {
  const std::vector<std::string> said = NormalizedWords(text), right = NormalizedWords(answer);
  std::map<std::string, int64_t> left;
  for (const std::string& word : right) ++left[word];
  int64_t same = 0;
  for (const std::string& word : said) {
    const auto it = left.find(word);
    if (it != left.end() && it->second-- > 0) ++same;
  }
  if (same == 0) return 0;
  const double precision = static_cast<double>(same) / static_cast<double>(said.size());
  const double recall = static_cast<double>(same) / static_cast<double>(right.size());
  return 2 * precision * recall / (precision + recall);
}

double RougeL(std::string_view text, std::string_view answer) {
  const auto said = Sentences(text), right = Sentences(answer);
  if (said.empty() || right.empty()) return 0;
  std::set<std::string> said_words, right_words, common;
  for (const auto& sentence : said) said_words.insert(sentence.begin(), sentence.end());
  for (const auto& sentence : right) right_words.insert(sentence.begin(), sentence.end());
  for (const auto& r : right)
    for (const auto& s : said) AddCommonWords(r, s, common);
  const double precision = static_cast<double>(common.size()) / static_cast<double>(said_words.size());
  const double recall = static_cast<double>(common.size()) / static_cast<double>(right_words.size());
  return 2 * precision * recall / (precision + recall + 1e-8);
}

double Classification(std::string_view text, std::string_view answer, std::span<const std::string> classes) {
  std::vector<std::string_view> found;
  for (const std::string& name : classes)
    if (text.find(name) != std::string_view::npos) found.push_back(name);
  // The original removes from the list that it is walking over, and so skips the name after each removed one.
  for (std::size_t i = 0; i < found.size(); ++i)
    if (found[i] != answer && answer.find(found[i]) != std::string_view::npos)
      found.erase(std::find(found.begin(), found.end(), found[i]));
  if (std::find(found.begin(), found.end(), answer) == found.end()) return 0;
  return 1.0 / static_cast<double>(found.size());
}

double CodeSimilarity(std::string_view text, std::string_view answer) {
  text.remove_prefix(std::min(text.find_first_not_of('\n'), text.size()));
  std::string_view line;
  for (bool more = true; more;) {
    const std::size_t end = text.find('\n');
    const std::string_view candidate = text.substr(0, end);
    more = end != std::string_view::npos;
    if (more) text.remove_prefix(end + 1);
    if (candidate.find_first_of("`#") == std::string_view::npos &&
        candidate.find("//") == std::string_view::npos) {
      line = candidate;
      break;
    }
  }
  const std::vector<uint32_t> x = CodePoints(line), y = CodePoints(answer);
  if (x.empty() || y.empty()) return 0;
  const double ratio =
      2.0 * static_cast<double>(CommonLength(x, y)) / static_cast<double>(x.size() + y.size());
  return std::nearbyint(100 * ratio) / 100;
}

}  // namespace moend::eval
