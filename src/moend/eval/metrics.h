// Scores of answers: how well a generated text answers a question whose right answers are known. All scores
// are in [0, 1]; the published metrics are reproduced with their quirks, since their numbers are compared.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moend/base/error.h"

namespace moend::eval {

enum class TaskMetric {
  // Of the reference model's suite.
  kExact,         // equal when lower-cased and with white space folded
  kLeadingWords,  // share of the right answer's words that come before the first wrong one
  kLastNumber,    // the last number in the text equals the right one (also GSM8K)
  kFirstLine,     // kExact over the first line
  // Of LongBench v1 (Bai et al. 2023).
  kQaF1,             // F1 of the word multisets: lower case, no ASCII punctuation, no articles
  kQaF1Characters,   // the same over characters, for Chinese (the original cuts words with jieba)
  kRouge,            // ROUGE-L F, summary level over sets of words, as the Python package "rouge" computes it
  kRougeCharacters,  // the same over characters, for Chinese
  kClassification,   // 1 / number of class names in the text, if the right one is among them
  kRetrieval,        // share of the numbers in the text that equal the right one's
  kCount,            // likewise, the right answer being a bare number
  kCodeSim,          // similarity of the first line that is no comment, in hundredths
  // Others.
  kMath,      // the final answer equals the right one as a formula (MATH)
  kInteger,   // the final answer is this integer (AIME)
  kContains,  // share of the right answers that occur in the text, case ignored (RULER)
  kChoice,    // the first letter A to D that stands alone is the right one
};

Expected<TaskMetric> ParseTaskMetric(std::string_view name);  // kNotFound lists the names
const char* Name(TaskMetric metric);
std::vector<std::string> TaskMetricNames();

// What a reasoning model says after the last "</think>"; all of it without one.
std::string_view FinalAnswer(std::string_view text);

// The score of `text` against the best of `answers` (kContains: over all of them). `classes` only for
// kClassification. Scores FinalAnswer(text).
double Score(TaskMetric metric, std::string_view text, std::span<const std::string> answers,
             std::span<const std::string> classes = {});

// The letter that a text chooses: the first of A to D that stands alone ("B", "(B)", "B.", "Answer: B"; also
// in lower case when nothing else is said); 0 without one.
char ChosenLetter(std::string_view text);

// Of one right answer; exposed for their tests.
double QaF1(std::string_view text, std::string_view answer);
double RougeL(std::string_view text, std::string_view answer);
double Classification(std::string_view text, std::string_view answer, std::span<const std::string> classes);
double CodeSimilarity(std::string_view text, std::string_view answer);

}  // namespace moend::eval
