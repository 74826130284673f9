#include "moend/serve/metrics.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

namespace moend::serve {
namespace {

void Head(std::string& out, const char* name, const char* type, const char* help) {
  fmt::format_to(std::back_inserter(out), "# HELP moend_{0} {2}\n# TYPE moend_{0} {1}\n", name, type, help);
}

void Value(std::string& out, const char* name, const char* type, const char* help, int64_t value) {
  Head(out, name, type, help);
  fmt::format_to(std::back_inserter(out), "moend_{} {}\n", name, value);
}

}  // namespace

void Histogram::Observe(double seconds) {
  const auto i = std::ranges::lower_bound(kBounds, seconds) - kBounds.begin();
  const std::lock_guard lock(mutex_);
  ++counts_[static_cast<std::size_t>(i)];
  sum_ += seconds;
}

void Histogram::Write(std::string& out, const char* name, const char* help) const {
  Head(out, name, "histogram", help);
  const std::lock_guard lock(mutex_);
  int64_t total = 0;
  for (std::size_t i = 0; i < kBounds.size(); ++i) {
    total += counts_[i];
    fmt::format_to(std::back_inserter(out), "moend_{}_bucket{{le=\"{}\"}} {}\n", name, kBounds[i], total);
  }
  total += counts_.back();
  fmt::format_to(std::back_inserter(out),
                 "moend_{0}_bucket{{le=\"+Inf\"}} {1}\nmoend_{0}_sum {2}\nmoend_{0}_count {1}\n", name, total,
                 sum_);
}

void Metrics::CountRequest(const std::string& route, int status) {
  const std::lock_guard lock(mutex_);
  ++requests_[{route, status}];
}

std::string Metrics::Render(const Gauges& g) const {
  std::string out;
  Head(out, "requests_total", "counter", "Requests answered, by route and status.");
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [key, n] : requests_)
      fmt::format_to(std::back_inserter(out), "moend_requests_total{{route=\"{}\",status=\"{}\"}} {}\n",
                     key.first, key.second, n);
  }
  Value(out, "prompt_tokens_total", "counter", "Prompt tokens of finished and running requests.",
        prompt_tokens);
  Value(out, "cached_tokens_total", "counter", "Prompt tokens that a kept prefix spared.", cached_tokens);
  Value(out, "generated_tokens_total", "counter", "Tokens generated.", generated_tokens);
  Value(out, "decode_steps_total", "counter", "Decode steps, each over all running streams.", decode_steps);
  Value(out, "cancelled_total", "counter", "Requests whose client went away.", cancelled);
  Value(out, "compressions_total", "counter", "Idle contexts compressed further.", compressions);
  Value(out, "evictions_total", "counter", "Idle contexts dropped from memory.", evictions);
  Value(out, "prefixes_saved_total", "counter", "Prefixes handed to a store.", prefixes_saved);
  Value(out, "prefixes_loaded_total", "counter", "Prefixes loaded from a store.", prefixes_loaded);
  Value(out, "kv_bytes", "gauge", "K/V cache allocated now.", g.kv_bytes);
  Value(out, "kv_peak_bytes", "gauge", "Most K/V cache allocated at once.", g.kv_peak_bytes);
  Value(out, "kv_budget_bytes", "gauge", "The budget of all K/V caches together.", g.kv_budget_bytes);
  Value(out, "idle_contexts", "gauge", "Contexts kept for reuse.", g.prefixes);
  Value(out, "idle_context_tokens", "gauge", "Tokens of the contexts kept for reuse.", g.prefix_tokens);
  Value(out, "slots", "gauge", "Requests that can run at once.", g.slots);
  Value(out, "slots_busy", "gauge", "Requests running.", g.slots_busy);
  Value(out, "queued", "gauge", "Requests waiting.", g.queued);
  Value(out, "connections", "gauge", "Open connections.", g.connections);
  queue_seconds.Write(out, "queue_seconds", "Time from arrival to the start of the prefill.");
  first_token_seconds.Write(out, "first_token_seconds", "Time from arrival to the first token.");
  token_seconds.Write(out, "token_seconds", "Time of a decode step.");
  return out;
}

}  // namespace moend::serve
