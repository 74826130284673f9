#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "moend/attention/attention.h"
#include "moend/attention/cuda/runtime.h"
#include "moend/base/half.h"

namespace moend::cuda {
namespace {

constexpr std::align_val_t kAlignment{256};

PageLayout LayoutOf(const Stream& s, int64_t head_size) {
  const auto layout = MakePageLayout(head_size, s.k_bits, s.v_bits);
  return layout ? *layout : PageLayout{};
}

// What a row of an item sees, added to `state`.
void AttendRow(const Batch& batch, const Stream& s, const Item& item, int64_t row, SoftmaxState state) {
  const int64_t head_size = batch.head_size, token = row / s.group, n_raw = s.n_raw + batch.grown;
  std::vector<float> q(static_cast<std::size_t>(head_size));
  for (int64_t c = 0; c < head_size; ++c)
    q[static_cast<std::size_t>(c)] =
        batch.q[s.q + token * s.q_stride + row % s.group * head_size + c] * batch.q_scale;
  const QueryRows rows{q.data(), 1, 1, batch.soft_cap};
  StreamView kv;
  kv.layout = LayoutOf(s, head_size);
  std::vector<const uint8_t*> pages;
  for (int64_t p = item.page_begin; p < item.page_end; ++p)
    pages.push_back(batch.pool + s.pages[p] * kPageUnit);
  const KeyRotation rotation{nullptr, s.key_inverse};
  if (s.key_inverse) kv.rotation = &rotation;
  kv.pages = pages.data();
  kv.live = s.live + item.page_begin;
  kv.n_pages = std::ssize(pages);
  reference::AttendStream(kv, 0, kv.n_pages, false, rows, state, nullptr);
  // The tokens that the row sees, in blocks of their own: they may begin and end anywhere.
  int64_t begin = item.raw_begin, end = std::min<int64_t>(item.raw_end, n_raw);
  if (s.first_raw != kNoWindow) begin = std::max<int64_t>(begin, s.first_raw + batch.grown + token);
  if (s.own > 0) end = std::min(end, n_raw - s.own + 1 + token);
  for (int64_t t = begin; t < end; ++t) {
    kv.n_pages = 0;
    kv.n_raw = kv.raw_tail = 1;
    std::vector<uint16_t> k(static_cast<std::size_t>(head_size) * kRawBlockTokens);
    for (int64_t c = 0; c < head_size; ++c)
      k[static_cast<std::size_t>(c)] =
          s.raw_k[t / kRawUnitTokens * kRawUnitTokens * head_size + c * kRawUnitTokens + t % kRawUnitTokens];
    kv.raw_k = k.data();
    kv.raw_v = s.raw_v + t * head_size;
    reference::AttendStream(kv, 0, 0, true, rows, state, nullptr);
  }
}

// What an item sees of the new tokens.
void StoreNew(const Batch& batch, const Item& item) {
  const Stream& s = batch.streams[item.stream];
  const int64_t head_size = batch.head_size, n_raw = s.n_raw + batch.grown, first = n_raw - batch.n_new;
  for (int64_t at = std::max<int64_t>(first, item.raw_begin); at < std::min<int64_t>(item.raw_end, n_raw);
       ++at) {
    const int64_t from = item.stream * head_size + (at - first) * batch.new_stride;
    uint16_t* const k = s.raw_k + at / kRawUnitTokens * kRawUnitTokens * head_size + at % kRawUnitTokens;
    for (int64_t c = 0; c < head_size; ++c) {
      k[c * kRawUnitTokens] = FloatToFiniteHalf(batch.new_k[from + c]);
      s.raw_v[at * head_size + c] = FloatToFiniteHalf(batch.new_v[from + c]);
    }
  }
}

SoftmaxState SlotState(const Batch& batch, int64_t slot, int64_t row) {
  float* const partial = batch.partial + slot * PartialFloats(batch.slot_rows, batch.head_size);
  float* const counts = partial + batch.slot_rows * batch.head_size;
  return {partial + row * batch.head_size, counts + row, counts + batch.slot_rows + row};
}

class HostRuntime : public Runtime {
 public:
  uint8_t* Allocate(int64_t bytes) override {
    return static_cast<uint8_t*>(::operator new(static_cast<std::size_t>(bytes), kAlignment, std::nothrow));
  }
  void Free(uint8_t* memory) override { ::operator delete(memory, kAlignment); }
  int64_t FreeBytes() override { return INT64_MAX; }
  uint8_t* AllocateHost(int64_t bytes) override { return Allocate(bytes); }
  void FreeHost(uint8_t* memory) override { Free(memory); }

  Expected<KernelInfo> Describe(int64_t /*head_size*/, int64_t rows) override {
    KernelInfo info;
    info.blocks = 7;  // so that streams are cut somewhere
    info.rows = static_cast<int>(std::min<int64_t>(rows, 8));
    return info;
  }

  Expected<void> Copy(const Piece* pieces, int64_t n) override {
    for (int64_t i = 0; i < n; ++i)
      std::memcpy(pieces[i].to, pieces[i].from, static_cast<std::size_t>(pieces[i].bytes));
    return {};
  }
  Expected<void> Clear(uint8_t* memory, int64_t bytes) override {
    std::memset(memory, 0, static_cast<std::size_t>(bytes));
    return {};
  }

  Expected<void> Fetch(void* to, const void* from, int64_t bytes) override {
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
    return {};
  }

  Expected<void> Attend(const Batch& batch) override {
    const int64_t head_size = batch.head_size;
    std::copy_n(batch.copied, batch.n_copied, batch.copy);
    for (int64_t i = 0; i < batch.bins[batch.n_bins]; ++i) {
      const Item& item = batch.items[i];
      const Stream& s = batch.streams[item.stream];
      StoreNew(batch, item);
      for (int64_t r = 0; r < item.row_count; ++r) {
        const SoftmaxState state = SlotState(batch, item.slot, r);
        ResetState(state, 1, head_size);
        AttendRow(batch, s, item, item.row_begin + r, state);
      }
      const Output& output = batch.outputs[item.output];
      if (item.slot + 1 < output.slot + output.n_slots) continue;
      // The last of a stream's: all others have been done.
      for (int64_t r = 0; r < item.row_count; ++r) {
        const int64_t row = item.row_begin + r;
        const SoftmaxState state = SlotState(batch, output.slot, r);
        for (int64_t slot = output.slot + 1; slot < output.slot + output.n_slots; ++slot)
          reference::MergeStates(state, SlotState(batch, slot, r), 1, head_size);
        if (batch.sinks) AddSink(batch.sinks[s.head + row % s.group], head_size, state);
        reference::Finish(state, 1, head_size);
        std::copy_n(state.out, head_size,
                    batch.out + s.out + row / s.group * s.out_stride + row % s.group * head_size);
      }
    }
    return {};
  }

  Expected<void> Wait(void* /*event*/) override { return {}; }
  Expected<void> Record(void* /*event*/) override { return {}; }
  Expected<void> Synchronize() override { return {}; }

 private:
  static void AddSink(float sink, int64_t head_size, SoftmaxState state) {
    std::vector<float> out(static_cast<std::size_t>(head_size));
    float max = 0, sum = 0;
    const SoftmaxState alone{out.data(), &max, &sum};
    InitState(alone, {nullptr, 1, 1, 0, 0, 0, &sink}, head_size);
    reference::MergeStates(state, alone, 1, head_size);
  }
};

}  // namespace

std::unique_ptr<Runtime> MakeHostRuntime() {
  return std::make_unique<HostRuntime>();
}

}  // namespace moend::cuda
