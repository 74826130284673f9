// Caches on a device against those of the host that they are copies of, the device being host memory and the
// reference kernels (attention/cuda/runtime.h).
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "moend/attention/attention.h"
#include "moend/base/half.h"
#include "moend/engine/device_caches.h"
#include "tests/support/test_model.h"

namespace moend::test {
namespace {

constexpr int kWidths[] = {2, 3, 4, 8, 16};

LayerCache NewCache(const KvShape& shape, const Expert& expert, const Protected& guard, bool keep_scores) {
  return LayerCache::Create(std::make_shared<Ledger>(), shape, expert, guard, keep_scores).value();
}

const Parallel kOneByOne = {1, [](int64_t n, const auto& f) -> Expected<void> {
                              for (int64_t i = 0; i < n; ++i) f(i, 0);
                              return {};
                            }};

// What a device has, seen from outside.
struct DeviceMemory {
  int64_t most = INT64_MAX, live = 0, copied = 0;
  std::map<uint8_t*, int64_t> blocks;
};

class LimitedRuntime : public cuda::Runtime {
 public:
  explicit LimitedRuntime(std::shared_ptr<DeviceMemory> memory) : memory_(std::move(memory)) {}
  uint8_t* Allocate(int64_t bytes) override {
    if (memory_->live + bytes > memory_->most) return nullptr;
    uint8_t* const block = host_->Allocate(bytes);
    std::fill_n(block, bytes, uint8_t{0xFF});  // numbers that are none
    memory_->blocks[block] = bytes;
    memory_->live += bytes;
    return block;
  }
  void Free(uint8_t* block) override {
    EXPECT_TRUE(memory_->blocks.contains(block));
    memory_->live -= memory_->blocks[block];
    memory_->blocks.erase(block);
    host_->Free(block);
  }
  int64_t FreeBytes() override { return INT64_MAX; }
  uint8_t* AllocateHost(int64_t bytes) override { return host_->AllocateHost(bytes); }
  void FreeHost(uint8_t* block) override { host_->FreeHost(block); }
  Expected<cuda::KernelInfo> Describe(int64_t head_size, int64_t rows) override {
    return host_->Describe(head_size, rows);
  }
  Expected<void> Copy(const cuda::Piece* pieces, int64_t n) override {
    for (int64_t i = 0; i < n; ++i) {
      EXPECT_EQ(reinterpret_cast<uintptr_t>(pieces[i].to) % 16, 0u);
      EXPECT_EQ(pieces[i].bytes % 16, 0);
      auto block = memory_->blocks.upper_bound(pieces[i].to);
      EXPECT_NE(block, memory_->blocks.begin());
      --block;
      EXPECT_LE(pieces[i].to + pieces[i].bytes, block->first + block->second);
      memory_->copied += pieces[i].bytes;
    }
    return host_->Copy(pieces, n);
  }
  Expected<void> Clear(uint8_t* block, int64_t bytes) override { return host_->Clear(block, bytes); }
  Expected<void> Fetch(void* to, const void* from, int64_t bytes) override {
    return host_->Fetch(to, from, bytes);
  }
  Expected<void> Attend(const cuda::Batch& batch) override { return host_->Attend(batch); }
  Expected<void> Wait(void* event) override { return host_->Wait(event); }
  Expected<void> Record(void* event) override { return host_->Record(event); }
  Expected<void> Synchronize() override { return host_->Synchronize(); }

 private:
  std::shared_ptr<DeviceMemory> memory_;
  std::unique_ptr<cuda::Runtime> host_ = cuda::MakeHostRuntime();
};

// A context as a session has it.
struct Context {
  std::vector<LayerCache> caches;
  std::unique_ptr<ContextMirror> mirror;
};

class DeviceCachesTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(WriteTestModel({}, dir_ / "m.gguf"));
    auto model = Model::Load(dir_ / "m.gguf");
    ASSERT_TRUE(model) << model.error().message;
    model_ = *model;
    const HyperParams& h = model_->hparams();
    layers_ = h.n_layers, heads_ = h.n_heads, kv_heads_ = h.n_kv_heads, size_ = h.head_size;
    auto made = DeviceCaches::Create(model_, std::make_unique<LimitedRuntime>(memory_));
    ASSERT_TRUE(made) << made.error().message;
    device_ = std::move(*made);
  }

  Context MakeContext(int64_t tokens) {
    Context context;
    for (int64_t i = 0; i < layers_ * kv_heads_; ++i) {
      const Expert expert{static_cast<double>(Pick(4, 20)) / 20, kWidths[random_() % 5],
                          kWidths[random_() % 5]};
      context.caches.push_back(NewCache({1, size_}, expert, {4, Pick(0, 40)}, false));
      Grow(context.caches.back(), tokens);
    }
    return context;
  }

  int64_t Pick(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random_() % static_cast<uint64_t>(high - low + 1));
  }
  std::vector<float> Normal(int64_t n) {
    std::vector<float> numbers(static_cast<std::size_t>(n));
    for (float& x : numbers) x = normal_(random_);
    return numbers;
  }

  void Grow(LayerCache& cache, int64_t n) {
    const auto k = Normal(n * size_), v = Normal(n * size_);
    ASSERT_TRUE(cache.Append(k.data(), v.data(), n));
  }

  // What one more token's queries see, of a cache that does not have the token yet.
  std::vector<float> Expected1(const LayerCache& cache, const float* q, const float* k, const float* v) {
    const int64_t group = heads_ / kv_heads_;
    std::vector<float> scaled(q, q + group * size_), out(scaled.size()), max(scaled.size()),
        sum(scaled.size());
    for (float& x : scaled) x *= model_->Style(0).scale;
    const SoftmaxState state{out.data(), max.data(), sum.data()};
    const QueryRows rows{scaled.data(), group, group};
    ResetState(state, group, size_);
    const StreamView view = cache.view(0);
    reference::AttendStream(view, 0, view.n_pages, true, rows, state, nullptr);
    std::vector<uint16_t> key(static_cast<std::size_t>(size_ * kRawBlockTokens)),
        value(static_cast<std::size_t>(size_));
    for (int64_t c = 0; c < size_; ++c) {
      key[static_cast<std::size_t>(c)] = FloatToFiniteHalf(k[c]);
      value[static_cast<std::size_t>(c)] = FloatToFiniteHalf(v[c]);
    }
    StreamView own;
    own.layout = view.layout;
    own.raw_k = key.data();
    own.raw_v = value.data();
    own.n_raw = own.raw_tail = 1;
    reference::AttendStream(own, 0, 0, true, rows, state, nullptr);
    reference::Finish(state, group, size_);
    return out;
  }

  static std::vector<DecodeContext> Step(const std::vector<Context*>& contexts) {
    std::vector<DecodeContext> step;
    for (Context* c : contexts) {
      DecodeContext& context = step.emplace_back();
      context.caches = c->caches;
      context.mirror = &c->mirror;
    }
    return step;
  }

  // A step of these contexts on the device and on the host, which must agree.
  void ExpectStep(const std::vector<Context*>& contexts) {
    const auto step = Step(contexts);
    const auto ready = device_->Prepare(step, 0, layers_, kOneByOne);
    ASSERT_TRUE(ready) << ready.error().message;
    ASSERT_TRUE(*ready);
    const auto n = std::ssize(contexts);
    for (int64_t l = 0; l < layers_; ++l) {
      const auto q = Normal(n * heads_ * size_), k = Normal(n * kv_heads_ * size_),
                 v = Normal(n * kv_heads_ * size_);
      std::vector<float> out(q.size()), qkv = q, copy(q.size() + k.size() + v.size());
      qkv.insert(qkv.end(), k.begin(), k.end());
      qkv.insert(qkv.end(), v.begin(), v.end());
      ASSERT_TRUE(device_->Attend(l, qkv.data(), nullptr, out.data(), copy.data()));
      EXPECT_EQ(copy, qkv);
      for (int64_t b = 0; b < n; ++b) {
        for (int64_t h = 0; h < kv_heads_; ++h) {
          LayerCache& cache =
              contexts[static_cast<std::size_t>(b)]->caches[static_cast<std::size_t>(l * kv_heads_ + h)];
          const int64_t group = heads_ / kv_heads_, at = (b * heads_ + h * group) * size_,
                        kv = (b * kv_heads_ + h) * size_;
          const auto want = Expected1(cache, q.data() + at, k.data() + kv, v.data() + kv);
          for (std::size_t i = 0; i < want.size(); ++i)
            ASSERT_NEAR(out[static_cast<std::size_t>(at) + i], want[i], 2e-5)
                << "layer " << l << ", context " << b << ", KV head " << h << ", number " << i;
          ASSERT_TRUE(cache.Append(k.data() + kv, v.data() + kv, 1));
        }
      }
    }
  }

  void Evict(Context& context) {
    for (LayerCache& cache : context.caches) {
      const int64_t n = cache.Excess(0);
      ASSERT_TRUE(cache.Evict(0, Normal(cache.view(0).n_pages * kPageTokens), n));
    }
  }

  static Context Fork(const Context& context) {
    Context fork;
    for (const LayerCache& cache : context.caches) fork.caches.push_back(cache.Fork().value());
    return fork;
  }

  TempDir dir_;
  std::shared_ptr<const Model> model_;
  std::shared_ptr<DeviceMemory> memory_ = std::make_shared<DeviceMemory>();
  std::unique_ptr<DeviceCaches> device_;
  int64_t layers_ = 0, heads_ = 0, kv_heads_ = 0, size_ = 0;
  std::mt19937_64 random_{5};
  std::normal_distribution<float> normal_;
};

TEST_F(DeviceCachesTest, FollowsWhateverTheHostDoes) {
  std::vector<std::unique_ptr<Context>> contexts;
  for (const int64_t tokens : {1, 30, 400})
    contexts.push_back(std::make_unique<Context>(MakeContext(tokens)));
  for (int round = 0; round < 50; ++round) {
    std::vector<Context*> at_work;
    for (const auto& context : contexts)
      if (random_() % 4) at_work.push_back(context.get());
    if (at_work.empty()) continue;
    ASSERT_NO_FATAL_FAILURE(ExpectStep(at_work)) << "round " << round;
    Context& one = *at_work[random_() % at_work.size()];
    switch (random_() % 6) {
      case 0:
        ASSERT_NO_FATAL_FAILURE(Evict(one));
        break;
      case 1:
        for (LayerCache& cache : one.caches) ASSERT_NO_FATAL_FAILURE(Grow(cache, Pick(1, 100)));
        break;
      case 2:
        if (contexts.size() < 5) contexts.push_back(std::make_unique<Context>(Fork(one)));
        break;
      case 3:
        if (contexts.size() > 2) std::erase_if(contexts, [&](const auto& c) { return c.get() == &one; });
        break;
      case 4: {  // fewer bits
        const std::size_t i = random_() % one.caches.size();
        Expert expert = one.caches[i].expert();
        expert.k_bits = std::min(expert.k_bits, 4);
        one.caches[i] = one.caches[i].Repack(expert).value();
        break;
      }
      default:
        break;
    }
  }
  contexts.clear();
  device_.reset();
  EXPECT_EQ(memory_->live, 0);
}

TEST_F(DeviceCachesTest, CopiesWhatHasChanged) {
  Context context = MakeContext(600);
  ASSERT_NO_FATAL_FAILURE(ExpectStep({&context}));
  const int64_t all = memory_->copied;
  memory_->copied = 0;
  ASSERT_NO_FATAL_FAILURE(ExpectStep({&context}));
  const int64_t step = memory_->copied;  // some of the heads have packed tokens in between
  EXPECT_LT(step, all / 3);
  // A fork has its raw tokens by itself, pages in common.
  int64_t pages = 0;
  for (const LayerCache& cache : context.caches) {
    const StreamView view = cache.view(0);
    pages += view.n_pages * view.layout.refs;
  }
  Context fork = Fork(context);
  memory_->copied = 0;
  ASSERT_NO_FATAL_FAILURE(ExpectStep({&fork}));
  EXPECT_LT(memory_->copied, all - pages / 2);
}

TEST_F(DeviceCachesTest, LeavesToTheHostWhatHasNoMemory) {
  Context first = MakeContext(500), second = MakeContext(500);
  ASSERT_NO_FATAL_FAILURE(ExpectStep({&first}));
  memory_->most = memory_->live * 3 / 2;  // sizes differ
  // What the first has goes, for it is not at work.
  ASSERT_NO_FATAL_FAILURE(ExpectStep({&second}));
  ASSERT_NO_FATAL_FAILURE(ExpectStep({&first}));
  Context larger = MakeContext(100000);
  const auto none = device_->Prepare(Step({&larger}), 0, layers_, kOneByOne);
  ASSERT_TRUE(none);
  EXPECT_FALSE(*none);
  memory_->most = INT64_MAX;
  const auto there = device_->Prepare(Step({&larger}), 0, layers_, kOneByOne);
  ASSERT_TRUE(there);
  EXPECT_TRUE(*there);
  ASSERT_NO_FATAL_FAILURE(ExpectStep({&first, &second}));
}

TEST_F(DeviceCachesTest, LeavesToTheHostWhatKeepsScores) {
  Context context;
  for (int64_t i = 0; i < layers_ * kv_heads_; ++i) {
    context.caches.push_back(NewCache({1, size_}, {0.5, 8, 8}, {4, 16}, true));
    ASSERT_NO_FATAL_FAILURE(Grow(context.caches.back(), 100));
  }
  const auto ready = device_->Prepare(Step({&context}), 0, layers_, kOneByOne);
  ASSERT_TRUE(ready);
  EXPECT_FALSE(*ready);
}

TEST(DevicePool, GivesMemoryBack) {
  auto memory = std::make_shared<DeviceMemory>();
  {
    DevicePool pool(std::make_unique<LimitedRuntime>(memory));
    std::vector<DevicePool::Block> blocks;
    for (int i = 0; i < 3000; ++i) {
      blocks.push_back(pool.Take(1000 + i % 7 * 500));
      ASSERT_TRUE(blocks.back().data);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(blocks.back().data) % 256, 0u);
    }
    std::vector<uint8_t*> at;
    for (const auto& b : blocks) at.push_back(b.data);
    std::ranges::sort(at);
    EXPECT_EQ(std::ranges::adjacent_find(at), at.end());
    const int64_t most = pool.bytes();
    EXPECT_EQ(most, memory->live);
    for (const auto& b : blocks) pool.Give(b);
    EXPECT_LT(pool.bytes(), most);  // a slab of each size stays
    const auto page = pool.TakePage(7, 4096), again = pool.TakePage(7, 4096);
    ASSERT_TRUE(page && again);
    EXPECT_TRUE(page->fresh);
    EXPECT_FALSE(again->fresh);
    EXPECT_EQ(page->id, again->id);
    pool.GivePage(7);
    EXPECT_FALSE(pool.TakePage(7, 4096)->fresh);
    pool.GivePage(7);
    pool.GivePage(7);
    EXPECT_TRUE(pool.TakePage(7, 4096)->fresh);
  }
  EXPECT_EQ(memory->live, 0);
}

}  // namespace
}  // namespace moend::test
