// What an evaluation found, and the JSON file that holds it: {"schema", "model", "suite", "settings",
// "complete", "runs": [{"variant", "scorer", "compression" (asked), "ratio" (allocated), "kv_bytes", "mode",
// "datasets": {NAME: {"score", "n", "low", "high", "paired"}}, "mean", "paired", "contexts", "answers",
// "plan"}]}. Scores are 0 to 1, intervals 95% (interval.h); "paired" is the comparison with the full cache on
// the same questions (paired.h). Everything that a resumed run needs is in the file.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "moend/base/error.h"
#include "moend/eval/interval.h"
#include "moend/plan/plan.h"

namespace moend::eval {

struct Answer {
  std::string id;  // the question's
  std::string dataset;
  double score = 0;
  int64_t tokens = 0;  // generated
  std::string text;
  std::vector<int32_t> ids = {};  // the generated tokens
  // Of the right answer's tokens (PreparedContext::golds): their number, the sum of their nats, and, but for
  // the full cache itself, how far each prediction is from the full cache's (KL, nats) and how many have the
  // same likeliest token.
  int64_t gold_tokens = 0;
  double nll = 0;
  std::vector<float> kld = {};
  int64_t same_top = 0;
  // Multiple choice: the log-probabilities of A to D, which `score` is made from, and the score of the letter
  // in the text.
  std::vector<double> letters = {};
  double letter_score = 0;
};

// A context that a run has finished: all its questions are answered.
struct FinishedContext {
  std::string id;
  int64_t tokens = 0;         // read
  int64_t kv_bytes = 0;       // allocated after compression, before the first question; mean in aware mode
  int64_t kv_bytes_full = 0;  // what the same tokens take at 16 bit
};

struct Run {
  std::string variant, scorer, mode;  // mode: agnostic or aware
  double compression = 0;             // asked for; 0 where nothing is (full, plans from files, plain bits)
  Plan plan;
  std::vector<FinishedContext> contexts;
  std::vector<Answer> answers;

  int64_t kv_bytes() const;  // mean over the contexts
  double ratio() const;      // all contexts' full bytes over their allocated ones
  // "2d_hetero/snapkv 14x", unique among the runs of an evaluation.
  std::string label() const;
};

// What must be equal for two runs to be continued or compared.
struct Settings {
  std::string suite;       // file name
  std::string suite_hash;  // of the questions that are asked
  std::string mode;
  int64_t prompt_tokens = 0;   // limit of a prompt
  int64_t max_new_tokens = 0;  // overrides the questions' own; 0: theirs
  double max_new_scale = 1;
  int64_t context_length = 0;  // that plans were solved for
  bool operator==(const Settings&) const = default;
};

struct Results {
  static constexpr int kSchema = 1;
  Fingerprint model;
  Settings settings;
  int64_t n_contexts = 0, n_questions = 0;
  int64_t n_malformed = 0;  // rows of the suite that were left out
  int64_t n_truncated = 0;  // contexts that lost their middle
  bool complete = false;
  std::vector<Run> runs;
};

// Scores by data set, in order of appearance.
std::vector<std::pair<std::string, Estimate>> Summarize(const Run& run);
Estimate MeanScore(const Run& run);  // over the data sets

// The share of right letters in the texts, over the multiple-choice questions of a data set; n = 0 without.
Estimate LetterScore(const Run& run, const std::string& dataset);

std::string ToJson(const Results& results);
// kCorrupt names `source` and what is wrong.
Expected<Results> ParseResults(const std::string& json, const std::string& source);
Expected<Results> LoadResults(const std::string& path);

// A Markdown table: a row a run; the mean over the data sets, the difference to the full cache, the
// divergence from it where it was measured, and a column a data set ("97.2 [91, 99]", in percent).
std::string FormatTable(const Results& results);

}  // namespace moend::eval
