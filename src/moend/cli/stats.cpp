#include "moend/cli/stats.h"

#include <fmt/format.h>

#include <chrono>

#include "moend/cli/common.h"
#include "moend/cli/progress.h"

namespace moend::cli {
namespace {

double Rate(int64_t tokens, double seconds) {
  return tokens > 0 && seconds > 0 ? static_cast<double>(tokens) / seconds : 0;
}

}  // namespace

double RunStats::prefill_tps() const {
  return Rate(prompt_tokens, prefill_seconds);
}
double RunStats::decode_tps() const {
  return Rate(generated_tokens, decode_seconds);
}

std::string RunStats::Line(const KvStats& kv) const {
  return fmt::format(
      "{} prompt tokens, {} generated; K/V {:.2f} MiB of {:.2f} MiB at 16 bit ({:.1f}x), peak {:.2f} MiB{}; "
      "prefill {:.1f} tokens/s, decode {:.1f} tokens/s",
      prompt_tokens, generated_tokens, MiB(kv.bytes), MiB(kv.bytes_full), kv.compression(),
      MiB(kv.peak_bytes),
      kv.device_bytes > 0 ? fmt::format(", copies on the device {:.2f} MiB", MiB(kv.device_bytes)) : "",
      prefill_tps(), decode_tps());
}

Expected<void> TimedPrefill(Session& session, std::span<const int32_t> tokens, RunStats& stats) {
  const auto start = std::chrono::steady_clock::now();
  ProgressBar bar("reading");
  MOEND_TRY(session.Prefill(tokens, [&](double share) {
    bar.Update(share);
    return !Interrupt::requested();
  }));
  stats.prefill_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  stats.prompt_tokens += static_cast<int64_t>(tokens.size());
  return {};
}

Expected<Generated> TimedGenerate(Session& session, const GenerateOptions& options,
                                  const std::function<bool(std::string_view)>& emit, RunStats& stats) {
  MOEND_ASSIGN(Generated result, Generate(session, options, emit));
  stats.decode_seconds += result.seconds;
  stats.generated_tokens += static_cast<int64_t>(result.tokens.size());
  return result;
}

}  // namespace moend::cli
