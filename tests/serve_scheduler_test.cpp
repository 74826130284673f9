// Continuous batching over a backend without a model: joining, cancelling, fairness, the memory budget, reuse
// of prefixes.
#include <gtest/gtest.h>

#include <map>

#include "tests/support/serve_client.h"
#include "tests/support/serve_jobs.h"

namespace moend::serve {
namespace {

using test::Eventually;
using test::FakeBackend;
using test::FakeOptions;
using namespace std::chrono_literals;

using test::Finish;
using test::Letters;
using test::Machine;
using test::MakeJob;
using test::Result;

TEST(Scheduler, AnswersAsTheModelAloneWould) {
  Machine m;
  auto job = MakeJob("hello", 20);
  ASSERT_TRUE(m.scheduler.Submit(job));
  const Result r = Finish(*job);
  EXPECT_EQ(r.text, m.backend.Expect(job->prompt, 20));
  EXPECT_EQ(r.outcome.finish_reason, "length");
  EXPECT_EQ(r.outcome.prompt_tokens, 6);
  EXPECT_EQ(r.outcome.generated_tokens, 20);
  EXPECT_GT(r.outcome.kv.bytes, 0);

  job = MakeJob("echo:secret.\n", 20);
  ASSERT_TRUE(m.scheduler.Submit(job));
  const Result echo = Finish(*job);
  EXPECT_EQ(echo.text, "secret.");
  EXPECT_EQ(echo.outcome.finish_reason, "stop");
  EXPECT_EQ(echo.outcome.generated_tokens, 7);
}

TEST(Scheduler, StopsAtStopStringsAndAtTheEndOfTheContext) {
  FakeOptions fake;
  fake.n_ctx = 64;
  Machine m(fake);
  auto job = MakeJob("echo:one two three.\n", 40);
  job->stop = {"th", "wo t"};
  ASSERT_TRUE(m.scheduler.Submit(job));
  const Result r = Finish(*job);
  EXPECT_EQ(r.text, "one t");
  EXPECT_EQ(r.outcome.finish_reason, "stop");
  job = MakeJob(Letters(59, 1), 1000);
  ASSERT_TRUE(m.scheduler.Submit(job));
  const Result full = Finish(*job);
  EXPECT_EQ(full.outcome.finish_reason, "length");
  EXPECT_EQ(full.outcome.prompt_tokens + full.outcome.generated_tokens,
            65);  // the last one is not read again
}

TEST(Scheduler, ReportsLogProbabilities) {
  Machine m;
  auto job = MakeJob("hello", 5);
  job->pick.top_logprobs = 3;
  ASSERT_TRUE(m.scheduler.Submit(job));
  std::vector<TokenReport> tokens;
  for (;;) {
    auto event = job->Wait(1s);
    std::ranges::move(event.delta.tokens, std::back_inserter(tokens));
    if (event.outcome) break;
  }
  ASSERT_EQ(tokens.size(), 5u);
  for (const auto& t : tokens) {
    EXPECT_NEAR(t.picked.logprob, 0, 1e-3);
    ASSERT_EQ(t.picked.top.size(), 3u);
    EXPECT_EQ(t.top_pieces[0], t.piece);
    EXPECT_LT(t.picked.top[1].second, -15);
    EXPECT_GE(t.picked.top[1].second, t.picked.top[2].second);
  }
}

TEST(Scheduler, BiasAndPenaltiesSteer) {
  Machine m;
  auto job = MakeJob("x", 6);
  job->pick.logit_bias = {{'!', 100.0f}};
  ASSERT_TRUE(m.scheduler.Submit(job));
  EXPECT_EQ(Finish(*job).text, "!!!!!!");
  job = MakeJob("x", 6);
  job->pick.logit_bias = {{'!', 100.0f}, {'?', 99.0f}};
  job->pick.presence_penalty = 2;
  ASSERT_TRUE(m.scheduler.Submit(job));
  EXPECT_EQ(Finish(*job).text, "!?!!!!");
}

TEST(Scheduler, ManyClientsAtOnceGetWhatTheyWouldGetAlone) {
  FakeOptions fake;
  fake.step = 100us;
  SchedulerOptions options;
  options.slots = 8;
  Machine m(fake, options);
  std::vector<std::thread> clients;
  std::atomic<int> wrong{0};
  for (int c = 0; c < 16; ++c) {
    clients.emplace_back([&, c] {
      for (int i = 0; i < 20; ++i) {
        const std::string canary = fmt::format("canary {} {}", c, i);
        auto job = i % 2 ? MakeJob("echo:" + canary + ".\n", 40, fmt::format("key {}", c % 3))
                         : MakeJob(canary, 15, fmt::format("key {}", c % 3));
        if (!m.scheduler.Submit(job)) {
          ++wrong;
          continue;
        }
        const std::string text = Finish(*job).text;
        if (text != (i % 2 ? canary + "." : m.backend.Expect(job->prompt, 15))) ++wrong;
      }
    });
  }
  for (auto& c : clients) c.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_GE(m.backend.largest_batch, 6);
  EXPECT_LE(m.backend.largest_batch, 8);
}

TEST(Scheduler, DecodesWhileAPromptIsRead) {
  FakeOptions fake;
  fake.prefill_block = fake.step = 1ms;
  fake.n_ctx = 20000;
  Machine m(fake);
  auto stream = MakeJob("short", 100);
  ASSERT_TRUE(m.scheduler.Submit(stream));
  ASSERT_TRUE(Eventually([&] { return stream->phase == Phase::kDecode; }));
  auto reader = MakeJob(Letters(16000, 2), 1);  // 1000 blocks
  ASSERT_TRUE(m.scheduler.Submit(reader));
  Finish(*stream);
  EXPECT_EQ(reader->phase, Phase::kPrefill);  // 100 tokens came out meanwhile
  Finish(*reader);
}

TEST(Scheduler, CancelledRequestsLeaveFromEveryPhase) {
  FakeOptions fake;
  fake.prefill_block = 1ms;
  fake.step = 1ms;
  SchedulerOptions options;
  options.slots = 2;
  Machine m(fake, options);
  const auto idle = [&] {
    const Gauges g = m.scheduler.gauges();
    return g.slots_busy == 0 && g.queued == 0;
  };
  auto decoding = MakeJob("a", 1000000), decoding2 = MakeJob("b", 1000000);
  decoding->max_tokens = decoding2->max_tokens = 4000;
  ASSERT_TRUE(m.scheduler.Submit(decoding));
  ASSERT_TRUE(m.scheduler.Submit(decoding2));
  ASSERT_TRUE(
      Eventually([&] { return decoding->phase == Phase::kDecode && decoding2->phase == Phase::kDecode; }));
  auto queued = MakeJob("c", 10);
  ASSERT_TRUE(m.scheduler.Submit(queued));
  queued->Cancel();
  EXPECT_TRUE(Finish(*queued).outcome.error);
  decoding->Cancel();
  EXPECT_TRUE(Finish(*decoding).outcome.error);
  auto reading = MakeJob(Letters(4000, 3), 10);
  ASSERT_TRUE(m.scheduler.Submit(reading));
  ASSERT_TRUE(Eventually([&] { return reading->phase == Phase::kPrefill; }));
  reading->Cancel();
  EXPECT_TRUE(Finish(*reading).outcome.error);
  EXPECT_EQ(decoding2->phase, Phase::kDecode);  // nobody else was disturbed
  decoding2->Cancel();
  Finish(*decoding2);
  EXPECT_TRUE(Eventually(idle, 2));
  EXPECT_EQ(m.backend.live_bytes(), 0);
  EXPECT_EQ(m.metrics.cancelled, 4);
}

TEST(Scheduler, TheQueueIsBoundedFairAndPatientOnlySoLong) {
  FakeOptions fake;
  fake.step = 5ms;
  SchedulerOptions options;
  options.slots = 1;
  Limits limits;
  limits.queue = 4;
  limits.queue_per_key = 3;
  limits.queue_seconds = 0.3;
  Machine m(fake, options, limits);
  auto blocker = MakeJob("x", 4000, "greedy");
  ASSERT_TRUE(m.scheduler.Submit(blocker));
  ASSERT_TRUE(Eventually([&] { return blocker->phase == Phase::kDecode; }));
  std::vector<std::shared_ptr<Job>> waiting;
  for (int i = 0; i < 3; ++i) {
    waiting.push_back(MakeJob("x", 1, "greedy"));
    ASSERT_TRUE(m.scheduler.Submit(waiting.back()));
  }
  EXPECT_EQ(m.scheduler.Submit(MakeJob("x", 1, "greedy")).error().status, 429);
  waiting.push_back(MakeJob("x", 1, "modest"));
  ASSERT_TRUE(m.scheduler.Submit(waiting.back()));
  const auto full = m.scheduler.Submit(MakeJob("x", 1, "third"));
  EXPECT_EQ(full.error().status, 429);
  EXPECT_GT(full.error().retry_after, 0);
  for (auto& job : waiting) {
    const auto r = Finish(*job);
    ASSERT_TRUE(r.outcome.error);
    EXPECT_EQ(r.outcome.error->code, "queue_timeout");
  }
  blocker->Cancel();
}

TEST(Scheduler, ReusesAPrefixAndAnswersTheSame) {
  Machine m;
  const std::string document = Letters(2000, 4);
  auto first = MakeJob(document + "first question", 10);
  ASSERT_TRUE(m.scheduler.Submit(first));
  EXPECT_EQ(Finish(*first).outcome.cached_tokens, 0);
  const int64_t read = m.backend.prefilled;
  auto second = MakeJob(document + "second question?", 10);
  ASSERT_TRUE(m.scheduler.Submit(second));
  const Result r = Finish(*second);
  EXPECT_EQ(r.outcome.cached_tokens, first->split);
  EXPECT_EQ(r.text, m.backend.Expect(second->prompt, 10));
  EXPECT_EQ(m.backend.prefilled - read, std::ssize(second->prompt) - first->split);
  // The same prompt again, another key's, and one that does not want it.
  auto again = MakeJob(document + "second question?", 10);
  ASSERT_TRUE(m.scheduler.Submit(again));
  EXPECT_EQ(Finish(*again).outcome.cached_tokens, first->split);
  auto foreign = MakeJob(document + "second question?", 10, "other key");
  ASSERT_TRUE(m.scheduler.Submit(foreign));
  EXPECT_EQ(Finish(*foreign).outcome.cached_tokens, 0);
  auto proud = MakeJob(document + "second question?", 10);
  proud->use_cache = false;
  ASSERT_TRUE(m.scheduler.Submit(proud));
  EXPECT_EQ(Finish(*proud).outcome.cached_tokens, 0);
}

TEST(Scheduler, AChatGoesOnFromItsOwnContext) {
  Machine m;
  auto first = MakeJob(Letters(300, 5), 50);
  first->keep_after = true;
  ASSERT_TRUE(m.scheduler.Submit(first));
  const std::string answer = Finish(*first).text;
  auto next = MakeJob(Letters(300, 5) + answer + "and then?", 5);
  ASSERT_TRUE(m.scheduler.Submit(next));
  const Result r = Finish(*next);
  EXPECT_EQ(r.outcome.cached_tokens, 1 + 300 + 49);  // the last token was never read
  EXPECT_EQ(r.text, m.backend.Expect(next->prompt, 5));
}

// The budget is a bound on what is allocated at any moment, not an average.
TEST(Scheduler, NeverExceedsTheBudget) {
  FakeOptions fake;
  fake.levels = 3;
  SchedulerOptions options;
  options.slots = 4;
  options.kv_budget_bytes = 64 * 6000;
  Machine m(fake, options);
  std::mt19937 random(6);
  std::vector<std::shared_ptr<Job>> jobs;
  for (int i = 0; i < 120; ++i) {
    auto job =
        MakeJob(Letters(static_cast<int64_t>(300 + random() % 1500), static_cast<unsigned>(random() % 12)),
                static_cast<int64_t>(1 + random() % 60));
    job->keep_after = random() % 2;
    ASSERT_TRUE(m.scheduler.Submit(job));
    jobs.push_back(job);
    if (i % 7 == 0) jobs[random() % jobs.size()]->Cancel();
  }
  for (auto& job : jobs) {
    const Result r = Finish(*job);
    if (!job->cancelled()) {
      EXPECT_FALSE(r.outcome.error) << r.outcome.error->message;
      EXPECT_EQ(r.text, m.backend.Expect(job->prompt, job->max_tokens));
    }
  }
  EXPECT_LE(m.backend.peak_bytes(), options.kv_budget_bytes);
  EXPECT_GT(m.backend.peak_bytes(), options.kv_budget_bytes / 2);
  EXPECT_GT(m.backend.compressed, 0);
}

// Reading most of a prompt behind a short kept prefix takes more scratch than reading all of it at once.
TEST(Scheduler, ALongRestBehindAPrefixStaysWithinTheBudget) {
  SchedulerOptions options;
  options.slots = 1;
  options.kv_budget_bytes = 64 * (2000 + 2000 + 600);
  Machine m({}, options);
  const std::string beginning = Letters(399, 5);
  auto first = MakeJob(beginning, 1);
  ASSERT_TRUE(m.scheduler.Submit(first));
  EXPECT_FALSE(Finish(*first).outcome.error);
  auto second = MakeJob(beginning + Letters(1500, 6), 1);
  second->split = 0;
  ASSERT_TRUE(m.scheduler.Submit(second));
  EXPECT_FALSE(Finish(*second).outcome.error);
  EXPECT_LE(m.backend.peak_bytes(), options.kv_budget_bytes);
}

TEST(Scheduler, CompressesIdleContextsBeforeItDropsThem) {
  FakeOptions fake;
  fake.levels = 3;
  SchedulerOptions options;
  options.kv_budget_bytes = 64 * 8000;
  Machine m(fake, options);
  for (unsigned i = 0; i < 6; ++i) {
    auto job = MakeJob(Letters(2000, 100 + i), 1);
    ASSERT_TRUE(m.scheduler.Submit(job));
    EXPECT_FALSE(Finish(*job).outcome.error);
  }
  EXPECT_GT(m.backend.compressed, 0);
  EXPECT_EQ(m.metrics.evictions, 0);
  // All six are still there, and used.
  for (unsigned i = 0; i < 6; ++i) {
    auto job = MakeJob(Letters(2000, 100 + i), 1);
    ASSERT_TRUE(m.scheduler.Submit(job));
    EXPECT_GT(Finish(*job).outcome.cached_tokens, 1700) << i;
  }
}

TEST(Scheduler, RefusesWhatCanNeverFit) {
  SchedulerOptions options;
  options.kv_budget_bytes = 64 * 1000;
  Machine m({}, options);
  const auto r = m.scheduler.Submit(MakeJob(Letters(600, 7), 100));
  ASSERT_FALSE(r);
  EXPECT_EQ(r.error().status, 400);
  EXPECT_EQ(r.error().code, "kv_budget_exceeded");
  auto fits = MakeJob(Letters(400, 7), 100);
  fits->split = 384;  // kept and forked it would not fit twice
  ASSERT_TRUE(m.scheduler.Submit(fits));
  EXPECT_FALSE(Finish(*fits).outcome.error);
  EXPECT_LE(m.backend.peak_bytes(), options.kv_budget_bytes);
}

TEST(Scheduler, FailuresEndRequestsNotTheServer) {
  Machine m;
  m.backend.fail_prefill = true;
  auto job = MakeJob("x", 5);
  ASSERT_TRUE(m.scheduler.Submit(job));
  EXPECT_EQ(Finish(*job).outcome.error->status, 500);
  m.backend.fail_prefill = false;
  m.backend.throw_in_prefill = true;
  job = MakeJob("x", 5);
  ASSERT_TRUE(m.scheduler.Submit(job));
  EXPECT_EQ(Finish(*job).outcome.error->status, 503);
  m.backend.throw_in_prefill = false;
  m.backend.fail_decode = true;
  job = MakeJob("x", 5);
  ASSERT_TRUE(m.scheduler.Submit(job));
  EXPECT_EQ(Finish(*job).outcome.error->status, 500);
  m.backend.fail_decode = false;
  job = MakeJob("x", 5);
  ASSERT_TRUE(m.scheduler.Submit(job));
  EXPECT_FALSE(Finish(*job).outcome.error);
}

TEST(Scheduler, DrainFinishesWhatWasAccepted) {
  FakeOptions fake;
  fake.step = 1ms;
  SchedulerOptions options;
  options.slots = 1;
  Machine m(fake, options);
  auto running = MakeJob("a", 50), waiting = MakeJob("b", 5);
  ASSERT_TRUE(m.scheduler.Submit(running));
  ASSERT_TRUE(m.scheduler.Submit(waiting));
  std::thread drain([&] { m.scheduler.Drain(std::chrono::steady_clock::now() + 10s); });
  EXPECT_FALSE(Finish(*running).outcome.error);
  EXPECT_FALSE(Finish(*waiting).outcome.error);
  drain.join();
  EXPECT_EQ(m.scheduler.Submit(MakeJob("c", 1)).error().status, 503);
}

TEST(Scheduler, DrainCancelsWhatTakesTooLong) {
  FakeOptions fake;
  fake.step = 2ms;
  fake.prefill_block = 2ms;
  Machine m(fake);
  auto decoding = MakeJob("a", 4000), reading = MakeJob(Letters(4000, 8), 5);
  ASSERT_TRUE(m.scheduler.Submit(decoding));
  ASSERT_TRUE(m.scheduler.Submit(reading));
  ASSERT_TRUE(Eventually([&] { return reading->phase == Phase::kPrefill; }));
  m.scheduler.Drain(std::chrono::steady_clock::now() + 20ms);
  EXPECT_EQ(Finish(*decoding).outcome.error->status, 503);
  EXPECT_EQ(Finish(*reading).outcome.error->status, 503);
}

// --- with a store

}  // namespace
}  // namespace moend::serve
