// Values of LaTeX expressions, by recursive descent:
//   sum     = product { ("+" | "-") product }
//   product = factor { ["*" | "/"] factor }           neighbours multiply: 2\pi, 3(x+1)
//   factor  = { "+" | "-" } power
//   power   = atom { "!" } [ "^" argument ]
//   atom    = number | letter | "(" sum ")" | "{" sum "}" | \frac argument argument
//           | \sqrt ["[" sum "]"] argument | \function power | \constant
//   argument = "{" sum "}" | one digit, letter or command
#include <cmath>
#include <numbers>

#include "moend/eval/math.h"

namespace moend::eval {
namespace {

constexpr int kMaxDepth = 64;
constexpr std::size_t kMaxLength = 1000;

class Evaluator {
 public:
  Evaluator(std::string_view text, uint64_t seed) : text_(text), seed_(seed) {}

  std::optional<double> Run() {
    const double value = Sum();
    if (failed_ || at_ != text_.size() || !std::isfinite(value)) return {};
    return value;
  }

 private:
  static bool IsDigit(char c) { return c >= '0' && c <= '9'; }
  static bool IsLetter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

  char Peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  bool Take(char c) {
    if (Peek() != c || at_ >= text_.size()) return false;
    ++at_;
    return true;
  }
  double Fail() {
    failed_ = true;
    at_ = text_.size();  // ends every loop
    return 0;
  }
  void SkipSpaces() {
    while (Peek() == ' ') ++at_;
  }

  // A number in (1, 2) for a name: the same for the same name and seed (SplitMix64 over the name).
  double Variable(std::string_view name) const {
    uint64_t h = seed_ * 0x9E3779B97F4A7C15u;
    for (const char c : name) {
      h = (h ^ static_cast<uint8_t>(c)) * 0xBF58476D1CE4E5B9u;
      h ^= h >> 31;
    }
    return 1 + static_cast<double>(h >> 11) / static_cast<double>(uint64_t{1} << 53);
  }

  double Sum() {
    if (++depth_ > kMaxDepth) return Fail();
    double value = Product();
    while (!failed_) {
      if (Take('+'))
        value += Product();
      else if (Take('-'))
        value -= Product();
      else
        break;
    }
    --depth_;
    return value;
  }

  double Product() {
    double value = Factor();
    while (!failed_) {
      SkipSpaces();
      if (Take('*')) {
        value *= Factor();
      } else if (Take('/')) {
        value /= Factor();
      } else if (const char c = Peek(); IsDigit(c) || IsLetter(c) || c == '(' || c == '{' || c == '\\') {
        value *= Power();
      } else {
        break;
      }
    }
    return value;
  }

  double Factor() {
    bool negative = false;
    for (SkipSpaces(); Peek() == '+' || Peek() == '-'; ++at_) negative ^= Peek() == '-';
    const double value = Power();
    return negative ? -value : value;
  }

  double Power() {
    SkipSpaces();
    double value = Atom();
    while (!failed_ && Take('!')) {
      if (value < 0 || value > 170 || value != std::floor(value)) return Fail();
      value = std::tgamma(value + 1);
    }
    if (!failed_ && Take('^')) value = std::pow(value, Peek() == '-' ? Factor() : Argument());
    return value;
  }

  double Braced(char close) {
    const double value = Sum();
    return failed_ || Take(close) ? value : Fail();
  }

  double Argument() {
    SkipSpaces();
    if (Take('{')) return Braced('}');
    if (IsDigit(Peek())) return text_[at_++] - '0';
    if (++depth_ > kMaxDepth) return Fail();
    const double value = Atom();
    --depth_;
    return value;
  }

  double Number() {
    double value = 0, scale = 1;
    const std::size_t begin = at_;
    for (; IsDigit(Peek()); ++at_) value = value * 10 + (Peek() - '0');
    const bool whole = Peek() != '.';
    if (Take('.'))
      for (; IsDigit(Peek()); ++at_) value += (Peek() - '0') * (scale /= 10);
    if (at_ - begin == 1 && text_[begin] == '.') return Fail();
    // A whole number before a fraction of whole numbers is a mixed number: 1\frac{4}{5} = 9/5.
    const std::string_view rest = text_.substr(at_);
    if (whole && rest.starts_with("\\frac") && IsNumericFraction(rest)) value += Atom();
    return value;
  }

  static bool IsNumericFraction(std::string_view rest) {
    rest.remove_prefix(5);
    int arguments = 0;
    while (!rest.empty() && arguments < 2) {
      std::size_t used = 0;
      if (IsDigit(rest[0])) {
        used = 1;
      } else if (rest[0] == '{') {
        used = rest.find_first_not_of("0123456789", 1);
        if (used == std::string_view::npos || used == 1 || rest[used] != '}') return false;
        ++used;
      } else if (rest[0] == ' ') {
        rest.remove_prefix(1);
        continue;
      } else {
        return false;
      }
      rest.remove_prefix(used);
      ++arguments;
    }
    return arguments == 2;
  }

  double Atom() {
    const char c = Peek();
    if (IsDigit(c) || c == '.') return Number();
    if (Take('(')) return Braced(')');
    if (Take('{')) return Braced('}');
    if (c == '\\') return Command();
    if (!IsLetter(c)) return Fail();
    // Four letters in a row are a word, not a product.
    std::size_t end = at_;
    while (end < text_.size() && IsLetter(text_[end])) ++end;
    if (end - at_ >= 4 && (at_ == 0 || !IsLetter(text_[at_ - 1]))) return Fail();
    return Variable(text_.substr(at_++, 1));
  }

  double Command() {
    std::size_t end = at_ + 1;
    while (end < text_.size() && IsLetter(text_[end])) ++end;
    const std::string_view name = text_.substr(at_ + 1, end - at_ - 1);
    if (name.empty()) return Fail();
    at_ = end;
    if (name == "frac") {
      const double numerator = Argument(), denominator = Argument();
      return numerator / denominator;
    }
    if (name == "sqrt") {
      double degree = 2;
      if (Take('[')) degree = Braced(']');
      const double value = Argument();
      return degree == 2 ? std::sqrt(value) : std::pow(value, 1 / degree);
    }
    if (name == "pi") return std::numbers::pi;
    struct Function {
      std::string_view name;
      double (*f)(double);
    };
    static constexpr Function kFunctions[] = {
        {"sin", [](double x) { return std::sin(x); }},     {"cos", [](double x) { return std::cos(x); }},
        {"tan", [](double x) { return std::tan(x); }},     {"cot", [](double x) { return 1 / std::tan(x); }},
        {"sec", [](double x) { return 1 / std::cos(x); }}, {"csc", [](double x) { return 1 / std::sin(x); }},
        {"ln", [](double x) { return std::log(x); }},      {"exp", [](double x) { return std::exp(x); }},
    };
    for (const Function& function : kFunctions) {
      if (function.name != name) continue;
      if (++depth_ > kMaxDepth) return Fail();
      const double value = function.f(Power());
      --depth_;
      return value;
    }
    static constexpr std::string_view kNames[] = {"alpha", "beta",  "gamma", "delta", "theta", "lambda",
                                                  "mu",    "omega", "phi",   "sigma", "infty"};
    for (const std::string_view known : kNames)
      if (known == name) return Variable(name);
    return Fail();
  }

  std::string_view text_;
  uint64_t seed_;
  std::size_t at_ = 0;
  int depth_ = 0;
  bool failed_ = false;
};

}  // namespace

std::optional<double> EvaluateMath(std::string_view normalized, uint64_t seed) {
  if (normalized.empty() || normalized.size() > kMaxLength) return {};
  return Evaluator(normalized, seed).Run();
}

}  // namespace moend::eval
