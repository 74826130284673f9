#include "moend/eval/math.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <vector>

#include "moend/eval/text.h"

namespace moend::eval {
namespace {

bool IsDigit(char c) {
  return c >= '0' && c <= '9';
}
bool IsLetter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

// "-12,345.6": a comma before every three digits of the whole part.
bool IsThousands(std::string_view text) {
  if (text.starts_with('-')) text.remove_prefix(1);
  text = text.substr(0, text.find('.'));
  const std::size_t first = text.find(',');
  if (first == 0 || first > 3 || first == std::string_view::npos) return false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const bool comma = i >= first && (i - first) % 4 == 0;
    if (comma ? text[i] != ',' : !IsDigit(text[i])) return false;
  }
  return (text.size() - first) % 4 == 0;
}

std::string WithoutThousands(std::string_view text) {
  return IsThousands(text) ? ReplaceAll(text, ",", "") : std::string(text);
}

// The index behind the brace that closes the one at text[open]; npos when none does.
std::size_t BraceEnd(std::string_view text, std::size_t open) {
  int64_t depth = 0;
  for (std::size_t i = open; i < text.size(); ++i) {
    if (text[i] == '\\') {
      ++i;  // \{ and \} are characters
    } else if (text[i] == '{') {
      ++depth;
    } else if (text[i] == '}' && --depth == 0) {
      return i + 1;
    }
  }
  return std::string_view::npos;
}

// The content of the last boxed answer, if there is a complete one.
std::optional<std::string> LastBoxed(std::string_view text) {
  constexpr std::array<std::string_view, 3> kCommands = {"\\boxed", "\\fbox", "\\framebox"};
  std::optional<std::string> found;
  std::size_t found_at = 0;
  for (const std::string_view command : kCommands) {
    for (std::size_t at = text.find(command); at != std::string_view::npos; at = text.find(command, at + 1)) {
      std::size_t i = at + command.size();
      while (i < text.size() && text[i] == ' ') ++i;
      if (i >= text.size() || (found && at < found_at)) continue;
      if (text[i] == '{') {
        const std::size_t end = BraceEnd(text, i);
        if (end == std::string_view::npos) continue;
        found = text.substr(i + 1, end - i - 2);
      } else if (IsLetter(text[i])) {
        continue;  // a longer command
      } else {
        found = text.substr(i, text.find_first_of("$\n ", i) - i);  // \boxed 7
      }
      found_at = at;
    }
  }
  return found;
}

std::optional<std::string> AfterPhrase(std::string_view text) {
  const std::string lower = Lower(text);
  if (lower.size() != text.size()) return {};  // positions would not carry over
  std::size_t begin = std::string::npos;
  for (const std::string_view phrase : {"answer is", "####"}) {
    const std::size_t at = lower.rfind(phrase);
    if (at == std::string::npos) continue;
    const std::size_t end = at + phrase.size();
    if (begin == std::string::npos || end > begin) begin = end;
  }
  if (begin == std::string::npos) return {};
  std::string_view rest = text.substr(begin);
  rest = rest.substr(0, rest.find('\n'));
  rest = rest.substr(0, rest.find(". "));
  rest = Trim(rest);
  while (!rest.empty() && rest.front() == ':') rest = Trim(rest.substr(1));
  while (!rest.empty() && rest.back() == '.') rest.remove_suffix(1);
  if (rest.empty()) return {};
  return std::string(rest);
}

}  // namespace

std::string LastNumber(std::string_view original) {
  const std::string text = ReplaceAll(original, "\xE2\x88\x92", "-");  // U+2212, the typographic minus
  std::string last;
  for (std::size_t i = 0; i < text.size();) {
    const bool leading_point = text[i] == '.' && i + 1 < text.size() && IsDigit(text[i + 1]);
    if (!IsDigit(text[i]) && !leading_point) {
      ++i;
      continue;
    }
    // A minus sign belongs to the number unless something stands before it that it subtracts from.
    const bool negative =
        i > 0 && text[i - 1] == '-' && (i < 2 || !(IsDigit(text[i - 2]) || IsLetter(text[i - 2])));
    std::string number = negative ? "-" : "";
    const std::size_t begin = i;
    while (i < text.size() && IsDigit(text[i])) number += text[i++];
    const auto thousands = [&] {
      if (i + 3 >= text.size() || text[i] != ',') return false;
      for (std::size_t k = 1; k <= 3; ++k)
        if (!IsDigit(text[i + k])) return false;
      return i + 4 >= text.size() || !IsDigit(text[i + 4]);
    };
    if (i - begin >= 1 && i - begin <= 3)
      while (thousands()) {
        number.append(text, i + 1, 3);
        i += 4;
      }
    if (i + 1 < text.size() && text[i] == '.' && IsDigit(text[i + 1])) {
      if (i == begin) number += '0';
      number += text[i++];
      while (i < text.size() && IsDigit(text[i])) number += text[i++];
    }
    last = number;
  }
  return last;
}

bool SameNumber(std::string_view a, std::string_view b) {
  const auto canonical = [](std::string_view text) -> std::optional<std::string> {
    const std::string number = WithoutThousands(Trim(text));
    std::string_view rest = number;
    const bool negative = rest.starts_with('-');
    if (negative || rest.starts_with('+')) rest.remove_prefix(1);
    if (rest.empty() || rest.find_first_not_of("0123456789.") != std::string_view::npos) return {};
    if (std::count(rest.begin(), rest.end(), '.') > 1 || rest == ".") return {};
    std::string_view whole = rest.substr(0, rest.find('.'));
    std::string_view part = whole.size() < rest.size() ? rest.substr(whole.size() + 1) : std::string_view();
    whole.remove_prefix(std::min(whole.find_first_not_of('0'), whole.size()));
    part = part.substr(0, part.find_last_not_of('0') + 1);
    if (whole.empty() && part.empty()) return "0";
    return std::string(negative ? "-" : "").append(whole).append(".").append(part);
  };
  const auto x = canonical(a), y = canonical(b);
  return x && y && *x == *y;
}

std::optional<int64_t> IntegerValue(std::string_view text) {
  const std::string number = WithoutThousands(Trim(text));
  std::string_view rest = number;
  if (rest.starts_with('+')) rest.remove_prefix(1);
  if (const std::size_t point = rest.find('.'); point != std::string_view::npos) {
    if (rest.substr(point + 1).find_first_not_of('0') != std::string_view::npos) return {};
    rest = rest.substr(0, point);  // 25.0
  }
  int64_t value = 0;
  const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), value);
  if (error != std::errc() || end != rest.data() + rest.size()) return {};
  return value;
}

std::string ExtractMathAnswer(std::string_view text) {
  if (auto boxed = LastBoxed(text)) return std::move(*boxed);
  if (auto said = AfterPhrase(text)) return std::move(*said);
  return LastNumber(text);
}

// ---- one spelling
// -------------------------------------------------------------------------------------------

namespace {

// \text{...} and its kin: the words themselves when nothing stands before them, else a unit that is dropped
// with its exponent ("15\mbox{ cm}^2").
std::string ResolveText(std::string_view formula) {
  constexpr std::array<std::string_view, 8> kCommands = {
      "\\text", "\\mbox", "\\textbf", "\\textit", "\\mathrm", "\\mathbf", "\\textrm", "\\operatorname"};
  std::string out;
  for (std::size_t i = 0; i < formula.size();) {
    std::size_t open = std::string_view::npos;
    for (const std::string_view command : kCommands) {
      if (formula.substr(i).starts_with(command) && i + command.size() < formula.size() &&
          formula[i + command.size()] == '{')
        open = i + command.size();
    }
    const std::size_t end = open == std::string_view::npos ? open : BraceEnd(formula, open);
    if (end == std::string_view::npos) {
      out += formula[i++];
      continue;
    }
    const std::string_view content = formula.substr(open + 1, end - open - 2);
    const bool is_unit = !Trim(out).empty() && std::none_of(content.begin(), content.end(), IsDigit);
    if (!is_unit) out += content;
    i = end;
    if (is_unit && i < formula.size() && formula[i] == '^') {
      ++i;
      i = i < formula.size() && formula[i] == '{' ? std::min(BraceEnd(formula, i), formula.size())
                                                  : std::min(i + 1, formula.size());
    }
  }
  return out;
}

// Without `command`, but with the longer ones that begin like it (\leftarrow).
std::string DropCommand(std::string_view text, std::string_view command) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const std::size_t end = i + command.size();
    if (text.substr(i).starts_with(command) && !(end < text.size() && IsLetter(text[end])))
      i = end - 1;
    else
      out += text[i];
  }
  return out;
}

// "_{5}" and "^{2}" as "_5" and "^2".
std::string UnwrapSingles(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    out += text[i];
    if ((text[i] == '^' || text[i] == '_') && i + 3 < text.size() && text[i + 1] == '{' &&
        text[i + 3] == '}') {
      out += text[i + 2];
      i += 3;
    }
  }
  return out;
}

}  // namespace

std::string NormalizeMath(std::string_view formula) {
  std::string s(Trim(formula));
  // Layout commands go; longer names stand before their prefixes.
  struct Rewrite {
    std::string_view from, to;
  };
  constexpr std::array<Rewrite, 38> kRewrites = {{
      {"\\displaystyle", ""},
      {"\\Bigl", ""},
      {"\\Bigr", ""},
      {"\\bigl", ""},
      {"\\bigr", ""},
      {"\\!", ""},
      {"\\,", ""},
      {"\\;", ""},
      {"\\:", ""},
      {"\\ ", " "},
      {"\\qquad", " "},
      {"\\quad", " "},
      {"~", " "},
      {"\\(", ""},
      {"\\)", ""},
      {"\\[", ""},
      {"\\]", ""},
      {"\\dfrac", "\\frac"},
      {"\\tfrac", "\\frac"},
      {"\\cfrac", "\\frac"},
      {"^{\\circ}", ""},
      {"^\\circ", ""},
      {"\\degree", ""},
      {"\xC2\xB0", ""},  // the degree sign
      {"\\$", ""},
      {"$", ""},
      {"\\%", ""},
      {"%", ""},
      {"\\lbrace", "\\{"},
      {"\\rbrace", "\\}"},
      {"\\cdot", "*"},
      {"\\times", "*"},
      {"\\div", "/"},
      {"\xE2\x88\x92", "-"},
      {"\xCF\x80", "\\pi"},
      {"bmatrix", "pmatrix"},
      {"vmatrix", "pmatrix"},
      {"\\ldots", "..."},
  }};
  // "\\" separates the rows of a matrix and must not be read as the start of a command.
  constexpr std::string_view kRow = "\x01";
  s = ReplaceAll(s, "\\\\", kRow);
  for (const Rewrite& r : kRewrites) s = ReplaceAll(s, r.from, r.to);
  for (const std::string_view command : {"\\left", "\\right"}) s = DropCommand(s, command);
  s = ResolveText(s);
  // A command that ends in a letter needs the space behind it: "\cot x".
  std::string out;
  for (std::size_t i = 0; i < s.size(); ++i) {
    if (s[i] == '\n' || s[i] == '\t') s[i] = ' ';
    if (s[i] != ' ') {
      out += s[i];
      continue;
    }
    const std::size_t next = std::min(s.find_first_not_of(' ', i), s.size());
    std::size_t back = out.size();
    while (back > 0 && IsLetter(out[back - 1])) --back;
    const bool after_command = back > 0 && back < out.size() && out[back - 1] == '\\';
    const bool between_words =
        !out.empty() && IsLetter(out.back()) && next < s.size() && IsLetter(s[next]) && !after_command;
    if ((after_command && next < s.size() && IsLetter(s[next])) || between_words) out += ' ';
    i = next - 1;
  }
  s = UnwrapSingles(out);
  while (!s.empty() && (s.back() == '.' || s.back() == ',')) s.pop_back();
  // "x=5" and "x\in[2,3]" are about the right-hand side, if the left one is a name.
  for (const std::string_view relation : {"=", "\\in"}) {
    const std::size_t at = s.find(relation);
    if (at == std::string::npos || at == 0 || at > 2 || s.find(relation, at + 1) != std::string::npos)
      continue;
    if (relation == "\\in" && at + 3 < s.size() && IsLetter(s[at + 3]) && s[at + 3] != ' ')
      continue;  // \infty
    if (IsLetter(s[0])) s = std::string(Trim(std::string_view(s).substr(at + relation.size())));
  }
  s = WithoutThousands(s);
  if (s.size() == 3 && s[0] == '(' && s[2] == ')' && IsLetter(s[1])) s = s[1];  // the choice (C)
  return s;
}

// ---- equality
// -----------------------------------------------------------------------------------------------

namespace {

constexpr int kMaxNesting = 32;

// Splits at `separator` where no bracket is open. A half-open interval's brackets count like any others.
std::vector<std::string_view> SplitTop(std::string_view text, std::string_view separator) {
  std::vector<std::string_view> parts;
  int64_t depth = 0;
  std::size_t begin = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (depth == 0 && text.substr(i).starts_with(separator)) {
      parts.push_back(text.substr(begin, i - begin));
      begin = i + separator.size();
      i = begin - 1;
      continue;
    }
    if (text[i] == '(' || text[i] == '[' || text[i] == '{') ++depth;
    if (text[i] == ')' || text[i] == ']' || text[i] == '}') depth = std::max<int64_t>(0, depth - 1);
  }
  parts.push_back(text.substr(begin));
  return parts;
}

bool Same(std::string_view a, std::string_view b, int depth);

bool SameInOrder(const std::vector<std::string_view>& a, const std::vector<std::string_view>& b, int depth) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i)
    if (!Same(a[i], b[i], depth + 1)) return false;
  return true;
}

// As multisets. "a \pm b" stands for two elements.
bool SameInAnyOrder(const std::vector<std::string_view>& a, const std::vector<std::string_view>& b,
                    int depth) {
  const auto expand = [](const std::vector<std::string_view>& in) {
    std::vector<std::string> out;
    for (const std::string_view part : in) {
      if (part.find("\\pm") == std::string_view::npos) {
        out.emplace_back(part);
      } else {
        out.push_back(ReplaceAll(part, "\\pm", "+"));
        out.push_back(ReplaceAll(part, "\\pm", "-"));
      }
    }
    return out;
  };
  const std::vector<std::string> x = expand(a);
  std::vector<std::string> y = expand(b);
  if (x.size() != y.size()) return false;
  for (const std::string& part : x) {
    const auto it =
        std::find_if(y.begin(), y.end(), [&](const auto& other) { return Same(part, other, depth + 1); });
    if (it == y.end()) return false;
    y.erase(it);
  }
  return true;
}

// What stands between a pair of brackets that encloses the whole text.
std::optional<std::string_view> Inside(std::string_view text, std::string_view open, std::string_view close) {
  if (text.size() < open.size() + close.size() || !text.starts_with(open) || !text.ends_with(close))
    return {};
  return text.substr(open.size(), text.size() - open.size() - close.size());
}

bool SameValue(std::string_view a, std::string_view b) {
  for (const uint64_t seed : {1, 2, 3}) {
    const auto x = EvaluateMath(a, seed), y = EvaluateMath(b, seed);
    if (!x || !y) return false;
    if (std::abs(*x - *y) > 1e-9 * std::max(std::abs(*x), std::abs(*y)) && std::abs(*x - *y) > 1e-15)
      return false;
  }
  return true;
}

// Both are normalized. Depth bounds the work on text that a model made up.
bool Same(std::string_view a, std::string_view b, int depth) {
  if (a.empty() || b.empty() || depth > kMaxNesting) return false;
  if (a == b || SameNumber(a, b)) return true;
  if (const auto x = SplitTop(a, "\\cup"), y = SplitTop(b, "\\cup"); x.size() > 1 || y.size() > 1)
    return SameInOrder(x, y, depth);
  constexpr std::string_view kOpen = "\\begin{pmatrix}", kClose = "\\end{pmatrix}";
  if (const auto x = Inside(a, kOpen, kClose), y = Inside(b, kOpen, kClose); x && y) {
    for (const std::string_view separator : {"\x01", "&"}) {
      const auto xs = SplitTop(*x, separator), ys = SplitTop(*y, separator);
      if (xs.size() != ys.size()) return false;
      if (xs.size() == 1) continue;
      for (std::size_t i = 0; i < xs.size(); ++i) {
        if (xs[i].find('&') == std::string_view::npos
                ? !Same(xs[i], ys[i], depth + 1)
                : !SameInOrder(SplitTop(xs[i], "&"), SplitTop(ys[i], "&"), depth))
          return false;
      }
      return true;
    }
    return Same(*x, *y, depth + 1);
  }
  if (const auto x = Inside(a, "\\{", "\\}"), y = Inside(b, "\\{", "\\}"); x && y)
    return SameInAnyOrder(SplitTop(*x, ","), SplitTop(*y, ","), depth);
  const auto bracketed = [](std::string_view t) {
    return t.size() > 2 && (t.front() == '(' || t.front() == '[') && (t.back() == ')' || t.back() == ']') &&
           SplitTop(t.substr(1, t.size() - 2), ",").size() > 1;
  };
  if (bracketed(a) && bracketed(b))
    return a.front() == b.front() && a.back() == b.back() &&
           SameInOrder(SplitTop(a.substr(1, a.size() - 2), ","), SplitTop(b.substr(1, b.size() - 2), ","),
                       depth);
  const auto list_a = SplitTop(a, ","), list_b = SplitTop(b, ",");
  const auto has_pm = [](std::string_view t) { return t.find("\\pm") != std::string_view::npos; };
  if (list_a.size() > 1 || list_b.size() > 1 || has_pm(a) || has_pm(b))
    return SameInAnyOrder(list_a, list_b, depth);
  const auto equation_a = SplitTop(a, "="), equation_b = SplitTop(b, "=");
  if (equation_a.size() == 2 && equation_b.size() == 2) return SameInOrder(equation_a, equation_b, depth);
  if (SameValue(a, b)) return true;
  const auto words = [](std::string_view t) {
    return std::all_of(t.begin(), t.end(), [](char c) { return IsLetter(c) || c == ' '; });
  };
  return words(a) && words(b) && a.size() > 1 && Lower(a) == Lower(b);
}

}  // namespace

bool SameMath(std::string_view a, std::string_view b) {
  return Same(NormalizeMath(a), NormalizeMath(b), 0);
}

}  // namespace moend::eval
