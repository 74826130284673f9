#include "moend/eval/suite_rows.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>

#include "moend/eval/longbench.h"
#include "moend/eval/text.h"

namespace moend::eval {
namespace {

using nlohmann::json;

constexpr int64_t kMostNewTokens = int64_t{1} << 20;
constexpr std::string_view kStepByStep =
    "\n\nPlease reason step by step, and put your final answer within \\boxed{}.\n";

Expected<std::string> Text(const json& row, const char* key) {
  const auto it = row.find(key);
  if (it == row.end()) return Fail(ErrorCode::kCorrupt, "\"{}\" is missing", key);
  if (!it->is_string()) return Fail(ErrorCode::kCorrupt, "\"{}\" is {}, not text", key, it->type_name());
  return it->get<std::string>();
}

// Text, or a whole number as text: makers disagree on how to write ids and answers.
std::optional<std::string> TextOrInteger(const json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_number_integer()) return value.dump();
  return {};
}

Expected<std::vector<std::string>> Texts(const json& row, const char* key) {
  const auto it = row.find(key);
  if (it == row.end()) return Fail(ErrorCode::kCorrupt, "\"{}\" is missing", key);
  if (!it->is_array() || it->empty())
    return Fail(ErrorCode::kCorrupt, "\"{}\" is not a list of at least one text", key);
  std::vector<std::string> texts;
  for (const json& value : *it) {
    auto text = TextOrInteger(value);
    if (!text) return Fail(ErrorCode::kCorrupt, "\"{}\" holds {}, not text", key, value.type_name());
    texts.push_back(std::move(*text));
  }
  return texts;
}

std::string Id(const json& row, const char* key) {
  const auto it = row.find(key);
  return it == row.end() ? std::string() : TextOrInteger(*it).value_or("");
}

// Metrics that compare all of an answer with a right one that is short. Not kExact and kLastNumber, whose
// answers (of our own suite) end by themselves.
bool ComparesWhole(TaskMetric metric) {
  switch (metric) {
    case TaskMetric::kQaF1:
    case TaskMetric::kQaF1Characters:
    case TaskMetric::kRetrieval:
    case TaskMetric::kCount:
    case TaskMetric::kClassification:
    case TaskMetric::kContains:
    case TaskMetric::kChoice:
      return true;
    default:
      return false;
  }
}

// Where an answer ends: "stop", a text or several, and "first_line".
Expected<void> ReadEnd(const json& row, Question& q) {
  const auto stop = row.find("stop");
  if (stop != row.end() && stop->is_string()) {
    q.stop = {stop->get<std::string>()};
  } else if (stop != row.end()) {
    MOEND_ASSIGN(q.stop, Texts(row, "stop"));
  }
  if (std::ranges::any_of(q.stop, &std::string::empty))
    return Fail(ErrorCode::kCorrupt, "\"stop\" holds an empty text");
  const auto first = row.find("first_line");
  if (first != row.end() && !first->is_boolean())
    return Fail(ErrorCode::kCorrupt, "\"first_line\" is {}, not true or false", first->type_name());
  const auto one_line = [](const std::string& answer) {
    return Trim(answer).find('\n') == std::string_view::npos;
  };
  q.first_line = first != row.end()
                     ? first->get<bool>()
                     : ComparesWhole(q.metric) && q.stop.empty() && std::ranges::all_of(q.answers, one_line);
  return {};
}

Expected<Question> MoendQuestion(const json& row) {
  if (!row.is_object()) return Fail(ErrorCode::kCorrupt, "a question is {}, not an object", row.type_name());
  Question q;
  MOEND_ASSIGN(q.dataset, Text(row, "dataset"));
  MOEND_ASSIGN(q.answers, Texts(row, "answers"));
  MOEND_ASSIGN(const std::string metric, Text(row, "metric"));
  MOEND_ASSIGN(q.metric, ParseTaskMetric(metric));
  MOEND_ASSIGN(const std::string input, Text(row, "input"));
  std::string form = "Question: {input}\nAnswer:";
  if (row.contains("template")) {
    MOEND_ASSIGN(form, Text(row, "template"));
    if (form.find("{input}") == std::string::npos)
      return Fail(ErrorCode::kCorrupt, "\"template\" has no {{input}}");
  }
  q.prompt = ReplaceAll(form, "{input}", input);
  const auto length = row.find("max_new_tokens");
  if (length == row.end() || !length->is_number_integer() || *length < 1 || *length > kMostNewTokens)
    return Fail(ErrorCode::kCorrupt, "\"max_new_tokens\" is not a whole number from 1 to {}", kMostNewTokens);
  q.max_new_tokens = length->get<int64_t>();
  if (row.contains("all_classes")) {
    MOEND_ASSIGN(q.classes, Texts(row, "all_classes"));
  } else if (q.metric == TaskMetric::kClassification) {
    return Fail(ErrorCode::kCorrupt, "\"all_classes\" is missing");
  }
  if (q.metric == TaskMetric::kChoice)
    for (const std::string& answer : q.answers)
      if (answer.size() != 1 || answer[0] < 'A' || answer[0] > 'D')
        return Fail(ErrorCode::kCorrupt, "the answer to a choice is a letter from A to D, not \"{}\"",
                    answer.substr(0, 40));
  MOEND_TRY(ReadEnd(row, q));
  return q;
}

Expected<Context> MoendRow(const json& row) {
  Context context;
  context.id = Id(row, "_id");
  MOEND_ASSIGN(context.text, Text(row, "context"));
  const json& questions = row["questions"];
  if (!questions.is_array() || questions.empty())
    return Fail(ErrorCode::kCorrupt, "\"questions\" is not a list of at least one question");
  for (std::size_t i = 0; i < questions.size(); ++i) {
    auto question = MoendQuestion(questions[i]);
    if (!question) return Fail(question.error().code, "questions[{}]: {}", i, question.error().message);
    context.questions.push_back(std::move(*question));
  }
  return context;
}

// ['Food', "Pilot's code"]: a list as Python prints it, which is how some copies of LongBench hold it.
std::optional<std::vector<std::string>> PythonList(std::string_view text) {
  text = Trim(text);
  if (!text.starts_with('[') || !text.ends_with(']')) return {};
  text = Trim(text.substr(1, text.size() - 2));
  std::vector<std::string> items;
  while (!text.empty()) {
    const char quote = text.front();
    if (quote != '\'' && quote != '"') return {};
    std::string item;
    std::size_t i = 1;
    for (; i < text.size() && text[i] != quote; ++i) {
      if (text[i] == '\\' && i + 1 < text.size()) ++i;
      item += text[i];
    }
    if (i >= text.size()) return {};
    items.push_back(std::move(item));
    text = Trim(text.substr(i + 1));
    if (text.empty()) break;
    if (text.front() != ',') return {};
    text = Trim(text.substr(1));
  }
  return items;
}

Expected<Context> LongBenchRow(const json& row) {
  Context context;
  Question q;
  context.id = Id(row, "_id");
  MOEND_ASSIGN(q.dataset, Text(row, "dataset"));
  const LongBenchTask* task = FindLongBenchTask(q.dataset);
  if (!task) {
    std::vector<std::string_view> names;
    for (const LongBenchTask& known : LongBenchTasks()) names.push_back(known.name);
    return Fail(ErrorCode::kNotFound, "LongBench has no data set \"{}\"; possible: {}", q.dataset,
                fmt::join(names, ", "));
  }
  MOEND_ASSIGN(const std::string text, Text(row, "context"));
  MOEND_ASSIGN(const std::string input, Text(row, "input"));
  MOEND_ASSIGN(q.answers, Texts(row, "answers"));
  if (task->metric == TaskMetric::kClassification) {
    const auto classes = row.find("all_classes");
    std::optional<std::vector<std::string>> names;
    if (classes != row.end() && classes->is_string()) names = PythonList(classes->get<std::string>());
    if (names) {
      q.classes = std::move(*names);
    } else {
      MOEND_ASSIGN(q.classes, Texts(row, "all_classes"));
    }
  }
  // Everything up to the context belongs to what can be read before the question is known.
  constexpr std::string_view kContext = "{context}";
  const std::size_t at = task->prompt.find(kContext);
  context.text = std::string(task->prompt.substr(0, at)) + text;
  q.prompt = ReplaceAll(task->prompt.substr(at + kContext.size()), "{input}", input);
  q.metric = task->metric;
  q.max_new_tokens = task->max_new_tokens;
  q.first_line = task->first_line;
  if (task->one_line) q.stop = {"\n"};
  context.chat = task->chat;
  context.questions.push_back(std::move(q));
  return context;
}

struct RulerTask {
  std::string_view prefix;
  int64_t max_new_tokens;
};
// Answer lengths as RULER's own configuration sets them (Hsieh et al. 2024).
constexpr std::array<RulerTask, 5> kRulerTasks = {
    {{"niah", 128}, {"vt", 30}, {"cwe", 120}, {"fwe", 50}, {"qa", 32}}};

Expected<Context> RulerRow(const json& row, const std::string& name) {
  const auto task =
      std::ranges::find_if(kRulerTasks, [&](const RulerTask& t) { return name.starts_with(t.prefix); });
  if (task == kRulerTasks.end())
    return Fail(ErrorCode::kNotFound,
                "the file's name \"{}\" tells no RULER task; it must begin with niah, vt, cwe, fwe or qa",
                name);
  Context context;
  Question q;
  context.id = Id(row, "index");
  MOEND_ASSIGN(std::string input, Text(row, "input"));
  MOEND_ASSIGN(q.answers, Texts(row, "outputs"));
  if (row.contains("answer_prefix")) {
    MOEND_ASSIGN(const std::string prefix, Text(row, "answer_prefix"));
    input += prefix;
  }
  const std::size_t last_line = input.find_last_of('\n', input.find_last_not_of(" \n"));
  if (last_line == std::string::npos)
    return Fail(ErrorCode::kCorrupt,
                "\"input\" is a single line; the question must stand on a line of its own");
  context.text = input.substr(0, last_line + 1);
  q.prompt = input.substr(last_line + 1);
  q.dataset = name;
  q.metric = TaskMetric::kContains;
  q.max_new_tokens = task->max_new_tokens;
  context.questions.push_back(std::move(q));
  return context;
}

struct MathSet {
  std::string_view prefix;
  TaskMetric metric;
  int64_t max_new_tokens;  // room for the thoughts of a reasoning model
};
constexpr std::array<MathSet, 3> kMathSets = {{{"aime", TaskMetric::kInteger, 16384},
                                               {"math", TaskMetric::kMath, 8192},
                                               {"gsm8k", TaskMetric::kLastNumber, 2048}}};

Expected<Context> MathRow(const json& row, const std::string& name) {
  const auto set =
      std::ranges::find_if(kMathSets, [&](const MathSet& s) { return name.starts_with(s.prefix); });
  if (set == kMathSets.end())
    return Fail(ErrorCode::kNotFound,
                "the file's name \"{}\" tells no data set; it must begin with aime, math or gsm8k", name);
  Context context;
  Question q;
  MOEND_ASSIGN(context.text, Text(row, row.contains("problem") ? "problem" : "question"));
  context.id = row.contains("unique_id") ? Id(row, "unique_id") : Id(row, row.contains("id") ? "id" : "idx");
  const auto answer = row.find("answer");
  std::optional<std::string> text;
  if (answer != row.end()) text = TextOrInteger(*answer);
  if (!text) return Fail(ErrorCode::kCorrupt, "\"answer\" is missing or no text");
  // GSM8K gives the worked solution, the result behind four hashes.
  if (const std::size_t hashes = text->rfind("####"); hashes != std::string::npos) text->erase(0, hashes + 4);
  q.answers = {std::string(Trim(*text))};
  if (q.answers[0].empty()) return Fail(ErrorCode::kCorrupt, "\"answer\" is empty");
  q.prompt = kStepByStep;
  q.dataset = name;
  q.metric = set->metric;
  q.max_new_tokens = set->max_new_tokens;
  context.chat = true;
  context.questions.push_back(std::move(q));
  return context;
}

}  // namespace

SuiteFormat GuessFormat(const json& row) {
  if (row.contains("questions")) return SuiteFormat::kMoend;
  if (row.contains("outputs") && row.contains("input")) return SuiteFormat::kRuler;
  if (row.contains("answers") && row.contains("context")) return SuiteFormat::kLongBench;
  if (row.contains("answer") && (row.contains("problem") || row.contains("question")))
    return SuiteFormat::kMath;
  return SuiteFormat::kUnknown;
}

Expected<Context> ParseRow(SuiteFormat format, const json& row, const std::string& name) {
  if (!row.is_object()) return Fail(ErrorCode::kCorrupt, "the row is {}, not an object", row.type_name());
  if (GuessFormat(row) != format)
    return Fail(ErrorCode::kCorrupt, "the row lacks the fields that the file's first row has");
  auto context = format == SuiteFormat::kMoend       ? MoendRow(row)
                 : format == SuiteFormat::kLongBench ? LongBenchRow(row)
                 : format == SuiteFormat::kRuler     ? RulerRow(row, name)
                                                     : MathRow(row, name);
  if (context && Trim(context->text).empty()) return Fail(ErrorCode::kCorrupt, "the context is empty");
  return context;
}

}  // namespace moend::eval
