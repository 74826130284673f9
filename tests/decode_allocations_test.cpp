// A decode step that leaves the cache's size as it is allocates nothing, but for what ggml does at the start
// of every graph.
#include <ggml-cpu.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <atomic>
#include <cstddef>

#include "moend/engine/engine.h"
#include "tests/support/test_model.h"

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MOEND_COUNT_ALLOCATIONS 1
#else
#define MOEND_COUNT_ALLOCATIONS 0  // sanitizers bring a malloc of their own
#endif

namespace {
std::atomic<int64_t> allocations{0};
}

#if MOEND_COUNT_ALLOCATIONS
// glibc's own functions under their other names; operator new and ggml end here as well.
extern "C" {
void* __libc_malloc(size_t size);
void* __libc_calloc(size_t n, size_t size);
void* __libc_realloc(void* p, size_t size);
void* __libc_memalign(size_t alignment, size_t size);

void* malloc(size_t size) {
  ++allocations;
  return __libc_malloc(size);
}
void* calloc(size_t n, size_t size) {
  ++allocations;
  return __libc_calloc(n, size);
}
void* realloc(void* p, size_t size) {
  ++allocations;
  return __libc_realloc(p, size);
}
void* memalign(size_t alignment, size_t size) {
  ++allocations;
  return __libc_memalign(alignment, size);
}
void* aligned_alloc(size_t alignment, size_t size) {
  return memalign(alignment, size);
}
int posix_memalign(void** out, size_t alignment, size_t size) {
  *out = memalign(alignment, size);
  return *out ? 0 : 12;  // ENOMEM
}
}
#endif

namespace moend {
namespace {

struct Steps {
  int64_t quiet = 0, growing = 0;  // without and with a change of the cache
  int64_t in_quiet = 0;            // allocations of the quiet ones
};

Steps Decode(int threads, const Expert& expert, int64_t tokens) {
  Steps steps;
  const test::TempDir dir;
  const std::string path = dir / "model.gguf";
  EXPECT_TRUE(test::WriteTestModel({}, path));
  auto model = Model::Load(path, {1, false});
  if (!model) return steps;
  auto engine = Engine::Create(*model, {threads});
  if (!engine) return steps;
  Plan plan = FullPlan((*engine)->fingerprint(), 1024);
  for (Expert& e : plan.layers) e = expert;
  auto session = Session::Create(*engine, plan);
  if (!session) return steps;
  // Far enough that the list of tokens has room for all that follow.
  EXPECT_TRUE(session->Prefill(test::RandomTokens(32 + 4 * kPageTokens, 1)));
  int64_t unpacked = 0;
  for (const int32_t token : test::RandomTokens(2, 2)) {
    EXPECT_TRUE(session->Decode(token));
    ++unpacked;
  }
  for (const int32_t token : test::RandomTokens(tokens, 3)) {
    const int64_t bytes = session->stats().bytes, before = allocations;
    const auto decoded = session->Decode(token);
    const int64_t made = allocations - before;
    EXPECT_TRUE(decoded);
    // Tokens are packed, or a short context makes room for more.
    if (++unpacked % kPackTokens == 0 || session->stats().bytes != bytes) {
      ++steps.growing;
      continue;
    }
    ++steps.quiet;
    steps.in_quiet += made;
  }
  return steps;
}

// ggml computes a graph only after this call, which makes an empty context and drops it again.
int64_t AllocationsOfAGraph() {
  ggml_cpu_init();  // the first call makes tables
  const int64_t before = allocations;
  ggml_cpu_init();
  return allocations - before;
}

TEST(DecodeAllocations, NoneWhileTheCacheKeepsItsSize) {
  if (!MOEND_COUNT_ALLOCATIONS) GTEST_SKIP() << "this build has another malloc";
  const int64_t before = allocations;
  void* volatile p = ::malloc(100);  // volatile, or the compiler leaves it out
  ::free(p);
  int* volatile number = new int(1);
  delete number;
  ASSERT_GE(allocations, before + 2) << "the count does not count";
  for (const Expert& expert : {Expert{}, Expert{1, 4, 4}}) {
    const Steps steps = Decode(1, expert, 80);
    EXPECT_GE(steps.quiet, 60);
    EXPECT_GE(steps.growing, 1);
    EXPECT_EQ(steps.in_quiet, steps.quiet * AllocationsOfAGraph());
  }
}

TEST(DecodeAllocations, NoneWithTwoThreads) {
  if (!MOEND_COUNT_ALLOCATIONS) GTEST_SKIP() << "this build has another malloc";
  const Steps steps = Decode(2, Expert{}, 10);  // few: spinning threads crawl on a busy machine
  EXPECT_GE(steps.quiet, 8);
  EXPECT_EQ(steps.in_quiet, steps.quiet * AllocationsOfAGraph());
}

}  // namespace
}  // namespace moend
