// The k-th allocation fails, for every k, of all that a session does: a clean error or the right logits, and
// the next session of the same engine computes as ever.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>
#include <optional>

#include "moend/engine/compute.h"
#include "moend/engine/engine.h"
#include "moend/engine/engine_impl.h"
#include "moend/engine/session_state.h"
#include "moend/model/ggml_guard.h"
#include "tests/support/test_model.h"

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MOEND_OWN_MALLOC 1
#else
#define MOEND_OWN_MALLOC 0  // sanitizers bring a malloc of their own: only operator new fails then
#endif

namespace {

// Allocations of all threads that still succeed; afterwards one fails, or all do. Negative: none ever fails.
std::atomic<int64_t> allowed{-1};
std::atomic<bool> all_fail{false}, fired{false};

bool Refused() {
  if (allowed.load(std::memory_order_relaxed) < 0) return false;
  const int64_t left = allowed.fetch_sub(1);
  if (left > 0) return false;
  if (left < 0) {  // armed no more, or everything fails
    allowed.store(all_fail ? 0 : -1);
    return all_fail;
  }
  fired = true;
  if (all_fail) allowed.store(0);
  return true;
}

void Arm(int64_t k, bool all) {
  fired = false;
  all_fail = all;
  allowed = k;
}
void Disarm() {
  all_fail = false;
  allowed = -1;
}

}  // namespace

#if MOEND_OWN_MALLOC
// glibc's own functions under their other names; operator new and ggml end here as well.
extern "C" {
void* __libc_malloc(size_t size);
void* __libc_calloc(size_t n, size_t size);
void* __libc_realloc(void* p, size_t size);
void* __libc_memalign(size_t alignment, size_t size);

void* malloc(size_t size) {
  return Refused() ? nullptr : __libc_malloc(size);
}
void* calloc(size_t n, size_t size) {
  return Refused() ? nullptr : __libc_calloc(n, size);
}
void* realloc(void* p, size_t size) {
  return Refused() ? nullptr : __libc_realloc(p, size);
}
void* memalign(size_t alignment, size_t size) {
  return Refused() ? nullptr : __libc_memalign(alignment, size);
}
void* aligned_alloc(size_t alignment, size_t size) {
  return memalign(alignment, size);
}
int posix_memalign(void** out, size_t alignment, size_t size) {
  *out = memalign(alignment, size);
  return *out ? 0 : 12;  // ENOMEM
}
}
#else
// Not inlined, or GCC 12 sees a free() of what came from an operator new and warns.
#define MOEND_NOINLINE __attribute__((noinline))
MOEND_NOINLINE void* operator new(std::size_t size) {
  if (void* p = Refused() ? nullptr : std::malloc(size ? size : 1)) return p;
  throw std::bad_alloc();
}
MOEND_NOINLINE void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return Refused() ? nullptr : std::malloc(size ? size : 1);
}
MOEND_NOINLINE void* operator new(std::size_t size, std::align_val_t align, const std::nothrow_t&) noexcept {
  const auto a = static_cast<std::size_t>(align);
  return Refused() ? nullptr : std::aligned_alloc(a, (size + a - 1) / a * a);
}
MOEND_NOINLINE void operator delete(void* p) noexcept {
  std::free(p);
}
MOEND_NOINLINE void operator delete(void* p, std::size_t) noexcept {
  std::free(p);
}
MOEND_NOINLINE void operator delete(void* p, std::align_val_t) noexcept {
  std::free(p);
}
MOEND_NOINLINE void operator delete(void* p, std::size_t, std::align_val_t) noexcept {
  std::free(p);
}
#endif

namespace moend {
namespace {

constexpr int64_t kPrompt = 200;

std::vector<float> Logits(const Session& session) {
  return {session.logits().begin(), session.logits().end()};
}

// A small model and plan that evicts and packs; a session of it to compare with.
struct World {
  explicit World(int threads, const std::string& scorer = "snapkv") {
    test::TestModelOptions small;
    small.n_layers = 2;
    small.n_embd = 64;
    small.n_heads = 4;
    small.n_ff = 64;
    small.head_size = 16;
    EXPECT_TRUE(test::WriteTestModel(small, dir / "model.gguf"));
    model = *Model::Load(dir / "model.gguf", {1, false});
    engine = *Engine::Create(model, {threads, 64});
    plan = FullPlan(engine->fingerprint(), 1024);
    plan.guard = {4, 16};
    plan.scorer = scorer;
    plan.refit = scorer == "reconstruct";
    for (Expert& e : plan.layers) e = {0.5, 4, 4};
    options.n_ctx = 1000;
    options.ledger = ledger;
    auto session = Make();
    EXPECT_TRUE(session.Prefill(prompt));
    expected = Logits(session);
  }
  Session Make() const { return std::move(Session::Create(engine, plan, options)).value(); }
  // A session that read the prompt and then generated n tokens.
  Session After(int64_t n) const {
    Session session = Make();
    EXPECT_TRUE(session.Prefill(prompt));
    for (const int32_t t : test::RandomTokens(n, 2)) EXPECT_TRUE(session.Decode(t));
    return session;
  }
  void ExpectTheNextOneIsRight(int64_t k) const {
    Session session = Make();
    const auto read = session.Prefill(prompt);
    ASSERT_TRUE(read) << read.error().message << " after k = " << k;
    ASSERT_EQ(Logits(session), expected) << k;
  }

  test::TempDir dir;
  std::shared_ptr<const Model> model;
  std::shared_ptr<Engine> engine;
  Plan plan;
  SessionOptions options;
  std::shared_ptr<Ledger> ledger = std::make_shared<Ledger>();
  std::vector<int32_t> prompt = test::RandomTokens(kPrompt, 1);
  std::vector<float> expected;
};

// Runs attempt(), which makes what it needs, calls `armed` around what may fail, and says whether it went
// well, for each k and both ways of failing, until nothing fails any more. After every 29th failure a new
// session is tried.
using Armed = std::function<void(const std::function<void()>&)>;
void FailEach(const World& world, int64_t step, const std::function<Expected<void>(const Armed&)>& attempt) {
  const int64_t live = world.ledger->live();
  for (const bool all : {false, true}) {
    int64_t failures = 0;
    for (int64_t k = 0;; k += step) {
      ASSERT_LT(k, 100000);
      const Expected<void> done = attempt([&](const std::function<void()>& work) {
        Arm(k, all);
        work();
        Disarm();
      });
      const bool was_refused = fired;
      ASSERT_EQ(world.ledger->live(), live) << k;
      if (!done) {
        ASSERT_TRUE(was_refused) << done.error().message;
        ASSERT_EQ(done.error().code, ErrorCode::kOutOfMemory) << k << ": " << done.error().message;
        if (failures++ % 29 == 0) world.ExpectTheNextOneIsRight(k);
        if (testing::Test::HasFatalFailure()) return;
      }
      if (!was_refused) break;
    }
    EXPECT_GT(failures, 0);
  }
  world.ExpectTheNextOneIsRight(-1);
}

// A session in which something failed half way says so, whatever is asked of it.
void ExpectUseless(Session& session) {
  EXPECT_FALSE(session.usable());
  const auto read = session.Prefill(std::vector<int32_t>{1, 2, 3});
  ASSERT_FALSE(read);
  EXPECT_NE(read.error().message.find("cannot be used further"), std::string::npos);
  const auto decoded = session.Decode(1);
  ASSERT_FALSE(decoded);
  EXPECT_EQ(decoded.error().message, read.error().message);
  EXPECT_FALSE(session.Fork());
  EXPECT_FALSE(SaveSession(session));
  EXPECT_FALSE(RecompressSession(session, session.plan()));
}

void FailPrefills(const World& world, int64_t step) {
  FailEach(world, step, [&](const Armed& armed) -> Expected<void> {
    Session session = world.Make();
    Expected<void> read;
    armed([&] { read = session.Prefill(world.prompt); });
    if (read) {
      EXPECT_EQ(Logits(session), world.expected);
    } else {
      ExpectUseless(session);
    }
    return read;
  });
}

TEST(OutOfMemory, APrefill) {
  for (const char* scorer : {"snapkv", "h2o", "reconstruct"}) FailPrefills(World(1, scorer), 1);
}

// Threads of ggml's pool fail, too. Few: spinning threads crawl on a busy machine.
TEST(OutOfMemory, APrefillOfTwoThreads) {
  for (const char* scorer : {"h2o", "reconstruct"}) FailPrefills(World(2, scorer), 47);
}

TEST(OutOfMemory, AFurtherTurn) {
  const World world(1);
  const auto more = test::RandomTokens(150, 3);
  Session base = world.After(0);
  Session reference = *base.Fork();
  ASSERT_TRUE(reference.Prefill(more));
  const auto expected = Logits(reference);
  FailEach(world, 1, [&](const Armed& armed) -> Expected<void> {
    Session session = *base.Fork();
    Expected<void> read;
    armed([&] { read = session.Prefill(more); });
    if (read) {
      EXPECT_EQ(Logits(session), expected);
    } else {
      ExpectUseless(session);
    }
    return read;
  });
}

// Steps that append, that pack a page, that begin to observe queries, and the one that evicts.
TEST(OutOfMemory, ADecodeStepAndAnEviction) {
  const World world(1);
  int64_t refused = 0;
  for (const int64_t before : {int64_t{0}, int64_t{31}, kEvictInterval - 16, kEvictInterval - 1}) {
    Session base = world.After(before);
    Session reference = *base.Fork();
    ASSERT_TRUE(reference.Decode(7));
    const auto expected = Logits(reference);
    FailEach(world, 1, [&](const Armed& armed) -> Expected<void> {
      Session session = *base.Fork();
      Expected<void> decoded;
      armed([&] { decoded = session.Decode(7); });
      if (decoded) {
        EXPECT_EQ(Logits(session), expected);
        EXPECT_EQ(session.tokens().size(), base.tokens().size() + 1);
      } else {
        ++refused;
        EXPECT_EQ(session.tokens().size() == base.tokens().size() && session.usable(),
                  session.usable() && session.tokens() == base.tokens());
        if (!session.usable()) ExpectUseless(session);
      }
      return decoded;
    });
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(refused, 50);
}

// Of several contexts in one step, a failing eviction of one leaves the others usable and right.
TEST(OutOfMemory, OneOfABatch) {
  const World world(1);
  Session full = world.After(kEvictInterval - 1), young = world.After(3);
  Session reference = *young.Fork();
  ASSERT_TRUE(reference.Decode(9));
  const auto expected = Logits(reference);
  {
    // The graph of a new batch size is not among what fails here: ggml allocates some of its tables without a
    // look, and HasMemoryFor() can only ask before.
    Session a = *full.Fork(), b = *young.Fork();
    Session* const both[] = {&a, &b};
    const int32_t tokens[] = {7, 9};
    ASSERT_TRUE(Session::DecodeBatch(both, tokens));
  }
  int64_t spared = 0;
  FailEach(world, 1, [&](const Armed& armed) -> Expected<void> {
    Session a = *full.Fork(), b = *young.Fork();
    Session* const both[] = {&a, &b};
    const int32_t tokens[] = {7, 9};
    Expected<void> decoded;
    armed([&] { decoded = Session::DecodeBatch(both, tokens); });
    if (b.usable() && b.tokens().size() > young.tokens().size()) {
      double most = 0;  // sums of a batch are rounded otherwise
      for (std::size_t i = 0; i < expected.size(); ++i)
        most = std::max(most, std::fabs(double{b.logits()[i]} - expected[i]));
      EXPECT_LT(most, 1e-3);
      if (!a.usable()) ++spared;
    }
    return decoded;
  });
  EXPECT_GT(spared, 0);
}

TEST(OutOfMemory, MakingForkingSavingAndRestoring) {
  const World world(1);
  Session base = world.After(5);
  Session reference = *base.Fork();
  ASSERT_TRUE(reference.Decode(7));
  const auto expected = Logits(reference);
  const std::string saved = *SaveSession(base);
  const auto check = [&](Expected<Session>& made) -> Expected<void> {
    if (!made) return Forward(made);
    EXPECT_TRUE(made->Decode(7));
    EXPECT_EQ(Logits(*made), expected);
    return {};
  };
  FailEach(world, 1, [&](const Armed& armed) -> Expected<void> {
    Expected<Session> made = std::unexpected(Error());
    armed([&] { made = Session::Create(world.engine, world.plan, world.options); });
    if (!made) return Forward(made);
    EXPECT_TRUE(made->Prefill(world.prompt));
    EXPECT_EQ(Logits(*made), world.expected);
    return {};
  });
  FailEach(world, 1, [&](const Armed& armed) {
    Expected<Session> made = std::unexpected(Error());
    armed([&] { made = base.Fork(); });
    return check(made);
  });
  FailEach(world, 1, [&](const Armed& armed) {
    Expected<Session> made = std::unexpected(Error());
    armed([&] { made = RestoreSession(world.engine, world.plan, world.options, saved); });
    return check(made);
  });
  FailEach(world, 1, [&](const Armed& armed) -> Expected<void> {
    Expected<std::string> bytes;
    armed([&] { bytes = SaveSession(base); });
    if (!bytes) return Forward(bytes);
    EXPECT_EQ(*bytes, saved);
    return {};
  });
  ASSERT_TRUE(base.Decode(7));  // none of this touched it
  EXPECT_EQ(Logits(base), expected);
}

TEST(OutOfMemory, CompressingFurther) {
  const World world(1);
  Session base = world.After(5);
  Plan smaller = world.plan;
  for (Expert& e : smaller.layers) e = {0.25, 2, 2};
  FailEach(world, 1, [&](const Armed& armed) -> Expected<void> {
    Session session = *base.Fork();
    Expected<void> done;
    armed([&] { done = RecompressSession(session, smaller); });
    if (!done && !session.usable()) ExpectUseless(session);
    return done;
  });
}

// What a job throws comes back as an error once all threads are done, with one thread and with two.
TEST(ParallelFor, AnExceptionIsAnError) {
  for (const int threads : {1, 2}) {
    const World world(threads);
    Compute& compute = *world.engine->impl().compute;
    std::atomic<int64_t> calls{0};
    const auto failed = compute.ParallelFor(100, [&](int64_t i, int) {
      ++calls;
      if (i == 3) throw std::bad_alloc();
    });
    ASSERT_FALSE(failed);
    EXPECT_EQ(failed.error().code, ErrorCode::kOutOfMemory);
    if (threads == 1) {  // another thread may get far in the meantime
      EXPECT_EQ(calls, 4);
    }
    const auto other = compute.ParallelFor(2, [](int64_t, int) { throw std::runtime_error("a reason"); });
    ASSERT_FALSE(other);
    EXPECT_EQ(other.error().message, "a reason");
    calls = 0;
    EXPECT_TRUE(compute.ParallelFor(100, [&](int64_t, int) { ++calls; }));
    EXPECT_EQ(calls, 100);
  }
}

// A hook that throws on any thread ends its graph; the next graph of the same pool is right.
TEST(AttentionHook, AnExceptionIsAnError) {
  struct Throws : AttentionHook {
    int where = 0;
    int64_t later = 0;
    void At(int place) {
      if (place == where) throw std::bad_alloc();
      if (place > where) ++later;
    }
    void Store(int64_t, const float*, const float*, const float*, int64_t) override { At(0); }
    void Attend(int64_t, const float*, int64_t, int, int) override { At(1); }
    void Combine(int64_t, float*, int64_t, int, int) override { At(2); }
  };
  for (const int threads : {1, 2}) {
    const World world(threads);
    std::vector<float> hidden(64 * 8, 0.5f);
    for (int where = 0; where < 3; ++where) {
      Throws hook;
      hook.where = where;
      const auto failed = world.engine->impl().compute->Layer(0, hidden.data(), 8, 0, hook);
      ASSERT_FALSE(failed) << where;
      EXPECT_EQ(failed.error().code, ErrorCode::kOutOfMemory);
      EXPECT_EQ(hook.later, 0) << "called after it failed";
      EXPECT_FALSE(hook.failed()) << "the error was taken";
    }
    world.ExpectTheNextOneIsRight(threads);
  }
}

// Decode graphs are kept for a few batch sizes only, and counted.
TEST(Compute, KeepsABoundedNumberOfDecodeGraphs) {
  const World world(1);
  std::vector<Session> sessions;
  for (int i = 0; i < 24; ++i) sessions.push_back(world.After(0));
  const Compute& compute = *world.engine->impl().compute;
  const auto step = [&](int64_t n) {
    std::vector<Session*> batch;
    for (int64_t i = 0; i < n; ++i) batch.push_back(&sessions[static_cast<std::size_t>(i)]);
    const std::vector<int32_t> tokens(batch.size(), 5);
    EXPECT_TRUE(Session::DecodeBatch(batch, tokens));
    return compute.bytes();
  };
  const int64_t one = step(1);
  EXPECT_GT(one, 0);
  step(24);
  const int64_t widest = compute.bytes() - one;
  for (int64_t n = 1; n <= 24; ++n) EXPECT_LE(step(n), one + 8 * widest) << n;
  const int64_t kept = compute.bytes();
  for (int64_t n = 17; n <= 24; ++n) EXPECT_EQ(step(n), kept) << n;  // these are there already
}

TEST(GgmlGuard, OnlyTheMemoryOfItsOwnThreadIsGuarded) {
  EXPECT_TRUE(GuardGgml(GgmlStage::kBuild, [] {}));
  EXPECT_THROW(static_cast<void>(GuardGgml(GgmlStage::kBuild, [] { throw std::runtime_error("ours"); })),
               std::runtime_error);
#if MOEND_OWN_MALLOC
  const auto refused = GuardGgml(GgmlStage::kStart, [] {
    Arm(0, false);
    ggml_cpu_init();
  });
  Disarm();
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kOutOfMemory);
#endif
}

}  // namespace
}  // namespace moend
