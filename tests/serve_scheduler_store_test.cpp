// The scheduler beside its stores, its kept answers, and short of memory.
#include <gtest/gtest.h>

#include <map>
#include <new>

#include "tests/support/serve_client.h"
#include "tests/support/serve_jobs.h"
#include "tests/support/serve_store.h"

namespace moend::serve {
namespace {

using test::Eventually;
using test::FakeBackend;
using test::FakeOptions;
using test::Finish;
using test::Letters;
using test::Machine;
using test::MakeJob;
using test::Result;
using namespace std::chrono_literals;

TEST(SchedulerStore, APrefixOutlivesItsServer) {
  std::map<std::string, std::string> values;
  std::atomic<bool> answers = true;
  const std::string document = Letters(1000, 9);
  {
    const auto store = test::MakeSlowStore(values, answers);
    Machine m({}, {}, {}, store.get());
    auto job = MakeJob(document + "one", 5);
    ASSERT_TRUE(m.scheduler.Submit(job));
    Finish(*job);
    EXPECT_EQ(m.metrics.prefixes_saved, 1);
  }
  ASSERT_EQ(values.size(), 1u);
  const auto store = test::MakeSlowStore(values, answers);
  Machine m({}, {}, {}, store.get());
  auto foreign = MakeJob(document + "two", 5, "other key");
  ASSERT_TRUE(m.scheduler.Submit(foreign));
  EXPECT_EQ(Finish(*foreign).outcome.cached_tokens, 0);
  auto job = MakeJob(document + "two", 5);
  ASSERT_TRUE(m.scheduler.Submit(job));
  const Result r = Finish(*job);
  EXPECT_EQ(r.outcome.cached_tokens, job->split);
  EXPECT_EQ(r.text, m.backend.Expect(job->prompt, 5));
  EXPECT_EQ(m.backend.restored, 1);
}

// A store that never answers: who asks it goes on without it, and others start meanwhile.
TEST(SchedulerStore, ASlowOneHoldsUpNobody) {
  std::map<std::string, std::string> values;
  std::atomic<bool> answers = false;
  const auto store = test::MakeSlowStore(values, answers);
  FakeOptions fake;
  fake.step = 1ms;
  SchedulerOptions options;
  options.slots = 1;
  Machine m(fake, options, {}, store.get());
  auto stream = MakeJob("x", 4000);
  ASSERT_TRUE(m.scheduler.Submit(stream));
  ASSERT_TRUE(Eventually([&] { return stream->phase == Phase::kDecode; }));
  auto asking = MakeJob(Letters(1000, 10), 5), leaving = MakeJob(Letters(1000, 12), 5);
  auto other = MakeJob("too short to be asked for", 5);
  for (const auto& job : {asking, leaving, other}) ASSERT_TRUE(m.scheduler.Submit(job));
  leaving->Cancel();
  stream->Cancel();  // now there is a slot
  const Result late = Finish(*asking);
  EXPECT_EQ(late.text, m.backend.Expect(asking->prompt, 5));
  EXPECT_EQ(other->phase, Phase::kDone);  // although it came later
  EXPECT_EQ(Finish(*other).text, m.backend.Expect(other->prompt, 5));
  EXPECT_TRUE(Finish(*leaving).outcome.error);
  EXPECT_EQ(m.backend.restored, 0);
  answers = true;
  answers.notify_all();
  auto next = MakeJob(Letters(1000, 11), 5);
  ASSERT_TRUE(m.scheduler.Submit(next));
  EXPECT_EQ(Finish(*next).text, m.backend.Expect(next->prompt, 5));
}

// A backend with a token for two letters, which its own tokenizer never makes.
struct TwoLetters : FakeBackend {
  static constexpr int32_t kBoth = 200;
  std::string Piece(int32_t token) const override {
    return token == kBoth ? "ab" : FakeBackend::Piece(token);
  }
};

// An answer's tokens are reused where its text is the message's, however the text would be tokenized.
TEST(Scheduler, AChatGoesOnFromTheTokensThatWereGenerated) {
  TwoLetters backend;
  Metrics metrics;
  Scheduler scheduler(backend, nullptr, {}, {}, metrics, Log());
  const auto ask = [&](std::vector<int32_t> prompt, int64_t n) {
    auto job = std::make_shared<Job>();
    job->scope = "s";
    job->prompt = std::move(prompt);
    job->max_tokens = n;
    job->keep_after = true;
    job->pick.sampler.temperature = 0;
    job->pick.logit_bias = {{TwoLetters::kBoth, 100.0f}};
    EXPECT_TRUE(scheduler.Submit(job));
    return Finish(*job);
  };
  const auto bytes = [](const std::string& text) { return std::vector<int32_t>(text.begin(), text.end()); };
  const std::string document = Letters(300, 4);
  const Result first = ask(bytes(document), 3);
  ASSERT_EQ(first.text, "ababab");
  // Two of the three tokens were read; the last one was only picked.
  const Result second = ask(bytes(document + "ababab, and?"), 2);
  EXPECT_EQ(second.outcome.cached_tokens, 302);
  EXPECT_EQ(second.outcome.prompt_tokens, 303 + 6);
  // The turn after that, with two answers in it.
  const Result third = ask(bytes(document + "ababab, and?abab!"), 1);
  EXPECT_EQ(third.outcome.cached_tokens, 303 + 6 + 1);
  EXPECT_EQ(third.outcome.prompt_tokens, 303 + 6 + 2 + 1);
  // Another text: nothing of it.
  EXPECT_EQ(ask(bytes(document + "ababaX"), 1).outcome.cached_tokens, 0);
}

// Memory that ends while streams are looked through ends requests, not the server.
struct ForgetfulBackend : FakeBackend {
  mutable std::atomic<int> forgets{0};  // the how manieth call from now on fails
  std::string Piece(int32_t token) const override {
    if (forgets.fetch_sub(1) == 1) throw std::bad_alloc();
    return FakeBackend::Piece(token);
  }
};

TEST(Scheduler, ShortOfMemoryItFailsRequestsAndGoesOn) {
  ForgetfulBackend backend;
  Metrics metrics;
  Scheduler scheduler(backend, nullptr, {}, {}, metrics, Log());
  const FakeBackend plain;
  for (const int k : {1, 2, 3, 5, 8, 30, 70}) {
    backend.forgets = k;
    int failed = 0;
    std::vector<std::shared_ptr<Job>> jobs;
    for (int i = 0; i < 4; ++i) jobs.push_back(MakeJob("memory " + std::to_string(i), 40));
    for (const auto& job : jobs) ASSERT_TRUE(scheduler.Submit(job));
    for (const auto& job : jobs) {
      const Result r = Finish(*job);
      if (r.outcome.error) {
        EXPECT_EQ(r.outcome.error->status, 503);
        ++failed;
      } else {
        EXPECT_EQ(r.text, plain.Expect(job->prompt, 40));
      }
    }
    EXPECT_GE(failed, 1);
    auto after = MakeJob("after", 5);
    ASSERT_TRUE(scheduler.Submit(after));
    EXPECT_EQ(Finish(*after).text, plain.Expect(after->prompt, 5));
  }
}

}  // namespace
}  // namespace moend::serve
