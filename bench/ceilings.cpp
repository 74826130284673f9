#include "bench/ceilings.h"

#include <hwy/aligned_allocator.h>
#include <time.h>

#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "moend/attention/simd/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bench/ceilings.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace moend::bench {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Or of all words, so that no load can be left out.
uint64_t ReadAll(const uint64_t* HWY_RESTRICT from, size_t n) {
  const hn::ScalableTag<uint64_t> d;
  const size_t lanes = hn::Lanes(d);
  auto a = hn::Zero(d), b = a, c = a, e = a;
  for (size_t i = 0; i + 4 * lanes <= n; i += 4 * lanes) {
    a = hn::Or(a, hn::Load(d, from + i));
    b = hn::Or(b, hn::Load(d, from + i + lanes));
    c = hn::Or(c, hn::Load(d, from + i + 2 * lanes));
    e = hn::Or(e, hn::Load(d, from + i + 3 * lanes));
  }
  return hn::GetLane(hn::Or(hn::Or(a, b), hn::Or(c, e)));
}

// Returns the floating point operations done; *sink keeps the compiler from leaving them out.
double MultiplyAdd(int64_t rounds, float* sink) {
  const hn::ScalableTag<float> d;
  const auto x = hn::Set(d, *sink);
  auto a = x, b = x, c = x, e = x, f = x, g = x, h = x, i = x, j = x, k = x, l = x, m = x;
  for (int64_t n = 0; n < rounds; ++n) {
    a = hn::MulAdd(a, x, x), b = hn::MulAdd(b, x, x), c = hn::MulAdd(c, x, x), e = hn::MulAdd(e, x, x);
    f = hn::MulAdd(f, x, x), g = hn::MulAdd(g, x, x), h = hn::MulAdd(h, x, x), i = hn::MulAdd(i, x, x);
    j = hn::MulAdd(j, x, x), k = hn::MulAdd(k, x, x), l = hn::MulAdd(l, x, x), m = hn::MulAdd(m, x, x);
#if HWY_COMPILER_GCC
    // The twelve chains compute the same and would become one.
    asm volatile("" : "+x"(b.raw), "+x"(c.raw), "+x"(e.raw), "+x"(f.raw), "+x"(g.raw), "+x"(h.raw));
    asm volatile("" : "+x"(i.raw), "+x"(j.raw), "+x"(k.raw), "+x"(l.raw), "+x"(m.raw));
#endif
  }
  a = hn::Add(hn::Add(hn::Add(a, b), hn::Add(c, e)), hn::Add(hn::Add(f, g), hn::Add(h, i)));
  a = hn::Add(a, hn::Add(hn::Add(j, k), hn::Add(l, m)));
  *sink = hn::GetLane(a);
  return static_cast<double>(rounds) * 12 * 2 * static_cast<double>(hn::Lanes(d));
}

}  // namespace HWY_NAMESPACE
}  // namespace moend::bench
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moend::bench {

HWY_EXPORT(ReadAll);
HWY_EXPORT(MultiplyAdd);

namespace {

double ThreadSeconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// Best rate of `work(thread)`, which returns what one thread did, over several rounds. Each thread counts the
// time it ran, as the benchmarks of one thread do: the ceiling of a busy machine is not that of a slow one.
template <class Work>
double BestRate(int threads, const Work& work) {
  double best = 0;
  for (int round = 0; round < 15; ++round) {
    std::vector<double> rates(static_cast<size_t>(threads));
    std::barrier start(threads);
    {
      std::vector<std::jthread> pool;
      for (int t = 0; t < threads; ++t)
        pool.emplace_back([&, t] {
          start.arrive_and_wait();
          const double begin = ThreadSeconds();
          const double done = work(t);
          rates[static_cast<size_t>(t)] = done / (ThreadSeconds() - begin);
        });
    }
    double total = 0;
    for (double rate : rates) total += rate;
    best = std::max(best, total);
  }
  return best;
}

}  // namespace

Ceilings MeasureCeilings(int threads) {
  constexpr size_t kWords = size_t{24} << 20;  // 192 MiB a thread
  const auto all = static_cast<size_t>(threads) * kWords;
  const auto buffer = hwy::AllocateAligned<uint64_t>(all);
  std::memset(buffer.get(), 1, all * sizeof(uint64_t));
  std::vector<float> sinks(static_cast<size_t>(threads) * 16, 0.5f);
  std::vector<uint64_t> words(static_cast<size_t>(threads) * 8);
  Ceilings ceilings;
  ceilings.bytes_per_second = BestRate(threads, [&](int t) {
    const auto i = static_cast<size_t>(t);
    words[i * 8] += HWY_DYNAMIC_DISPATCH(ReadAll)(buffer.get() + i * kWords, kWords);
    return static_cast<double>(kWords * sizeof(uint64_t));
  });
  ceilings.flops_per_second = BestRate(threads, [&](int t) {
    return HWY_DYNAMIC_DISPATCH(MultiplyAdd)(4'000'000, &sinks[static_cast<size_t>(t) * 16]);
  });
  return ceilings;
}

}  // namespace moend::bench
#endif  // HWY_ONCE
