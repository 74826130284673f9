// A scheduler over the fake backend, and requests for it.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <random>
#include <string>

#include "moend/serve/prefix_split.h"
#include "moend/serve/scheduler.h"
#include "tests/support/serve_fake.h"

namespace moend::serve::test {

struct Machine {
  explicit Machine(const FakeOptions& fake = {}, const SchedulerOptions& options = {},
                   const Limits& limits = {}, PrefixStore* store = nullptr)
      : backend(fake), scheduler(backend, store, limits, options, metrics, Log()) {}
  FakeBackend backend;
  Metrics metrics;
  Scheduler scheduler;
};

inline std::shared_ptr<Job> MakeJob(const std::string& prompt, int64_t max_tokens,
                                    const std::string& scope = "s") {
  auto job = std::make_shared<Job>();
  job->scope = scope;
  job->prompt = {FakeBackend::kBegin};
  for (const char c : prompt) job->prompt.push_back(static_cast<unsigned char>(c));
  job->split = SplitLength(std::ssize(job->prompt), 0, 256);
  job->max_tokens = max_tokens;
  job->pick.sampler.temperature = 0;
  return job;
}

struct Result {
  std::string text;
  Outcome outcome;
};

inline Result Finish(Job& job) {
  Result r;
  for (int i = 0; i < 200; ++i) {
    auto event = job.Wait(std::chrono::milliseconds(100));
    r.text += event.delta.text;
    if (event.outcome) {
      r.outcome = *event.outcome;
      return r;
    }
  }
  ADD_FAILURE() << "a request never ended";
  return r;
}

inline std::string Letters(int64_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::string s;
  for (int64_t i = 0; i < n; ++i) s += static_cast<char>('A' + random() % 26);
  return s;
}

}  // namespace moend::serve::test
