#include "moend/eval/metrics.h"

#include <algorithm>
#include <array>

#include "moend/eval/math.h"
#include "moend/eval/text.h"

namespace moend::eval {
namespace {

struct Named {
  TaskMetric metric;
  const char* name;
};
constexpr std::array<Named, 16> kNames = {{
    {TaskMetric::kExact, "exact"},
    {TaskMetric::kLeadingWords, "leading_words"},
    {TaskMetric::kLastNumber, "last_number"},
    {TaskMetric::kFirstLine, "first_line"},
    {TaskMetric::kQaF1, "qa_f1"},
    {TaskMetric::kQaF1Characters, "qa_f1_zh"},
    {TaskMetric::kRouge, "rouge"},
    {TaskMetric::kRougeCharacters, "rouge_zh"},
    {TaskMetric::kClassification, "classification"},
    {TaskMetric::kRetrieval, "retrieval"},
    {TaskMetric::kCount, "count"},
    {TaskMetric::kCodeSim, "code_sim"},
    {TaskMetric::kMath, "math"},
    {TaskMetric::kInteger, "integer"},
    {TaskMetric::kContains, "contains"},
    {TaskMetric::kChoice, "choice"},
}};

double LeadingWords(std::string_view text, std::string_view answer) {
  const std::vector<std::string> said = SplitWords(text), right = SplitWords(answer);
  if (right.empty()) return 0;
  std::size_t n = 0;
  while (n < right.size() && n < said.size() && said[n] == right[n]) ++n;
  return static_cast<double>(n) / static_cast<double>(right.size());
}

// Share of the numbers in the text that equal the gold one, compared as text.
double NumberShare(std::string_view text, std::string_view gold) {
  const std::vector<std::string_view> numbers = DigitRuns(text);
  if (numbers.empty()) return 0;
  const auto right = std::count(numbers.begin(), numbers.end(), gold);
  return static_cast<double>(right) / static_cast<double>(numbers.size());
}

double Retrieval(std::string_view text, std::string_view answer) {
  const std::vector<std::string_view> gold = DigitRuns(answer);  // "Paragraph 12"
  return gold.empty() ? 0 : NumberShare(text, gold.front());
}

// The integer that a text arrives at; "m+n=113" arrives at 113.
std::optional<int64_t> FinalInteger(std::string_view text) {
  std::string answer = NormalizeMath(ExtractMathAnswer(text));
  if (const std::size_t equals = answer.rfind('='); equals != std::string::npos) answer.erase(0, equals + 1);
  if (auto value = IntegerValue(answer)) return value;
  return IntegerValue(LastNumber(answer));
}

double Contains(std::string_view text, std::span<const std::string> answers) {
  if (answers.empty()) return 0;
  const std::string said = Lower(text);
  const auto found = std::count_if(answers.begin(), answers.end(), [&](const std::string& answer) {
    return said.find(Lower(answer)) != std::string::npos;
  });
  return static_cast<double>(found) / static_cast<double>(answers.size());
}

// Each character that is neither space nor ASCII punctuation as a word of its own.
std::string SpacedCharacters(std::string_view text) {
  std::string out;
  for (const uint32_t c : CodePoints(text)) {
    if (IsSpace(c) || !IsWordCharacter(c)) continue;
    AppendUtf8(ToLower(c), out);
    out += ' ';
  }
  return out;
}

double ScoreOne(TaskMetric metric, std::string_view text, const std::string& answer,
                std::span<const std::string> classes) {
  const auto share = [](bool right) { return right ? 1.0 : 0.0; };
  switch (metric) {
    case TaskMetric::kExact:
      return share(Fold(text) == Fold(answer));
    case TaskMetric::kLeadingWords:
      return LeadingWords(text, answer);
    case TaskMetric::kLastNumber:
      return share(SameNumber(LastNumber(text), LastNumber(answer)));
    case TaskMetric::kFirstLine:
      return share(Fold(FirstLine(Trim(text))) == Fold(answer));
    case TaskMetric::kQaF1:
      return QaF1(text, answer);
    case TaskMetric::kQaF1Characters:
      return QaF1(SpacedCharacters(text), SpacedCharacters(answer));
    case TaskMetric::kRouge:
      return RougeL(text, answer);
    case TaskMetric::kRougeCharacters:
      return RougeL(SpacedCharacters(text), SpacedCharacters(answer));
    case TaskMetric::kClassification:
      return Classification(text, answer, classes);
    case TaskMetric::kRetrieval:
      return Retrieval(text, answer);
    case TaskMetric::kCount:
      return NumberShare(text, answer);
    case TaskMetric::kCodeSim:
      return CodeSimilarity(text, answer);
    case TaskMetric::kMath:
      return share(SameMath(ExtractMathAnswer(text), answer) || SameMath(Trim(text), answer));
    case TaskMetric::kInteger: {
      const auto said = FinalInteger(text), right = IntegerValue(answer);
      return share(said && right && *said == *right);
    }
    case TaskMetric::kChoice:
      return share(ChosenLetter(text) != 0 && ChosenLetter(text) == ChosenLetter(answer));
    case TaskMetric::kContains:
      break;  // over all answers at once
  }
  return 0;
}

}  // namespace

Expected<TaskMetric> ParseTaskMetric(std::string_view name) {
  for (const Named& named : kNames)
    if (name == named.name) return named.metric;
  return Fail(ErrorCode::kNotFound, "there is no metric \"{}\"; possible: {}", name,
              fmt::join(TaskMetricNames(), ", "));
}

const char* Name(TaskMetric metric) {
  for (const Named& named : kNames)
    if (metric == named.metric) return named.name;
  return "?";
}

std::vector<std::string> TaskMetricNames() {
  std::vector<std::string> names;
  for (const Named& named : kNames) names.emplace_back(named.name);
  return names;
}

char ChosenLetter(std::string_view text) {
  std::string_view only = Trim(text);
  while (!only.empty() && (only.front() == '(' || only.front() == '[')) only.remove_prefix(1);
  while (!only.empty() && std::string_view(".):]").find(only.back()) != std::string_view::npos)
    only.remove_suffix(1);
  if (only.size() == 1 && only[0] >= 'a' && only[0] <= 'd') return static_cast<char>(only[0] - 'a' + 'A');
  uint32_t before = ' ';
  for (std::size_t i = 0; i < text.size();) {
    const uint32_t c = NextCodePoint(text, i);
    std::size_t next = i;
    const uint32_t after = i < text.size() ? NextCodePoint(text, next) : ' ';
    // "D'Artagnan" and "A-level" are words.
    const bool joined = (after == '\'' || after == '-' || after == 0x2019) && next < text.size() &&
                        IsWordCharacter(NextCodePoint(text, next));
    if (c >= 'A' && c <= 'D' && !IsWordCharacter(before) && !IsWordCharacter(after) && !joined)
      return static_cast<char>(c);
    before = c;
  }
  return 0;
}

std::string_view FinalAnswer(std::string_view text) {
  constexpr std::string_view kEnd = "</think>";
  const std::size_t at = text.rfind(kEnd);
  return at == std::string_view::npos ? text : text.substr(at + kEnd.size());
}

double Score(TaskMetric metric, std::string_view text, std::span<const std::string> answers,
             std::span<const std::string> classes) {
  text = FinalAnswer(text);
  if (metric == TaskMetric::kContains) return Contains(text, answers);
  double best = 0;
  for (const std::string& answer : answers) best = std::max(best, ScoreOne(metric, text, answer, classes));
  return best;
}

}  // namespace moend::eval
