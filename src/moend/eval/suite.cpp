#include "moend/eval/suite.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>

#include "moend/base/file.h"
#include "moend/eval/suite_rows.h"
#include "moend/eval/text.h"

namespace moend::eval {
namespace {

// RULER writes niah_single_1/validation.jsonl: then the folder tells the task.
std::string SuiteName(const std::string& path) {
  const std::filesystem::path p(path);
  const std::string stem = p.stem().string();
  if ((stem == "validation" || stem == "test") && p.has_parent_path())
    return p.parent_path().filename().string();
  return stem;
}

// Ids must tell questions apart, since an interrupted run is continued by them.
void MakeIdsUnique(Suite& suite) {
  std::set<std::string> seen;
  for (Context& context : suite.contexts) {
    if (context.id.empty() || seen.contains(context.id))
      context.id = fmt::format("{}{}line {}", context.id, context.id.empty() ? "" : ", ", context.line);
    seen.insert(context.id);
    for (std::size_t i = 0; i < context.questions.size(); ++i)
      context.questions[i].id =
          context.questions.size() == 1 ? context.id : fmt::format("{}#{}", context.id, i);
  }
}

}  // namespace

int64_t Suite::n_questions() const {
  int64_t n = 0;
  for (const Context& context : contexts) n += static_cast<int64_t>(context.questions.size());
  return n;
}

std::vector<std::string> Suite::datasets() const {
  std::vector<std::string> names;
  for (const Context& context : contexts)
    for (const Question& q : context.questions)
      if (std::ranges::find(names, q.dataset) == names.end()) names.push_back(q.dataset);
  return names;
}

Expected<Suite> LoadSuite(const std::string& path) {
  MOEND_ASSIGN(const std::string text, ReadFile(path));
  return ParseSuite(text, path);
}

Expected<Suite> ParseSuite(const std::string& text, const std::string& path) {
  Suite suite;
  suite.path = path;
  suite.name = SuiteName(path);
  SuiteFormat format = SuiteFormat::kUnknown;
  std::string_view rest = text;
  if (rest.starts_with("\xEF\xBB\xBF")) rest.remove_prefix(3);
  for (int64_t line = 1; !rest.empty(); ++line) {
    const std::size_t end = std::min(rest.find('\n'), rest.size());
    const std::string_view row_text = Trim(rest.substr(0, end));
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (row_text.empty()) continue;
    const auto malformed = [&](std::string_view what) {
      suite.malformed.push_back({line, fmt::format("{}:{}: {}", path, line, what)});
    };
    const nlohmann::json row = nlohmann::json::parse(row_text, nullptr, /*allow_exceptions=*/false);
    if (row.is_discarded()) {
      malformed("the row is no JSON");
      continue;
    }
    if (format == SuiteFormat::kUnknown && row.is_object()) format = GuessFormat(row);
    if (format == SuiteFormat::kUnknown) {
      malformed(
          "the row is of no known format; known are moend {context, questions}, LongBench {context, "
          "answers}, "
          "RULER {input, outputs} and math {problem, answer}");
      continue;
    }
    auto context = ParseRow(format, row, suite.name);
    if (!context && context.error().code == ErrorCode::kNotFound)
      return Fail(ErrorCode::kNotFound, "{}:{}: {}", path, line, context.error().message);
    if (!context) {
      malformed(context.error().message);
      continue;
    }
    context->line = line;
    suite.contexts.push_back(std::move(*context));
  }
  if (suite.contexts.empty()) {
    if (suite.malformed.empty()) return Fail(ErrorCode::kCorrupt, "{}: the file has no rows", path);
    return Fail(ErrorCode::kCorrupt, "none of the {} rows can be used; the first: {}", suite.malformed.size(),
                suite.malformed.front().message);
  }
  MakeIdsUnique(suite);
  return suite;
}

Expected<void> KeepDatasets(Suite& suite, const std::vector<std::string>& names) {
  if (names.empty()) return {};
  const std::vector<std::string> known = suite.datasets();
  for (const std::string& name : names)
    if (std::ranges::find(known, name) == known.end())
      return Fail(ErrorCode::kNotFound, "{} has no data set \"{}\"; it has {}", suite.path, name,
                  fmt::join(known, ", "));
  for (Context& context : suite.contexts)
    std::erase_if(context.questions,
                  [&](const Question& q) { return std::ranges::find(names, q.dataset) == names.end(); });
  std::erase_if(suite.contexts, [](const Context& context) { return context.questions.empty(); });
  return {};
}

void Limit(Suite& suite, int64_t n) {
  if (n <= 0) return;
  std::map<std::string, int64_t> taken;
  for (Context& context : suite.contexts)
    std::erase_if(context.questions, [&](const Question& q) { return ++taken[q.dataset] > n; });
  std::erase_if(suite.contexts, [](const Context& context) { return context.questions.empty(); });
}

void SetChatTemplate(Suite& suite, ChatTemplate when) {
  if (when == ChatTemplate::kSuite) return;
  for (Context& context : suite.contexts) context.chat = when == ChatTemplate::kAlways;
}

bool FirstLineEnded(std::string_view text) {
  if (text.find("<think>") != std::string_view::npos && text.find("</think>") == std::string_view::npos)
    return false;
  text = FinalAnswer(text);
  text.remove_prefix(std::min(text.find_first_not_of('\n'), text.size()));
  return text.find('\n') != std::string_view::npos;
}

double ScoreAnswer(const Question& question, std::string_view text) {
  text = FinalAnswer(text);
  if (question.first_line) text = FirstLine(text);
  return Score(question.metric, text, question.answers, question.classes);
}

}  // namespace moend::eval
