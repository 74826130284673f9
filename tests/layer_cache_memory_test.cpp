// Every allocation of every operation is made to fail once, and from one on all of them.
#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <new>

#include "moend/cache/serialize.h"
#include "tests/support/layer_model.h"

namespace {

// Allocations of this thread that still succeed; afterwards one fails, or all do.
thread_local int64_t allowed = INT64_MAX;
thread_local bool all_fail = false;

bool MayAllocate() {
  if (allowed > 0) {
    if (allowed != INT64_MAX) --allowed;
    return true;
  }
  if (!all_fail) allowed = INT64_MAX;
  return false;
}

void* Get(std::size_t size) {
  return MayAllocate() ? std::malloc(size ? size : 1) : nullptr;
}

}  // namespace

// Not inlined, or GCC 12 sees a free() of what came from an operator new and warns.
#define MOEND_NOINLINE __attribute__((noinline))

MOEND_NOINLINE void* operator new(std::size_t size) {
  if (void* p = Get(size)) return p;
  throw std::bad_alloc();
}
MOEND_NOINLINE void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return Get(size);
}
MOEND_NOINLINE void* operator new(std::size_t size, std::align_val_t align, const std::nothrow_t&) noexcept {
  const auto a = static_cast<std::size_t>(align);
  return MayAllocate() ? std::aligned_alloc(a, (size + a - 1) / a * a) : nullptr;
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

namespace moend::test {
namespace {

// Runs `operation` with every one of its allocations failing. It returns whether it succeeded; `check` is
// called after each failure.
void FailEach(const std::function<Expected<void>()>& operation, const std::function<void()>& check) {
  for (bool all : {false, true}) {
    for (int64_t k = 0;; ++k) {
      ASSERT_LT(k, 5000);
      allowed = k;
      all_fail = all;
      const auto done = operation();
      allowed = INT64_MAX;
      check();
      if (testing::Test::HasFatalFailure()) return;
      if (done) break;
      ASSERT_EQ(done.error().code, ErrorCode::kOutOfMemory) << k;
    }
  }
}

template <class T>
Expected<void> Status(Expected<T> made) {
  if (!made) return Forward(made);
  return {};
}

TEST(OutOfMemory, CreateForkRepackAndSerializeLeakNothing) {
  auto ledger = std::make_shared<Ledger>();
  LayerCache cache = MakeCache(ledger, {2, 32}, {0.5, 4, 4}, {}, true);
  Append(cache, 400);
  const int64_t live = ledger->live();
  const std::string blob = *SerializeCache(cache);
  const auto check = [&] { ASSERT_EQ(ledger->live(), live); };
  FailEach([&] { return Status(LayerCache::Create(ledger, {2, 32}, {0.5, 4, 4}, {}, true)); }, check);
  FailEach([&] { return Status(cache.Fork()); }, check);
  FailEach([&] { return Status(cache.Repack({0.5, 2, 4})); }, check);
  FailEach([&] { return Status(SerializeCache(cache)); }, check);
  FailEach([&] { return Status(DeserializeCache(ledger, blob, "x")); }, check);
  Check(cache, Everything(2, 400));
}

TEST(OutOfMemory, AppendKeepsWhatItHas) {
  const KvShape shape{2, 32};
  std::vector<float> k(300 * 64), v(300 * 64);
  for (int64_t i = 0; i < 300; ++i) {
    for (int64_t h = 0; h < 2; ++h) {
      for (int64_t c = 0; c < 32; ++c) {
        k[(i * 2 + h) * 32 + c] = Value(0, h, i, c);
        v[(i * 2 + h) * 32 + c] = Value(1, h, i, c);
      }
    }
  }
  auto ledger = std::make_shared<Ledger>();
  LayerCache cache = MakeCache(ledger, shape, {1.0, 4, 4});
  FailEach([&] { return cache.Append(k.data(), v.data(), 300); },
           [&] {
             ASSERT_EQ(cache.bytes(), ledger->live());
             Check(cache, Everything(2, cache.tokens_seen()));
             cache = MakeCache(ledger, shape, {1.0, 4, 4});
           });
}

TEST(OutOfMemory, FillLeavesAnEmptyCache) {
  auto ledger = std::make_shared<Ledger>();
  LayerCache cache = MakeCache(ledger, {2, 32}, {1.0, 4, 4});
  const Dense d0 = MakeDense(32, 0, 300), d1 = MakeDense(32, 1, 300);
  const std::vector<DenseView> views = {d0.view, d1.view};
  const std::vector<std::vector<uint32_t>> kept(2);
  FailEach([&] { return cache.Fill(views, kept, {}); },
           [&] {
             ASSERT_EQ(cache.bytes(), ledger->live());
             Check(cache, Everything(2, cache.tokens_seen()));
             if (cache.tokens_seen() > 0) cache = MakeCache(ledger, {2, 32}, {1.0, 4, 4});
           });
}

TEST(OutOfMemory, EvictChangesEverythingOrNothing) {
  Random random(1);
  auto ledger = std::make_shared<Ledger>();
  LayerCache original = MakeCache(ledger, {1, 32}, {0.5, 4, 4}, {}, true);
  Append(original, 800);
  const auto scores = RandomScores(random, original.view(0).n_pages * 64);
  Model before = Everything(1, 800), after = before;
  EvictModel(after, original, 0, scores, 300);
  const std::string blob = *SerializeCache(original);
  for (bool shared : {true, false}) {
    const auto copy = [&] { return shared ? original.Fork() : DeserializeCache(ledger, blob, "x"); };
    auto fork = copy();
    ASSERT_TRUE(fork);
    FailEach([&] { return fork->Evict(0, scores, 300); },
             [&] {
               const bool done = fork->tokens(0) == 500;
               Model model = done ? after : before;
               model.packings = 5;
               Check(*fork, model);
               if (done) fork = copy();
             });
  }
  Check(original, before);
}

}  // namespace
}  // namespace moend::test
