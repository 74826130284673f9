// How fast an engine reads and generates, in llama-bench's manner: a context of `depth` random tokens, then
// the time of reading (pp) or of generating (tg) n more.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "moend/base/error.h"
#include "moend/engine/engine.h"
#include "moend/plan/plan.h"

namespace moend {

enum class SpeedTest {
  kPrompt,    // Prefill of n tokens, the compression of their K/V included; llama-bench's pp
  kGenerate,  // n calls of Decode, evictions included; llama-bench's tg
};

// "pp" or "tg".
const char* ShortName(SpeedTest test);

struct SpeedRun {
  SpeedTest test = SpeedTest::kPrompt;
  int64_t n = 512;    // at least 1
  int64_t depth = 0;  // tokens that are in the context before
};

struct SpeedOptions {
  int repetitions = 5;            // at least 1
  bool warm_up = true;            // one more run before, which does not count
  std::function<bool()> go_on{};  // asked now and then; false stops with kCancelled
};

struct SpeedResult {
  SpeedRun run;
  std::vector<double> tps;  // tokens a second of each repetition
  int64_t kv_bytes = 0;     // of the session's K/V cache after the last repetition

  double mean() const;
  double stddev() const;  // of the sample (n - 1), 0 for one repetition
  double median() const;
};

// Runs that share a plan; those of one depth that follow each other share its context, which is read once.
// `report` gets each result as soon as it is there. Tokens are random, of a fixed seed. Generating in an
// empty context starts from one token. Errors are those of Session, and kInvalidArgument for a run that is
// none.
Expected<void> MeasureSpeed(const std::shared_ptr<Engine>& engine, const Plan& plan,
                            const std::vector<SpeedRun>& runs, const SpeedOptions& options,
                            const std::function<void(const SpeedResult&)>& report);

}  // namespace moend
