// The tasks of LongBench v1 (Bai et al. 2023, MIT licence): prompt templates, answer lengths and metrics as
// published with the benchmark.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "moend/eval/metrics.h"

namespace moend::eval {

struct LongBenchTask {
  std::string_view name;
  std::string_view prompt;  // with {context} and then, in most, {input}
  int64_t max_new_tokens = 0;
  TaskMetric metric = TaskMetric::kQaF1;
  bool chat = true;         // whether the chat template is applied
  bool first_line = false;  // only the answer's first line counts, leading newlines dropped
  bool one_line = false;    // generation stops at a newline
};

std::span<const LongBenchTask> LongBenchTasks();

// By the name in a row's "dataset", also with the suffix "_e" (LongBench-E) or "_rebuilt"; nullptr if
// unknown.
const LongBenchTask* FindLongBenchTask(std::string_view dataset);

}  // namespace moend::eval
