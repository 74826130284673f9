// A layer's streams in device memory, for tests and benchmarks of attention/cuda. Header only, for benchmarks
// do not link the tests.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "moend/attention/cuda/attention.h"
#include "moend/attention/cuda/plan.h"
#include "moend/attention/params.h"
#include "moend/base/half.h"

namespace moend::test {

inline void CudaCheck(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <class T>
class DeviceArray {
 public:
  DeviceArray() = default;
  explicit DeviceArray(int64_t n, int fill = 0xFF) : n_(n) {
    CudaCheck(cudaMalloc(reinterpret_cast<void**>(&data_), bytes()), "cudaMalloc");
    Fill(fill);
  }
  explicit DeviceArray(const std::vector<T>& from) : DeviceArray(static_cast<int64_t>(from.size())) {
    Write(0, from.data(), n_);
  }
  DeviceArray(DeviceArray&& o) noexcept
      : data_(std::exchange(o.data_, nullptr)), n_(std::exchange(o.n_, 0)) {}
  DeviceArray& operator=(DeviceArray&& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(n_, o.n_);
    return *this;
  }
  ~DeviceArray() { cudaFree(data_); }

  void Fill(int byte) { CudaCheck(cudaMemset(data_, byte, bytes()), "cudaMemset"); }
  void Write(int64_t at, const T* from, int64_t n) {
    CudaCheck(cudaMemcpy(data_ + at, from, static_cast<size_t>(n) * sizeof(T), cudaMemcpyHostToDevice),
              "copy");
  }
  std::vector<T> Read(int64_t at, int64_t n) const {
    std::vector<T> to(static_cast<size_t>(n));
    CudaCheck(cudaMemcpy(to.data(), data_ + at, to.size() * sizeof(T), cudaMemcpyDeviceToHost), "copy");
    return to;
  }
  T* get() const { return data_; }
  int64_t size() const { return n_; }

 private:
  size_t bytes() const { return static_cast<size_t>(std::max<int64_t>(n_, 1)) * sizeof(T); }
  T* data_ = nullptr;
  int64_t n_ = 0;
};

// A plan of work in device memory, and what launches write beside their output.
class DevicePlan {
 public:
  DevicePlan() = default;
  explicit DevicePlan(const cuda::WorkPlan& plan)
      : items_(plan.items),
        bins_(plan.bins),
        outputs_(plan.outputs),
        partial_(plan.partial_floats),
        done_(static_cast<int64_t>(plan.outputs.size()), 0),
        slot_rows_(plan.slot_rows) {}

  // A batch of this plan; its streams, pool, queries and output are still to be named.
  cuda::Batch batch(int64_t head_size) const {
    cuda::Batch b;
    b.items = items_.get();
    b.bins = bins_.get();
    b.outputs = outputs_.get();
    b.partial = partial_.get();
    b.done = done_.get();
    b.n_bins = static_cast<int32_t>(bins_.size()) - 1;
    b.head_size = static_cast<int32_t>(head_size);
    b.slot_rows = slot_rows_;
    return b;
  }
  void Poison() { partial_.Fill(0xFF); }
  bool DoneIsClear() const {
    for (const uint32_t n : done_.Read(0, done_.size()))
      if (n != 0) return false;
    return true;
  }

 private:
  DeviceArray<cuda::Item> items_;
  DeviceArray<int32_t> bins_;
  DeviceArray<cuda::Output> outputs_;
  DeviceArray<float> partial_;
  DeviceArray<uint32_t> done_;
  int32_t slot_rows_ = 0;
};

// What a test says of a stream; `q` is [rows][head_size].
struct HostStream {
  StreamView kv;
  std::vector<float> q;
  int32_t rows = 1, group = 1, own = 0;
  int64_t window = 0, behind = 0;  // as in QueryRows
};

struct LayerOptions {
  int64_t blocks = 0;       // 0: as many as the device runs at once
  int64_t pool_offset = 0;  // where the first page lies, behind bytes that nobody writes
  int64_t row_offset = 0;   // elements before the first query and output
  float soft_cap = 0;
  std::vector<float> sinks;
  int32_t n_new = 0;  // the newest raw tokens of each stream, which the kernel gets apart
};

// Everything uploaded; pages in an order of their own, each with a page of NaN behind it.
class CudaLayer {
 public:
  CudaLayer(const std::vector<HostStream>& streams, int64_t head_size, const LayerOptions& options = {})
      : head_size_(head_size), n_streams_(std::ssize(streams)), options_(options) {
    int64_t pages = 0, bytes = options.pool_offset, raw = 0, rows = 0;
    int32_t most_rows = 1;
    for (const HostStream& s : streams) {
      pages += s.kv.n_pages;
      bytes += s.kv.n_pages * 2 * s.kv.layout.bytes;
      raw += (s.kv.n_raw + 15) / 16 * 16 * head_size * 2;
      rows += s.rows;
      most_rows = std::max(most_rows, s.rows);
    }
    pool_ = DeviceArray<uint8_t>(bytes);
    ids_ = DeviceArray<uint32_t>(pages);
    live_ = DeviceArray<uint64_t>(pages);
    raw_ = DeviceArray<uint16_t>(raw);
    q_ = DeviceArray<float>(options.row_offset + rows * head_size);
    out_ = DeviceArray<float>(options.row_offset + rows * head_size);
    int64_t page_at = options.pool_offset, id_at = 0, raw_at = 0, row_at = options.row_offset;
    int32_t head = 0;
    for (const HostStream& host : streams) {
      cuda::Stream s = cuda::StreamOf(host.kv.layout);
      s.n_pages = host.kv.n_pages;
      s.n_raw = host.kv.n_raw;
      s.rows = host.rows;
      s.group = host.group;
      s.own = host.own;
      if (host.window > 0)
        s.first_raw = static_cast<int32_t>(host.kv.n_raw + host.behind - host.window - options.n_new);
      s.head = head;
      head += host.group;
      s.pages = ids_.get() + id_at;
      s.live = live_.get() + id_at;
      std::vector<uint32_t> ids(static_cast<size_t>(s.n_pages));
      for (int64_t i = 0; i < s.n_pages; ++i) {  // the last page first
        const int64_t page = s.n_pages - 1 - i;
        ids[static_cast<size_t>(page)] = cuda::PageId(page_at).value();
        pool_.Write(page_at, host.kv.pages[page], host.kv.layout.bytes);
        page_at += 2 * host.kv.layout.bytes;
      }
      ids_.Write(id_at, ids.data(), s.n_pages);
      live_.Write(id_at, host.kv.live, s.n_pages);
      id_at += s.n_pages;
      const int64_t k_size = (s.n_raw + 15) / 16 * 16 * head_size, v_size = s.n_raw * head_size;
      s.raw_k = raw_.get() + raw_at;
      std::vector<uint16_t> k(host.kv.raw_k, host.kv.raw_k + k_size),
          v(host.kv.raw_v, host.kv.raw_v + v_size);
      TakeNew(s.n_raw, k, v);
      raw_.Write(raw_at, k.data(), k_size);
      raw_at += k_size;
      s.raw_v = raw_.get() + raw_at;
      raw_.Write(raw_at, v.data(), v_size);
      raw_at += k_size;  // as much again: a multiple of 16 bytes
      if (host.kv.rotation) {
        inverses_.emplace_back(
            std::vector<float>(host.kv.rotation->inverse, host.kv.rotation->inverse + head_size));
        s.key_inverse = inverses_.back().get();
      }
      s.q = s.out = row_at;
      s.q_stride = s.out_stride = s.group * head_size;
      q_.Write(row_at, host.q.data(), host.rows * head_size);
      row_at += host.rows * head_size;
      streams_.push_back(s);
    }
    const cuda::KernelInfo info = cuda::DescribeKernel(head_size, most_rows).value();
    plan_ = DevicePlan(
        cuda::MakeWorkPlan(streams_, head_size, options.blocks ? options.blocks : info.blocks, info.rows)
            .value());
    for (cuda::Stream& s : streams_) s.n_raw -= options.n_new;  // work was planned for all of them
    device_streams_ = DeviceArray<cuda::Stream>(streams_);
    new_k_ = DeviceArray<float>(host_k_);
    new_v_ = DeviceArray<float>(host_v_);
    copied_ = DeviceArray<float>(std::max<int64_t>(1, new_k_.size()));
    sinks_ = DeviceArray<float>(options.sinks);
  }

  cuda::Batch batch() const {
    cuda::Batch b = plan_.batch(head_size_);
    b.pool = pool_.get();
    b.streams = device_streams_.get();
    b.q = q_.get();
    b.out = out_.get();
    b.sinks = options_.sinks.empty() ? nullptr : sinks_.get();
    b.soft_cap = options_.soft_cap;
    b.grown = b.n_new = options_.n_new;
    b.new_k = new_k_.get();
    b.new_v = new_v_.get();
    b.new_stride = std::ssize(streams_) * head_size_;
    b.copied = new_k_.get();
    b.copy = copied_.get();
    b.n_copied = new_k_.size();
    return b;
  }

  // One launch over poisoned outputs; all rows of all streams.
  std::vector<float> Run() {
    out_.Fill(0xFF);
    plan_.Poison();
    const auto ran = cuda::Attend(batch(), nullptr);
    if (!ran) throw std::runtime_error(ran.error().message);
    CudaCheck(cudaDeviceSynchronize(), "decode");
    return out_.Read(options_.row_offset, out_.size() - options_.row_offset);
  }

  bool DoneIsClear() const { return plan_.DoneIsClear(); }
  // What the kernel copied on the way, and what it was to copy.
  std::vector<float> Copied() const { return copied_.Read(0, new_k_.size()); }
  const std::vector<float>& new_k() const { return host_k_; }

 private:
  // The newest tokens as floats; where they were, numbers that are none.
  void TakeNew(int64_t n_raw, std::vector<uint16_t>& k, std::vector<uint16_t>& v) {
    const int64_t n = options_.n_new, stream = std::ssize(streams_);
    if (n == 0) return;
    const auto stride = static_cast<size_t>(n_streams_ * head_size_);
    host_k_.resize(static_cast<size_t>(n) * stride);
    host_v_.resize(host_k_.size());
    for (int64_t t = 0; t < n; ++t) {
      const int64_t at = n_raw - n + t;
      for (int64_t c = 0; c < head_size_; ++c) {
        const size_t to = static_cast<size_t>(t) * stride + static_cast<size_t>(stream * head_size_ + c);
        uint16_t& key = k[static_cast<size_t>(at / 16 * 16 * head_size_ + c * 16 + at % 16)];
        uint16_t& value = v[static_cast<size_t>(at * head_size_ + c)];
        host_k_[to] = HalfToFloat(key);
        host_v_[to] = HalfToFloat(value);
        key = value = 0xFFFF;
      }
    }
  }

  int64_t head_size_, n_streams_;
  LayerOptions options_;
  DeviceArray<uint8_t> pool_;
  DeviceArray<uint32_t> ids_;
  DeviceArray<uint64_t> live_;
  DeviceArray<uint16_t> raw_;
  DeviceArray<float> q_, out_, sinks_, new_k_, new_v_, copied_;
  std::vector<float> host_k_, host_v_;
  std::vector<DeviceArray<float>> inverses_;
  std::vector<cuda::Stream> streams_;
  DeviceArray<cuda::Stream> device_streams_;
  DevicePlan plan_;
};

}  // namespace moend::test
