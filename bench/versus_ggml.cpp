// Attention alone, ours against ggml's flash attention on the same thread counts, in one process: a table of
// medians of interleaved runs and their ratios.
//
//   versus_ggml [--threads 2] [--tokens 16384] [--repetitions 15]
//
// Both sides are nodes of a ggml graph on ggml's CPU back end. Theirs is one ggml_flash_attn_ext a layer,
// with the K/V layout that llama.cpp's cache has: [token][KV head][head size]. Ours is the engine's own hook,
// a token's appending and the merging of the threads' parts included. A graph has so many layers that their
// K/V do not fit into the caches; a time is that of the graph divided by its layers.
#include <fmt/format.h>
#include <ggml-cpp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "moend/engine/compute.h"
#include "moend/engine/decode_hook.h"
#include "moend/engine/prefill_hook.h"

namespace moend::bench {
namespace {

constexpr int64_t kHeads = 32, kKvHeads = 8, kHead = 128, kBlock = 512;
constexpr int64_t kRow = kKvHeads * kHead;  // floats of K of a token
constexpr double kFootprint = 256.0 * (1 << 20);

struct Options {
  int threads = 2;
  int repetitions = 15;
  int64_t tokens = 16384;
};

[[noreturn]] void Die(const std::string& why) {
  fmt::print(stderr, "versus_ggml: {}\n", why);
  std::exit(1);
}

template <class T>
T Must(Expected<T> value) {
  if (!value) Die(value.error().message);
  if constexpr (!std::is_void_v<T>) return std::move(*value);
}

std::vector<float> Random(int64_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> out(static_cast<std::size_t>(n));
  for (float& x : out) x = normal(random);
  return out;
}

HyperParams Shape(int64_t layers) {
  HyperParams hp;
  hp.n_layers = layers;
  hp.n_heads = kHeads;
  hp.n_kv_heads = kKvHeads;
  hp.head_size = kHead;
  hp.softmax_scale = 1.0f / std::sqrt(static_cast<float>(kHead));
  return hp;
}

// ggml's CPU back end as llama.cpp runs it: workers wait for the next graph in a loop (poll 50), not asleep.
struct Machine {
  ggml_backend_ptr backend;
  std::unique_ptr<ggml_threadpool, ThreadpoolDeleter> pool;

  explicit Machine(int threads) : backend(ggml_backend_cpu_init()) {
    ggml_threadpool_params params;
    ggml_threadpool_params_init(&params, threads);
    pool.reset(ggml_threadpool_new(&params));
    if (!backend || !pool) Die("ggml's CPU back end does not start");
    ggml_backend_cpu_set_n_threads(backend.get(), threads);
    ggml_backend_cpu_set_threadpool(backend.get(), pool.get());
  }
};

// A graph and the memory of its tensors; a subclass adds nodes.
class Contestant {
 public:
  Contestant(Machine& machine, int64_t layers) : machine_(machine), layers_(layers) {
    const std::size_t nodes = 16 + 8 * static_cast<std::size_t>(layers);
    ctx_.reset(ggml_init(
        {ggml_tensor_overhead() * nodes + ggml_graph_overhead_custom(nodes, false), nullptr, true}));
    graph_ = ggml_new_graph_custom(ctx_.get(), nodes, false);
  }
  virtual ~Contestant() = default;

  // Seconds a layer.
  double Run() {
    Prepare();
    const auto start = std::chrono::steady_clock::now();
    if (ggml_backend_graph_compute(machine_.backend.get(), graph_) != GGML_STATUS_SUCCESS)
      Die("a graph did not run");
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    return took.count() / static_cast<double>(layers_);
  }
  const std::vector<float>& out() const { return out_; }  // of the last layer, [token][head][head size]

 protected:
  virtual void Prepare() {}

  Machine& machine_;
  int64_t layers_;
  std::unique_ptr<ggml_context, GgmlContextDeleter> ctx_;
  ggml_cgraph* graph_ = nullptr;
  std::vector<float> out_;
};

class Theirs : public Contestant {
 public:
  // New tokens are the last `n` of `tokens`.
  Theirs(Machine& machine, ggml_type type, int64_t tokens, int64_t n, int64_t layers)
      : Contestant(machine, layers), q_(Random(n * kHeads * kHead, 3)) {
    const std::size_t bytes = ggml_row_size(type, kRow) * static_cast<std::size_t>(tokens);
    const std::vector<float> k = Random(tokens * kRow, 1), v = Random(tokens * kRow, 2);
    std::vector<uint8_t> packed_k(bytes), packed_v(bytes);
    ggml_quantize_chunk(type, k.data(), packed_k.data(), 0, tokens, kRow, nullptr);
    ggml_quantize_chunk(type, v.data(), packed_v.data(), 0, tokens, kRow, nullptr);
    mask_.resize(static_cast<std::size_t>(tokens * n));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t t = 0; t < tokens; ++t)
        mask_[static_cast<std::size_t>(i * tokens + t)] =
            ggml_fp32_to_fp16(t <= tokens - n + i ? 0.0f : -INFINITY);
    out_.resize(q_.size());

    ggml_context* c = ctx_.get();
    // q comes as [token][head], the kernel sees it as [head][token].
    ggml_tensor* q = ggml_new_tensor_3d(c, GGML_TYPE_F32, kHead, kHeads, n);
    q->data = q_.data();
    q = ggml_permute(c, q, 0, 2, 1, 3);
    ggml_tensor* mask = ggml_new_tensor_2d(c, GGML_TYPE_F16, tokens, n);
    mask->data = mask_.data();
    for (int64_t l = 0; l < layers; ++l) {
      const auto cache = [&](std::vector<std::vector<uint8_t>>& store, const std::vector<uint8_t>& from) {
        store.push_back(from);
        ggml_tensor* t = ggml_new_tensor_3d(c, type, kHead, kKvHeads, tokens);
        t->data = store.back().data();
        return ggml_permute(c, t, 0, 2, 1, 3);
      };
      ggml_tensor* kt = cache(k_, packed_k);
      ggml_tensor* vt = cache(v_, packed_v);
      ggml_tensor* y = ggml_flash_attn_ext(c, q, kt, vt, mask, Shape(1).softmax_scale, 0.0f, 0.0f);
      y->data = out_.data();
      ggml_build_forward_expand(graph_, y);
    }
  }

 private:
  std::vector<float> q_;
  std::vector<uint16_t> mask_;
  std::vector<std::vector<uint8_t>> k_, v_;
};

// The three operations of a layer, as in model/graph.cpp.
struct Slot {
  AttentionHook* hook = nullptr;
  int64_t layer = 0, n = 0;
  const float *q = nullptr, *k = nullptr, *v = nullptr;
  float* out = nullptr;
};

const Slot& SlotOf(void* user) {
  return *static_cast<const Slot*>(user);
}

class Ours : public Contestant {
 public:
  Ours(Machine& machine, int64_t n, int64_t layers)
      : Contestant(machine, layers),
        q_(Random(n * kHeads * kHead, 3)),
        k_(static_cast<std::size_t>(n * kRow)),
        v_(k_.size()),
        slots_(static_cast<std::size_t>(layers)) {
    out_.resize(q_.size());
    ggml_tensor* before = ggml_new_tensor_1d(ctx_.get(), GGML_TYPE_F32, 1);
    before->data = &nothing_;
    for (int64_t l = 0; l < layers; ++l) {
      Slot& s = slots_[static_cast<std::size_t>(l)];
      s = {nullptr, l, n, q_.data(), k_.data(), v_.data(), out_.data()};
      const auto node = [&](ggml_custom_op_t op) {
        before = ggml_custom_4d(ctx_.get(), GGML_TYPE_F32, 1, 1, 1, 1, &before, 1, op, GGML_N_TASKS_MAX, &s);
        before->data = &nothing_;
        ggml_build_forward_expand(graph_, before);
      };
      node([](ggml_tensor*, int thread, int, void* user) {
        const Slot& slot = SlotOf(user);
        if (thread != 0) return;
        slot.hook->Store(slot.layer, slot.q, slot.k, slot.v, slot.n);
      });
      node([](ggml_tensor*, int thread, int n_threads, void* user) {
        SlotOf(user).hook->Attend(SlotOf(user).layer, SlotOf(user).q, SlotOf(user).n, thread, n_threads);
      });
      node([](ggml_tensor*, int thread, int n_threads, void* user) {
        SlotOf(user).hook->Combine(SlotOf(user).layer, SlotOf(user).out, SlotOf(user).n, thread, n_threads);
      });
    }
  }

 protected:
  void SetHook(AttentionHook* hook) {
    for (Slot& s : slots_) s.hook = hook;
  }
  std::vector<float> q_, k_, v_;
  std::vector<Slot> slots_;
  float nothing_ = 0;
};

// Random K/V as a prefill leaves them.
LayerScratch Scratch(int64_t tokens, int64_t capacity) {
  auto scratch = Must(LayerScratch::Create(std::make_shared<Ledger>(), {kKvHeads, kHead}, kHeads, capacity, 0,
                                           ScorerNeeds{}, 0));
  const std::vector<float> q(static_cast<std::size_t>(tokens) * kHeads * kHead);
  scratch.Append(q.data(), Random(tokens * kRow, 1).data(), Random(tokens * kRow, 2).data(), tokens, 1.0f);
  return scratch;
}

// The token that each run appends is zeros: next to nothing of a context of many.
class OursDecode : public Ours {
 public:
  OursDecode(Machine& machine, int threads, int bits, int64_t tokens, int64_t layers)
      : Ours(machine, 1, layers) {
    const LayerScratch scratch = Scratch(tokens, tokens);
    auto ledger = std::make_shared<Ledger>();
    for (int64_t i = 0; i < layers * kKvHeads; ++i) {
      auto cache = Must(LayerCache::Create(ledger, {1, kHead}, Expert{1.0, bits, bits}, {}, false));
      const DenseView view = scratch.view(i % kKvHeads, tokens);
      const std::vector<uint32_t> all;
      Must(cache.Fill({&view, 1}, {&all, 1}, {}));
      caches_.push_back(std::move(cache));
    }
    hook_ = Must(DecodeHook::Create(Shape(layers), threads));
    context_.caches = caches_;
    SetHook(hook_.get());
  }

 protected:
  void Prepare() override { hook_->Begin({&context_, 1}); }

 private:
  std::vector<LayerCache> caches_;
  DecodeContext context_;
  std::unique_ptr<DecodeHook> hook_;
};

class OursPrefill : public Ours {
 public:
  OursPrefill(Machine& machine, int threads, int64_t tokens, int64_t n)
      : Ours(machine, n, 1), scratch_(Scratch(tokens, tokens)), first_(tokens - n) {
    hook_ = Must(PrefillHook::Create(Shape(1), threads, n));
    // The new tokens are those that were the last of the scratch.
    k_ = Random(tokens * kRow, 1), v_ = Random(tokens * kRow, 2);
    slots_[0].k = k_.data() + first_ * kRow;
    slots_[0].v = v_.data() + first_ * kRow;
    SetHook(hook_.get());
  }

 protected:
  void Prepare() override {
    scratch_.Truncate(first_);
    Must(hook_->Begin({}, &scratch_));
  }

 private:
  LayerScratch scratch_;
  int64_t first_;
  std::unique_ptr<PrefillHook> hook_;
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t n = values.size();
  return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

// Relative difference of the outputs: that both computed the same, up to what their formats lose.
double Difference(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
    norm += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(difference / norm);
}

// The two take turns, so that what else the machine does falls on both.
void Compare(const Options& o, const std::string& what, const std::string& ours_name, Contestant& ours,
             const std::string& theirs_name, Contestant& theirs, double target) {
  std::vector<double> our_times, their_times, ratios;
  ours.Run(), theirs.Run();  // memory touched, work buffers made
  for (int r = 0; r < o.repetitions; ++r) {
    our_times.push_back(ours.Run());
    their_times.push_back(theirs.Run());
    ratios.push_back(their_times.back() / our_times.back());
  }
  fmt::print("| {} | {} | {:.3f} | {} | {:.3f} | {:.2f} | {:g} | {:.4f} |\n", what, ours_name,
             Median(our_times) * 1e3, theirs_name, Median(their_times) * 1e3, Median(ratios), target,
             Difference(ours.out(), theirs.out()));
  std::fflush(stdout);
}

int64_t Layers(double bits, int64_t tokens) {
  const double bytes = bits / 8 * 2 * static_cast<double>(tokens * kRow);
  return std::max<int64_t>(1, static_cast<int64_t>(std::ceil(kFootprint / bytes)));
}

void Decode(const Options& o, Machine& machine) {
  struct Pair {
    int bits;
    ggml_type type;
    double type_bits, target;
  };
  for (const Pair& p : {Pair{16, GGML_TYPE_F16, 16, 4},
                        {8, GGML_TYPE_Q8_0, 8.5, 8},
                        {4, GGML_TYPE_Q4_0, 4.5, 12},
                        {2, GGML_TYPE_Q4_0, 4.5, 12}}) {
    OursDecode ours(machine, o.threads, p.bits, o.tokens, Layers(p.bits, o.tokens));
    Theirs theirs(machine, p.type, o.tokens, 1, Layers(p.type_bits, o.tokens));
    Compare(o, "decode", fmt::format("{} bit", p.bits), ours, ggml_type_name(p.type), theirs, p.target);
  }
  OursDecode four(machine, o.threads, 4, o.tokens, Layers(4, o.tokens));
  OursDecode sixteen(machine, o.threads, 16, o.tokens, Layers(16, o.tokens));
  Compare(o, "decode", "4 bit", four, "our 16 bit", sixteen, 1.5);
}

void Prefill(const Options& o, Machine& machine) {
  // Half way and at the end of reading the context: the mean block and the slowest one.
  for (const int64_t tokens : {o.tokens / 2, o.tokens}) {
    OursPrefill ours(machine, o.threads, tokens, kBlock);
    Theirs theirs(machine, GGML_TYPE_F16, tokens, kBlock, 1);
    Compare(o, fmt::format("{} tokens behind {}", kBlock, tokens - kBlock), "16 bit", ours, "f16", theirs, 3);
  }
}

}  // namespace
}  // namespace moend::bench

int main(int argc, char** argv) {
  moend::bench::Options options;
  for (int i = 1; i < argc; i += 2) {
    const std::string flag = argv[i];
    char* end = nullptr;
    const long value = i + 1 < argc ? std::strtol(argv[i + 1], &end, 10) : 0;
    const bool number = end && *end == '\0' && value > 0;
    if (number && flag == "--threads" && value <= 64) {
      options.threads = static_cast<int>(value);
    } else if (number && flag == "--repetitions" && value <= 10000) {
      options.repetitions = static_cast<int>(value);
    } else if (number && flag == "--tokens" && value >= 2048 && value <= (1 << 20) && value % 1024 == 0) {
      options.tokens = value;
    } else {
      fmt::print(stderr,
                 "usage: versus_ggml [--threads 1..64] [--tokens N, a multiple of 1024] [--repetitions N]\n");
      return 2;
    }
  }
  fmt::print(
      "Attention of one layer: {} query heads, {} KV heads of {}, {} tokens, {} threads, {}; medians of "
      "{}\n\n",
      moend::bench::kHeads, moend::bench::kKvHeads, moend::bench::kHead, options.tokens, options.threads,
      moend::simd::TargetName(), options.repetitions);
  fmt::print(
      "| | ours | ms | theirs | ms | ratio | target | difference |\n|---|---|---|---|---|---|---|---|\n");
  moend::bench::Machine machine(options.threads);
  moend::bench::Decode(options, machine);
  moend::bench::Prefill(options, machine);
}
