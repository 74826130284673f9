// Task suites: JSON lines of several makers in one form, a list of contexts with questions about each. A
// prompt is context.text + question.prompt, so that a context can be read and compressed once and then be
// asked many times.
//
// Formats, told apart by the fields of the first row that is a JSON object:
//   moend      {_id, context, questions: [{dataset, input, answers, metric, max_new_tokens, template?, stop?,
//              first_line?, all_classes?}]}; template defaults to "Question: {input}\nAnswer:". `stop`: texts
//              that end an answer. `first_line`: only the answer's first line counts (leading newlines
//              dropped), and the answer ends there; by default so where the metric looks at the whole answer,
//              the right ones have one line, and there is no `stop`: a model without an end token goes on
//              with a question of its own
//   LongBench  {dataset, context, input, answers, all_classes?, _id?}; see longbench.h
//   RULER      {input, outputs, answer_prefix?, index?}; the task by the file's name (niah_..., vt, ...), the
//              question being the last line of the input
//   math       {problem, answer} or {question, answer}; the data set by the file's name: aime..., math...,
//              gsm8k...
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "moend/base/error.h"
#include "moend/eval/metrics.h"

namespace moend::eval {

struct Question {
  std::string id;  // unique in its file
  std::string dataset;
  std::string prompt;  // what follows the context
  std::vector<std::string> answers;
  TaskMetric metric = TaskMetric::kExact;
  int64_t max_new_tokens = 0;
  std::vector<std::string> classes;  // for classification
  std::vector<std::string> stop;     // generation ends before the first of them
  bool first_line = false;           // only the answer's first line counts, leading newlines dropped
};

struct Context {
  std::string id;
  std::string text;
  bool chat = false;  // wrap the whole prompt in the model's chat template, if it has one
  int64_t line = 0;   // in the file, from 1
  std::vector<Question> questions;
};

struct MalformedRow {
  int64_t line = 0;
  std::string message;  // names the file, the line and what is wrong
};

struct Suite {
  std::string path;
  std::string name;  // the file's name without folder and extension
  std::vector<Context> contexts;
  std::vector<MalformedRow> malformed;  // rows that were left out

  int64_t n_questions() const;
  std::vector<std::string> datasets() const;  // in order of appearance
};

// Rows that do not hold what their format needs are left out and reported in `malformed`; a metric or data
// set that we do not know, or a file without any usable row, is an error.
Expected<Suite> LoadSuite(const std::string& path);
Expected<Suite> ParseSuite(const std::string& text, const std::string& path);

// Keeps the questions of the data sets named, and no context without questions. An empty list keeps all;
// kNotFound for a name that the suite lacks.
Expected<void> KeepDatasets(Suite& suite, const std::vector<std::string>& names);

// Keeps at most `n` questions of each data set, the first ones, and no context without questions. n <= 0
// keeps all.
void Limit(Suite& suite, int64_t n);

// Wraps every row in the model's chat template, or none; as their formats want it otherwise.
enum class ChatTemplate { kSuite, kAlways, kNever };
void SetChatTemplate(Suite& suite, ChatTemplate when);

// Whether an answer so far has ended its first line (leading newlines dropped); never while it thinks.
bool FirstLineEnded(std::string_view text);

double ScoreAnswer(const Question& question, std::string_view text);

}  // namespace moend::eval
