// Decode attention of a layer on an NVIDIA GPU: time, bytes a second and share of the read bandwidth that the
// same run measures. Inputs are rotated through several copies, so that nothing is read from the cache twice.
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "bench/cuda_ceilings.h"
#include "moend/base/half.h"
#include "tests/support/cuda_layer.h"

namespace moend {
namespace {

using test::CudaCheck;
using test::DeviceArray;

constexpr int64_t kCopiesBytes = int64_t{1} << 30;  // what all copies of a layer take, many times the cache
int64_t g_blocks = 0;                               // 0: as the kernel says

// Median time of a call in microseconds, of 11 rounds. The launches of a round are one CUDA graph, so that
// the host's time for a launch does not count.
double Microseconds(int launches, const std::function<void(int, cudaStream_t)>& launch) {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t ready = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;
  CudaCheck(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  CudaCheck(cudaEventCreate(&begin), "event");
  CudaCheck(cudaEventCreate(&end), "event");
  launch(0, stream);
  CudaCheck(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < launches; ++i) launch(i, stream);
  CudaCheck(cudaStreamEndCapture(stream, &graph), "capture");
  CudaCheck(cudaGraphInstantiate(&ready, graph, 0), "graph");
  std::vector<double> times;
  for (int round = 0; round < 13; ++round) {
    CudaCheck(cudaEventRecord(begin, stream), "event");
    CudaCheck(cudaGraphLaunch(ready, stream), "graph");
    CudaCheck(cudaEventRecord(end, stream), "event");
    CudaCheck(cudaEventSynchronize(end), "launch");
    float ms = 0;
    CudaCheck(cudaEventElapsedTime(&ms, begin, end), "event");
    if (round >= 2) times.push_back(1000.0 * ms / launches);
  }
  cudaGraphExecDestroy(ready);
  cudaGraphDestroy(graph);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaStreamDestroy(stream);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// A page with random codes and plausible scales.
std::vector<uint8_t> RandomPage(const PageLayout& layout, std::mt19937& random) {
  std::vector<uint8_t> page(static_cast<size_t>(layout.bytes));
  for (uint8_t& byte : page) byte = static_cast<uint8_t>(random());
  std::uniform_real_distribution<float> uniform(-1.7f, 1.7f);
  const auto halves = [&](int64_t at, int64_t n, float low, float high) {
    for (int64_t i = 0; i < n; ++i) {
      const uint16_t h = FloatToHalf(low + (high - low) * 0.5f * (1.0f + uniform(random) / 1.7f));
      std::memcpy(page.data() + at + 2 * i, &h, 2);
    }
  };
  const auto side = [&](int bits, int64_t scale, int64_t min, int64_t scales, int64_t codes) {
    if (bits == 16) return halves(codes, layout.head_size * kPageTokens, -1.7f, 1.7f);
    const float step = 4.0f / static_cast<float>((1 << bits) - 1);
    halves(scale, scales, 0.7f * step, step);
    halves(min, scales, -2.1f, -1.9f);
  };
  side(layout.k_bits, layout.k_scale, layout.k_min, layout.head_size, layout.k_codes);
  side(layout.v_bits, layout.v_scale, layout.v_min, layout.v_groups * kPageTokens, layout.v_codes);
  return page;
}

struct Head {
  int k_bits, v_bits;
  int64_t tokens;
};

// One layer, several times: `heads` of every context, 4 query heads each.
class Layer {
 public:
  static constexpr int64_t kHeadSize = 128, kGroup = 4, kRaw = 48;

  explicit Layer(const std::vector<Head>& heads, int32_t tokens = 1) {
    std::mt19937 random(1);
    for (const Head& head : heads) {
      const PageLayout layout = MakePageLayout(kHeadSize, head.k_bits, head.v_bits).value();
      bytes_ += head.tokens / kPageTokens * (layout.bytes - kPageUnitOfRefs) + kRaw * kHeadSize * 4;
      pool_bytes_ += head.tokens / kPageTokens * layout.bytes;
      pages_ += head.tokens / kPageTokens;
    }
    copies_ = static_cast<int>(std::clamp<int64_t>(kCopiesBytes / std::max<int64_t>(pool_bytes_, 1), 2, 64));
    pool_ = DeviceArray<uint8_t>(pool_bytes_ * copies_);
    const int32_t rows = static_cast<int32_t>(tokens * kGroup);
    const auto n_heads = static_cast<int64_t>(heads.size());
    std::vector<float> q(static_cast<size_t>(n_heads * rows * kHeadSize));
    std::normal_distribution<float> normal;
    for (float& x : q) x = normal(random) * 0.2f;
    q_ = DeviceArray<float>(q);
    out_ = DeviceArray<float>(static_cast<int64_t>(q.size()));
    std::vector<uint16_t> raw(static_cast<size_t>(kRaw * kHeadSize * 2));
    for (uint16_t& h : raw) h = FloatToHalf(normal(random));
    raw_ = DeviceArray<uint16_t>(raw);
    live_ = DeviceArray<uint64_t>(pages_);  // all ones
    ids_ = DeviceArray<uint32_t>(pages_ * copies_);
    info_ = cuda::DescribeKernel(kHeadSize, rows).value();
    for (int copy = 0; copy < copies_; ++copy) {
      std::vector<cuda::Stream> streams;
      int64_t page_at = copy * pool_bytes_, id_at = copy * pages_;
      for (int64_t h = 0; h < n_heads; ++h) {
        const Head& head = heads[static_cast<size_t>(h)];
        const PageLayout layout = MakePageLayout(kHeadSize, head.k_bits, head.v_bits).value();
        cuda::Stream s = cuda::StreamOf(layout);
        s.n_pages = head.tokens / kPageTokens;
        s.n_raw = kRaw;
        s.pages = ids_.get() + id_at;
        s.live = live_.get() + (id_at - copy * pages_);
        s.raw_k = raw_.get();
        s.raw_v = raw_.get() + kRaw * kHeadSize;
        s.rows = rows;
        s.group = kGroup;
        s.q = s.out = h * rows * kHeadSize;
        s.q_stride = s.out_stride = kGroup * kHeadSize;
        // Pages of a head lie in a shuffled order, as after many evictions.
        std::vector<uint32_t> ids;
        for (int64_t p = 0; p < s.n_pages; ++p)
          ids.push_back(cuda::PageId(page_at + p * layout.bytes).value());
        std::shuffle(ids.begin(), ids.end(), random);
        ids_.Write(id_at, ids.data(), s.n_pages);
        if (copy == 0) Fill(layout, page_at, s.n_pages, random);
        page_at += s.n_pages * layout.bytes;
        id_at += s.n_pages;
        streams.push_back(s);
      }
      streams_.emplace_back(streams);
      if (copy == 0) {
        plan_ = test::DevicePlan(
            cuda::MakeWorkPlan(streams, kHeadSize, g_blocks ? g_blocks : info_.blocks, info_.rows).value());
      } else {
        CudaCheck(cudaMemcpy(pool_.get() + copy * pool_bytes_, pool_.get(), static_cast<size_t>(pool_bytes_),
                             cudaMemcpyDeviceToDevice),
                  "copy");
      }
    }
  }

  double Time() const {
    return Microseconds(std::max(copies_, 20), [&](int i, cudaStream_t stream) {
      cuda::Batch b = plan_.batch(kHeadSize);
      b.pool = pool_.get();
      b.streams = streams_[static_cast<size_t>(i % copies_)].get();
      b.q = q_.get();
      b.out = out_.get();
      if (const auto ran = cuda::Attend(b, stream); !ran) throw std::runtime_error(ran.error().message);
    });
  }
  // What must be read: codes, scales and raw tokens.
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kPageUnitOfRefs = 64;

  void Fill(const PageLayout& layout, int64_t at, int64_t pages, std::mt19937& random) {
    const int64_t distinct = std::min<int64_t>(pages, 64);
    for (int64_t p = 0; p < distinct; ++p)
      pool_.Write(at + p * layout.bytes, RandomPage(layout, random).data(), layout.bytes);
    for (int64_t have = distinct; have < pages;) {
      const int64_t n = std::min(have, pages - have);
      CudaCheck(cudaMemcpy(pool_.get() + at + have * layout.bytes, pool_.get() + at,
                           static_cast<size_t>(n * layout.bytes), cudaMemcpyDeviceToDevice),
                "copy");
      have += n;
    }
  }

  int64_t bytes_ = 0, pool_bytes_ = 0, pages_ = 0;
  int copies_ = 1;
  DeviceArray<uint8_t> pool_;
  DeviceArray<float> q_, out_;
  DeviceArray<uint16_t> raw_;
  DeviceArray<uint64_t> live_;
  DeviceArray<uint32_t> ids_;
  std::vector<DeviceArray<cuda::Stream>> streams_;
  cuda::KernelInfo info_;
  test::DevicePlan plan_;
};

std::vector<Head> Heads(int64_t contexts, int k_bits, int v_bits, int64_t tokens) {
  return std::vector<Head>(static_cast<size_t>(contexts * 8), Head{k_bits, v_bits, tokens});
}

// Heads as a 14x plan has them: a few long and wide ones, many short ones.
std::vector<Head> MixedHeads(int64_t contexts, int64_t tokens) {
  const Head one[] = {{8, 8, tokens / 2}, {4, 4, tokens},     {4, 2, tokens / 2},  {4, 2, tokens / 4},
                      {3, 2, tokens / 8}, {2, 2, tokens / 4}, {4, 3, tokens / 16}, {2, 2, tokens / 32}};
  std::vector<Head> heads;
  for (int64_t i = 0; i < contexts; ++i) heads.insert(heads.end(), std::begin(one), std::end(one));
  return heads;
}

int Run(const std::vector<std::string>& only) {
  cudaDeviceProp device{};
  CudaCheck(cudaGetDeviceProperties(&device, 0), "device");
  const auto info = cuda::DescribeKernel(128, 4).value();
  fmt::print(
      "{}, {} multiprocessors; kernel of 128 and 4 rows: {} registers, {} bytes spilled, {} bytes shared, {} "
      "blocks at once\n",
      device.name, device.multiProcessorCount, info.registers, info.spilled_bytes, info.shared_bytes,
      info.blocks);
  double read = 0;
  {
    const int64_t bytes = int64_t{2} << 30;
    DeviceArray<uint8_t> data(bytes, 0x5A), to(bytes);
    DeviceArray<uint32_t> sums(1 << 16);
    for (int per : {2, 4, 8, 16}) {
      const double us = Microseconds(5, [&](int, cudaStream_t stream) {
        CudaCheck(static_cast<cudaError_t>(bench::ReadOnce(data.get(), bytes, sums.get(),
                                                           per * device.multiProcessorCount, stream)),
                  "read");
      });
      read = std::max(read, static_cast<double>(bytes) / us * 1e-3);
    }
    const double copy_us = Microseconds(5, [&](int, cudaStream_t stream) {
      CudaCheck(
          cudaMemcpyAsync(to.get(), data.get(), static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream),
          "copy");
    });
    fmt::print("read {:.0f} GB/s; copy {:.0f} GB/s, read and written\n\n", read,
               2 * static_cast<double>(bytes) / copy_us * 1e-3);
  }
  const double small_read = [&] {
    const int64_t bytes = 9280 * 2048;
    DeviceArray<uint8_t> data(bytes * 32, 0x5A);
    DeviceArray<uint32_t> sums(1 << 16);
    return Microseconds(32, [&](int i, cudaStream_t stream) {
      bench::ReadOnce(data.get() + i * bytes, bytes, sums.get(), 4 * device.multiProcessorCount, stream);
    });
  }();
  fmt::print("a plain read of {} bytes takes {:.1f} us\n", 9280 * 2048, small_read);

  struct Case {
    std::string name;
    std::vector<Head> heads;
    int32_t tokens = 1;
  };
  std::vector<Case> cases;
  for (auto [k, v] : {std::pair{16, 16}, {8, 8}, {4, 4}, {3, 3}, {2, 2}, {4, 2}})
    cases.push_back({fmt::format("1 x 131072, K{} V{}", k, v), Heads(1, k, v, 131072)});
  for (auto [k, v] : {std::pair{16, 16}, {8, 8}, {4, 4}, {4, 2}, {2, 2}})
    cases.push_back({fmt::format("1 x 16384, K{} V{}", k, v), Heads(1, k, v, 16384)});
  cases.push_back({"1 x 131072, mixed", MixedHeads(1, 131072)});
  cases.push_back({"16 x 32768, mixed", MixedHeads(16, 32768)});
  for (auto [k, v] : {std::pair{16, 16}, {8, 8}, {4, 4}, {2, 2}})
    cases.push_back({fmt::format("16 x 32768, K{} V{}", k, v), Heads(16, k, v, 32768)});
  cases.push_back({"1 x 131072, K4 V4, 4 tokens", Heads(1, 4, 4, 131072), 4});
  cases.push_back({"1 x 131072, K4 V4, 16 tokens", Heads(1, 4, 4, 131072), 16});
  cases.push_back({"1 x 1024, K4 V4", Heads(1, 4, 4, 1024)});
  fmt::print("{:<32} {:>10} {:>10} {:>10} {:>10}\n", "8 KV heads of 128, 4 query heads", "MB", "us", "GB/s",
             "of read");
  for (const Case& c : cases) {
    if (!only.empty() && std::none_of(only.begin(), only.end(), [&](const std::string& o) {
          return c.name.find(o) != std::string::npos;
        }))
      continue;
    const Layer layer(c.heads, c.tokens);
    const double us = layer.Time(), rate = static_cast<double>(layer.bytes()) / us * 1e-3;
    fmt::print("{:<32} {:>10.1f} {:>10.1f} {:>10.0f} {:>9.1f}%\n", c.name,
               static_cast<double>(layer.bytes()) * 1e-6, us, rate, 100 * rate / read);
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace moend

// Arguments: parts of the names of cases to run; --blocks N.
int main(int argc, char** argv) {
  if (!moend::cuda::Available()) {
    fmt::print(stderr, "cuda_attention: no NVIDIA GPU of compute capability 8.0 or newer\n");
    return 77;
  }
  std::vector<std::string> only;
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--blocks" && i + 1 < argc)
      moend::g_blocks = std::atoll(argv[++i]);
    else
      only.emplace_back(argv[i]);
  }
  try {
    return moend::Run(only);
  } catch (const std::exception& e) {
    fmt::print(stderr, "cuda_attention: {}\n", e.what());
    return 1;
  }
}
