// Micro-benchmarks of the attention kernels. Every line says bytes and operations a second and what share of
// this machine's ceilings that is; the ceilings are measured at the start of the same run.
//
//   attention_bench --benchmark_filter=decode/k:4
//
// The contexts are larger than the caches, as those of a model with many layers are: an iteration attends one
// layer, and the next one another, until kFootprint bytes were read.
#include <benchmark/benchmark.h>
#include <hwy/aligned_allocator.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "bench/ceilings.h"
#include "moend/attention/attention.h"

namespace moend::bench {
namespace {

constexpr int64_t kFootprint = int64_t{256} << 20;
constexpr uint16_t kHalf = 0x3800;       // 0.5
constexpr uint16_t kTinyHalf = 0x2000;   // 2^-7
constexpr uint16_t kMinusHalf = 0xb800;  // -0.5

template <class T>
using Aligned = hwy::AlignedFreeUniquePtr<T[]>;

const Ceilings& CeilingsOf(int threads) {
  static std::mutex mutex;
  static std::map<int, Ceilings> measured;
  const std::lock_guard lock(mutex);
  if (!measured.contains(threads)) measured[threads] = MeasureCeilings(threads);
  return measured[threads];
}

PageLayout Layout(int64_t head_size, int k_bits, int v_bits) {
  auto layout = MakePageLayout(head_size, k_bits, v_bits);
  if (!layout) {
    std::fprintf(stderr, "%s\n", layout.error().message.c_str());
    std::exit(1);
  }
  return *layout;
}

// Pages with random codes; the speed does not depend on what they mean, but it must stay finite.
class Pages {
 public:
  Pages(const PageLayout& layout, int64_t n_pages, int64_t n_streams)
      : layout_(layout), per_stream_(n_pages), bytes_(n_pages * n_streams * layout.bytes) {
    data_ = hwy::AllocateAligned<uint8_t>(static_cast<size_t>(bytes_));
    std::mt19937_64 random(1);
    for (int64_t i = 0; i < bytes_; i += 8) {
      uint64_t word = random();
      // As half floats: clear the top exponent bit, so that no value exceeds 2.
      if (layout.k_bits == 16 || layout.v_bits == 16) word &= 0xbfffbfffbfffbfffull;
      std::memcpy(data_.get() + i, &word, 8);
    }
    for (int64_t p = 0; p < n_pages * n_streams; ++p) {
      uint8_t* page = data_.get() + p * layout.bytes;
      pages_.push_back(page);
      Fill(page, layout.k_scale, layout.head_size, kTinyHalf);
      Fill(page, layout.k_min, layout.head_size, kMinusHalf);
      Fill(page, layout.v_scale, layout.v_groups * kPageTokens, kTinyHalf);
      Fill(page, layout.v_min, layout.v_groups * kPageTokens, kMinusHalf);
    }
    live_.assign(static_cast<size_t>(n_pages), ~uint64_t{0});
  }

  StreamView stream(int64_t i) const {
    StreamView view;
    view.layout = layout_;
    view.pages = pages_.data() + i * per_stream_;
    view.live = live_.data();
    view.n_pages = per_stream_;
    return view;
  }

 private:
  static void Fill(uint8_t* page, int64_t at, int64_t n, uint16_t value) {
    for (int64_t i = 0; at >= 0 && i < n; ++i) std::memcpy(page + at + i * 2, &value, 2);
  }

  PageLayout layout_;
  int64_t per_stream_, bytes_;
  Aligned<uint8_t> data_;
  std::vector<const uint8_t*> pages_;
  std::vector<uint64_t> live_;
};

// Queries, state and scratch of one thread.
struct Rows {
  Rows(int64_t n_rows, int64_t n_head, int64_t n_group)
      : rows(n_rows), head(n_head), group(n_group), floats(rows * head) {
    q = hwy::AllocateAligned<float>(static_cast<size_t>(floats));
    out = hwy::AllocateAligned<float>(static_cast<size_t>(floats));
    stats = hwy::AllocateAligned<float>(static_cast<size_t>(2 * rows));
    workspace = hwy::AllocateAligned<float>(static_cast<size_t>(WorkspaceFloats(head, rows)));
    std::mt19937 random(2);
    std::normal_distribution<float> normal(0.0f, 0.1f);
    std::generate_n(q.get(), floats, [&] { return normal(random); });
  }
  SoftmaxState state() { return {out.get(), stats.get(), stats.get() + rows}; }
  QueryRows query() const { return {q.get(), rows, group}; }
  int64_t rows, head, group, floats;
  Aligned<float> q, out, stats, workspace;
};

// One thread is timed by its CPU time, which other programs on the machine disturb least; several by the wall
// clock, so that on a busy machine their shares come out too low.
void Time(benchmark::internal::Benchmark* benchmark, int threads) {
  benchmark->Threads(threads)->Unit(benchmark::kMillisecond);
  if (threads > 1) benchmark->UseRealTime();
}

// Rates of one thread; Google Benchmark adds the threads up.
void Report(benchmark::State& state, double bytes, double flops) {
  using benchmark::Counter;
  const Ceilings& most = CeilingsOf(state.threads());
  const double n = static_cast<double>(state.iterations());
  state.counters["bytes/s"] = Counter(n * bytes, Counter::kIsRate, Counter::kIs1000);
  state.counters["FLOP/s"] = Counter(n * flops, Counter::kIsRate, Counter::kIs1000);
  state.counters["%bandwidth"] = Counter(100 * n * bytes / most.bytes_per_second, Counter::kIsRate);
  state.counters["%fma"] = Counter(100 * n * flops / most.flops_per_second, Counter::kIsRate);
}

struct Shape {
  int64_t tokens, head, group;
};

// One decoded token against all KV heads of a layer; the threads share the KV heads. rows = group x new
// tokens, more than group for speculative decoding or a question over a long context.
void Stream(benchmark::State& state, int k_bits, int v_bits, Shape shape, int64_t new_tokens) {
  constexpr int64_t kKvHeads = 8;
  static std::unique_ptr<Pages> shared;
  static std::mutex mutex;
  static int users = 0;
  const PageLayout layout = Layout(shape.head, k_bits, v_bits);
  const int64_t n_pages = shape.tokens / kPageTokens;
  const int64_t layers = std::max(int64_t{1}, kFootprint / (n_pages * layout.bytes * kKvHeads));
  {
    const std::lock_guard lock(mutex);
    CeilingsOf(state.threads());
    if (users++ == 0) shared = std::make_unique<Pages>(layout, n_pages, layers * kKvHeads);
  }
  Rows rows(shape.group * new_tokens, shape.head, shape.group);
  const int64_t mine = kKvHeads / state.threads();
  int64_t layer = 0;
  for (auto _ : state) {
    for (int64_t h = 0; h < mine; ++h) {
      const StreamView kv = shared->stream(layer * kKvHeads + state.thread_index() * mine + h);
      ResetState(rows.state(), rows.rows, rows.head);
      simd::AttendStream(kv, 0, kv.n_pages, false, rows.query(), rows.state(), rows.workspace.get());
      simd::Finish(rows.state(), rows.rows, rows.head);
      benchmark::DoNotOptimize(rows.out.get());
    }
    layer = (layer + 1) % layers;
  }
  const auto heads = static_cast<double>(mine);
  Report(state, heads * static_cast<double>(n_pages * (layout.refs > 0 ? layout.refs : layout.bytes)),
         heads * 4.0 * static_cast<double>(rows.rows * shape.tokens * shape.head));
  const std::lock_guard lock(mutex);
  if (--users == 0) shared.reset();
}

// A block of `block` new tokens behind `tokens - block` earlier ones, one KV head a thread.
void Prefill(benchmark::State& state, Shape shape, int64_t block) {
  const auto elements = static_cast<size_t>(shape.tokens * shape.head);
  const auto k = hwy::AllocateAligned<uint16_t>(elements);
  const auto v = hwy::AllocateAligned<uint16_t>(elements);
  std::fill_n(k.get(), elements, kHalf);
  std::fill_n(v.get(), elements, kHalf);
  const DenseView kv{shape.head, k.get(), v.get(), shape.tokens};
  Rows rows(shape.group * block, shape.head, shape.group);
  CeilingsOf(state.threads());
  for (auto _ : state) {
    ResetState(rows.state(), rows.rows, rows.head);
    simd::AttendCausal(kv, shape.tokens - block, rows.query(), rows.state(), rows.workspace.get());
    simd::Finish(rows.state(), rows.rows, rows.head);
    benchmark::DoNotOptimize(rows.out.get());
  }
  const double seen = static_cast<double>(shape.tokens) - static_cast<double>(block - 1) / 2;
  Report(state, static_cast<double>(elements * 4), 4.0 * static_cast<double>(rows.rows * shape.head) * seen);
}

void RegisterStream(int k_bits, int v_bits, Shape s, int64_t new_tokens, int threads) {
  char name[128];
  std::snprintf(name, sizeof(name), "%s/k:%d/v:%d/tokens:%ld/head:%ld/group:%ld/new:%ld",
                new_tokens == 1 ? "decode" : "question", k_bits, v_bits, static_cast<long>(s.tokens),
                static_cast<long>(s.head), static_cast<long>(s.group), static_cast<long>(new_tokens));
  Time(benchmark::RegisterBenchmark(
           name, [=](benchmark::State& state) { Stream(state, k_bits, v_bits, s, new_tokens); }),
       threads);
}

void RegisterPrefill(Shape s, int64_t block, int threads) {
  char name[128];
  std::snprintf(name, sizeof(name), "prefill/tokens:%ld/head:%ld/group:%ld/block:%ld",
                static_cast<long>(s.tokens), static_cast<long>(s.head), static_cast<long>(s.group),
                static_cast<long>(block));
  Time(benchmark::RegisterBenchmark(name, [=](benchmark::State& state) { Prefill(state, s, block); }),
       threads);
}

void RegisterAll() {
  const Shape usual{16384, 128, 4};
  for (int threads : {1, 2})
    for (auto [k, v] : {std::pair{16, 16}, {8, 8}, {4, 4}, {3, 3}, {2, 2}, {8, 4}, {4, 2}})
      RegisterStream(k, v, usual, 1, threads);
  for (int bits : {16, 8, 4, 2}) {
    for (int64_t tokens : {1024, 4096}) RegisterStream(bits, bits, {tokens, 128, 4}, 1, 1);
    for (int64_t head : {64, 96, 256}) RegisterStream(bits, bits, {16384, head, 4}, 1, 1);
    for (int64_t group : {1, 2, 7, 8}) RegisterStream(bits, bits, {16384, 128, group}, 1, 1);
    for (int64_t new_tokens : {4, 8, 32}) RegisterStream(bits, bits, usual, new_tokens, 1);
  }
  for (int threads : {1, 2})
    for (Shape s : {Shape{4096, 128, 4}, {16384, 128, 4}, {16384, 64, 4}, {16384, 80, 1}, {16384, 256, 7}})
      RegisterPrefill(s, 256, threads);
}

}  // namespace
}  // namespace moend::bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::AddCustomContext("instruction set", moend::simd::TargetName());
  for (int threads : {1, 2}) {
    const auto most = moend::bench::CeilingsOf(threads);
    char text[96];
    std::snprintf(text, sizeof(text), "%.1f GB/s read, %.1f GFLOP/s multiply-add",
                  most.bytes_per_second / 1e9, most.flops_per_second / 1e9);
    benchmark::AddCustomContext("ceilings, threads " + std::to_string(threads), text);
  }
  moend::bench::RegisterAll();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
