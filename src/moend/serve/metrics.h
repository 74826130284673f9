// Counters in Prometheus' text format. Thread safe.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

namespace moend::serve {

class Histogram {
 public:
  void Observe(double seconds);
  void Write(std::string& out, const char* name, const char* help) const;

 private:
  static constexpr std::array<double, 14> kBounds = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,
                                                     0.25,  0.5,    1,     2.5,  5,     10,   60};
  mutable std::mutex mutex_;
  std::array<int64_t, kBounds.size() + 1> counts_{};
  double sum_ = 0;
};

// State that is read when asked for, not counted.
struct Gauges {
  int64_t kv_bytes = 0, kv_peak_bytes = 0, kv_budget_bytes = 0;
  int64_t prefixes = 0, prefix_tokens = 0;
  int64_t slots = 0, slots_busy = 0, queued = 0, connections = 0;
};

class Metrics {
 public:
  std::atomic<int64_t> prompt_tokens{0}, cached_tokens{0}, generated_tokens{0}, decode_steps{0};
  std::atomic<int64_t> cancelled{0}, compressions{0}, evictions{0}, prefixes_saved{0}, prefixes_loaded{0};
  Histogram queue_seconds, first_token_seconds, token_seconds;

  void CountRequest(const std::string& route, int status);
  std::string Render(const Gauges& gauges) const;

 private:
  mutable std::mutex mutex_;
  std::map<std::pair<std::string, int>, int64_t> requests_;
};

}  // namespace moend::serve
