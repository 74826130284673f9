// Reading and generating with the clock running.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>

#include "moend/base/error.h"
#include "moend/engine/engine.h"
#include "moend/engine/generate.h"

namespace moend::cli {

// What the line at the end tells.
struct RunStats {
  int64_t prompt_tokens = 0, generated_tokens = 0;
  double prefill_seconds = 0, decode_seconds = 0;

  double prefill_tps() const;  // tokens a second; 0 when nothing was read
  double decode_tps() const;
  std::string Line(const KvStats& kv) const;
};

// Prefill with a progress bar; adds to `stats`. Ctrl-C ends it with kCancelled.
Expected<void> TimedPrefill(Session& session, std::span<const int32_t> tokens, RunStats& stats);
Expected<Generated> TimedGenerate(Session& session, const GenerateOptions& options,
                                  const std::function<bool(std::string_view)>& emit, RunStats& stats);

}  // namespace moend::cli
