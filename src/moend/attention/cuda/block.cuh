// The kernel: what a block does around its warps' units. Queries become operands, warps are merged, blocks
// are merged.
#pragma once

#include "moend/attention/cuda/decode.cuh"

namespace moend::cuda {

// Memory of a block by name; see SharedLayout.
template <class C>
struct BlockMemory {
  float* page_q;  // uint4 when they are operands
  float* raw_q;   //
  Task* task;
  float* row_unit;  // [2][rows]
  float* max;       // [warps][warp rows]
  float* sum;       // [warps][warp rows]
  int* last;
  uint8_t* warps;  // [warps][warp_bytes]
  int warp_bytes, feed_bytes, header_bytes;

  __device__ __forceinline__ BlockMemory(uint8_t* base, const SharedLayout& layout) {
    page_q = reinterpret_cast<float*>(base);
    raw_q = reinterpret_cast<float*>(base + layout.QueryBytes());
    base += 2 * layout.QueryBytes();
    task = reinterpret_cast<Task*>(base);
    base += layout.TaskBytes();
    row_unit = reinterpret_cast<float*>(base);
    max = row_unit + 2 * layout.rows;
    sum = max + C::kWarps * C::kWarpRows;
    last = reinterpret_cast<int*>(sum + C::kWarps * C::kWarpRows);
    warps = base + layout.RowBytes();
    warp_bytes = layout.WarpBytes();
    feed_bytes = layout.FeedBytes();
    header_bytes = layout.HeaderBytes();
  }
};

// Where a channel of a row is among queries in shared memory: in cells of four, in the order of operands, so
// that a cell becomes an operand where it is.
__device__ __forceinline__ int QueryIndex(int row, int channel, int steps) {
  return ((row / 8 * steps + channel / 16) * 32 + row % 8 * 4 + channel / 4 % 4) * 4 + channel % 4;
}

// Queries to operands of ScorePass(), in units that make the largest number of a row lie between 8 and 16.
// All threads; ends with a barrier.
template <class C>
__device__ __forceinline__ void MakeOperands(const C& shape, float* q, int rows, float* unit) {
  const int steps = shape.Steps(), head_size = steps * 16, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int r = warp; r < rows; r += C::kWarps) {
    float largest = 0.0f;
    for (int c = lane; c < head_size; c += 32) largest = fmaxf(largest, fabsf(q[QueryIndex(r, c, steps)]));
    const uint32_t exponent = __reduce_max_sync(~0u, __float_as_uint(largest) >> 23);
    if (lane == 0) unit[r] = exponent == 255 ? 1.0f : __uint_as_float((max(exponent, 8u) - 3) << 23);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows / 8 * steps * 32; i += C::kThreads) {
    const int row = i / 32 / steps * 8 + i % 32 / 4;
    const float4 x = reinterpret_cast<const float4*>(q)[i];
    const float inverse = 1.0f / unit[row];
    const float v[4] = {x.x * inverse, x.z * inverse, x.y * inverse, x.w * inverse};
    const __half2 high0 = __floats2half2_rn(v[0], v[1]), high1 = __floats2half2_rn(v[2], v[3]);
    const float2 h0 = __half22float2(high0), h1 = __half22float2(high1);
    reinterpret_cast<uint4*>(q)[i] = {AsWord(high0), AsWord(high1),
                                      AsWord(__floats2half2_rn(v[0] - h0.x, v[1] - h0.y)),
                                      AsWord(__floats2half2_rn(v[2] - h1.x, v[3] - h1.y))};
  }
  __syncthreads();
}

// to = H (inverse * q), as attention/rotation.h defines it. All threads; ends with a barrier.
template <class C>
__device__ __forceinline__ void RotateQueries(const C& shape, const float* q, int rows, const float* inverse,
                                              float* to) {
  const int steps = shape.Steps(), head_size = steps * 16, block = head_size & -head_size;
  const float norm = rsqrtf(static_cast<float>(block));
  for (int i = threadIdx.x; i < rows * head_size; i += C::kThreads) {
    const int c = i % head_size, at = QueryIndex(i / head_size, c, steps);
    to[at] = q[at] * __ldg(inverse + c) * norm;
  }
  __syncthreads();
  for (int stride = 1; stride < block; stride *= 2) {
    for (int i = threadIdx.x; i < rows * head_size / 2; i += C::kThreads) {
      const int row = i / (head_size / 2), k = i % (head_size / 2), c = k / stride * stride * 2 + k % stride;
      const int at = QueryIndex(row, c, steps), other = QueryIndex(row, c + stride, steps);
      const float a = to[at], b = to[other];
      to[at] = a + b;
      to[other] = a - b;
    }
    __syncthreads();
  }
}

// Where row r of an item is among queries or outputs.
__device__ __forceinline__ int64_t RowOffset(const Item& item, int r, int group, int64_t base, int64_t stride,
                                             int head_size) {
  const int row = item.row_begin + r;
  return base + row / group * stride + static_cast<int64_t>(row % group) * head_size;
}

template <class C>
__device__ __forceinline__ void PrepareQueries(const C& shape, const Batch& batch, const Task& task, int rows,
                                               const BlockMemory<C>& memory) {
  const int steps = shape.Steps(), head_size = steps * 16;
  const Stream& stream = task.stream;
  const Item& item = task.item;
  for (int i = threadIdx.x; i < rows * head_size / 4; i += C::kThreads) {
    const int r = i / (head_size / 4), c = i % (head_size / 4) * 4;
    float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
    if (r < item.row_count)
      x = __ldg(reinterpret_cast<const float4*>(
          batch.q + RowOffset(item, r, stream.group, stream.q, stream.q_stride, head_size) + c));
    const float scale = batch.q_scale * kLog2E;
    *reinterpret_cast<float4*>(memory.raw_q + QueryIndex(r, c, steps)) = {x.x * scale, x.y * scale,
                                                                          x.z * scale, x.w * scale};
  }
  __syncthreads();
  if (stream.key_inverse && item.page_begin < item.page_end) {
    RotateQueries<C>(shape, memory.raw_q, rows, stream.key_inverse, memory.page_q);
    MakeOperands<C>(shape, memory.page_q, rows, memory.row_unit);
  }
  if (!stream.key_inverse || item.raw_begin < item.raw_end)
    MakeOperands<C>(shape, memory.raw_q, rows, memory.row_unit + rows);
}

// A warp's state to its part of shared memory: f32 [warp rows][head_size], maxima and sums.
template <class C>
__device__ __forceinline__ void StoreState(const C& shape, State<typename C::Shape>& state, bool wide,
                                           int lane, float* sums, float* max, float* sum) {
  const int g = lane / 4, t = lane % 4, head_size = shape.Steps() * 16;
#pragma unroll
  for (int n = 0; n < C::kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = n * 8 + 2 * t + i;
      const float total = SumOverTokens(state.sum[n][i]);
      if (g == 0) max[row] = state.max[n][i], sum[row] = total;
#pragma unroll
      for (int group = 0; group < C::kMaxGroups; ++group)
        state.low[n][group][i] = SumOverTokens(state.low[n][group][i]);
#pragma unroll
      for (int v = 0; v < C::kSteps; ++v) {
        if (!shape.Has(v)) continue;
        const int channel = wide ? WideChannel<C>(v, g) : v * 16 + 2 * g;
        float low = state.low[n][0][i];
        if (v / 4 > 0 && v / 4 < C::kMaxGroups && v / 4 < shape.Groups()) low = state.low[n][v / 4][i];
        *reinterpret_cast<float2*>(sums + row * head_size + channel) = {
            fmaf(state.o[n][v][i], state.unit, low), fmaf(state.o[n][v][i + 2], state.unit, low)};
      }
    }
}

__device__ __forceinline__ void Accumulate(float4& to, const float4& x, float weight) {
  to.x = fmaf(x.x, weight, to.x);
  to.y = fmaf(x.y, weight, to.y);
  to.z = fmaf(x.z, weight, to.z);
  to.w = fmaf(x.w, weight, to.w);
}

// Four channels of a finished row.
__device__ __forceinline__ void Finish(const Batch& batch, const Stream& stream, const Item& item, int r,
                                       int c, float4 x, float max, float sum) {
  float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
  if (batch.sinks) {
    const float sink = batch.sinks[stream.head + (item.row_begin + r) % stream.group] * kLog2E;
    const float base = fmaxf(max, sink);
    factor = Exp2(max - base) / (sum * Exp2(max - base) + Exp2(sink - base));
  }
  float* out =
      batch.out + RowOffset(item, r, stream.group, stream.out, stream.out_stride, batch.head_size) + c;
  *reinterpret_cast<float4*>(out) = {x.x * factor, x.y * factor, x.z * factor, x.w * factor};
}

template <class C>
__device__ __forceinline__ void MergeSlots(const C& shape, const Batch& batch, const Stream& stream,
                                           const Item& item, const Output& output) {
  constexpr int kAhead = 8;  // slots whose loads are under way at once
  const int head_size = shape.Steps() * 16;
  const int64_t stride = PartialFloats(batch.slot_rows, head_size);
  for (int i = threadIdx.x; i < item.row_count * head_size / 4; i += C::kThreads) {
    const int r = i / (head_size / 4), c = i % (head_size / 4) * 4;
    const float* slots = batch.partial + output.slot * stride;
    float4 total = {0.0f, 0.0f, 0.0f, 0.0f};
    float max = kNoScore, sum = 0.0f;
    for (int64_t slot = 0; slot < output.n_slots; slot += kAhead) {
      float4 x[kAhead];
      float m[kAhead], l[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        x[j] = {0.0f, 0.0f, 0.0f, 0.0f}, m[j] = kNoScore, l[j] = 0.0f;
        if (slot + j >= output.n_slots) continue;
        const float* from = slots + (slot + j) * stride;
        x[j] = __ldcg(reinterpret_cast<const float4*>(from + r * head_size + c));
        m[j] = __ldcg(from + batch.slot_rows * head_size + r);
        l[j] = __ldcg(from + batch.slot_rows * (head_size + 1) + r);
      }
      float next = max;
#pragma unroll
      for (int j = 0; j < kAhead; ++j) next = fmaxf(next, m[j]);
      const float base = next == kNoScore ? 0.0f : next;
      const float keep = Exp2(max - base);
      total = {total.x * keep, total.y * keep, total.z * keep, total.w * keep};
      sum *= keep;
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const float weight = Exp2(m[j] - base);
        Accumulate(total, x[j], weight);
        sum = fmaf(l[j], weight, sum);
      }
      max = next;
    }
    Finish(batch, stream, item, r, c, total, max, sum);
  }
}

__device__ __forceinline__ uint16_t FiniteHalf(float x) {
  return __half_as_ushort(__float2half_rn(x != x ? 0.0f : fminf(fmaxf(x, -65504.0f), 65504.0f)));
}

// Those of the new tokens that an item sees, to where its copies will find them. All threads; the task's
// counts are those with the new tokens.
template <class C>
__device__ __forceinline__ void StoreNew(const Batch& batch, const Task& task, int head_size) {
  const Stream& stream = task.stream;
  const int first = static_cast<int>(stream.n_raw) - batch.n_new;
  const int begin = max(first, task.item.raw_begin), end = task.item.raw_end;
  if (begin >= end) return;
  for (int i = threadIdx.x; i < (end - begin) * head_size; i += C::kThreads) {
    const int at = begin + i / head_size, c = i % head_size;
    const int64_t from =
        static_cast<int64_t>(task.item.stream) * head_size + (at - first) * batch.new_stride + c;
    stream.raw_k[static_cast<int64_t>(at / kRawUnitTokens * head_size + c) * kRawUnitTokens +
                 at % kRawUnitTokens] = FiniteHalf(__ldg(batch.new_k + from));
    stream.raw_v[static_cast<int64_t>(at) * head_size + c] = FiniteHalf(__ldg(batch.new_v + from));
  }
  __threadfence();  // asynchronous copies do not look at what lies nearer than the second cache
  __syncthreads();
}

// A plain struct to shared memory, a word a thread, by the threads behind `first`.
template <class T>
__device__ __forceinline__ void CopyWords(T* to, const T* from, int first) {
  static_assert(sizeof(T) % 4 == 0 && sizeof(T) <= 64 * 4);
  const int i = static_cast<int>(threadIdx.x) - first;
  if (i >= 0 && i < static_cast<int>(sizeof(T) / 4))
    reinterpret_cast<uint32_t*>(to)[i] = __ldg(reinterpret_cast<const uint32_t*>(from) + i);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks) DecodeKernel(const __grid_constant__ Batch batch) {
  using S = typename C::Shape;
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  C shape;
  shape.steps = batch.head_size / 16;
  const int head_size = shape.Steps() * 16;
  for (int64_t i = blockIdx.x * C::kThreads + threadIdx.x; i < batch.n_copied; i += gridDim.x * C::kThreads)
    batch.copy[i] = batch.copied[i];
  for (int index = batch.bins[blockIdx.x]; index < batch.bins[blockIdx.x + 1]; ++index) {
    // Every warp has up to kWarpRows rows; warps that share their rows (teams) share the units.
    const int stream_index = batch.items[index].stream, output_index = batch.items[index].output;
    const int row_groups = (batch.items[index].row_count + C::kWarpRows - 1) / C::kWarpRows;
    const int teams = C::kWarps / row_groups, team = warp / row_groups;
    const int rows = row_groups * C::kWarpRows;
    const BlockMemory<C> memory(shared,
                                SharedLayout{head_size, rows, C::kWarps, C::kWarpRows, shape.Groups()});
    Task& task = *memory.task;
    CopyWords(&task.stream, batch.streams + stream_index, 0);
    CopyWords(&task.item, batch.items + index, 64);
    CopyWords(&task.output, batch.outputs + output_index, 96);
    __syncthreads();
    const Stream& stream = task.stream;
    const Item& item = task.item;
    if (threadIdx.x < 4) {
      const bool is_k = threadIdx.x % 2 == 0, raw = threadIdx.x >= 2;
      const int bits = raw ? 16 : is_k ? stream.k_bits : stream.v_bits;
      Part part = MakePart(is_k, bits, shape.Steps(), is_k ? stream.k_codes : stream.v_codes);
      if (raw && is_k) part.far[0] = part.far[1] = 0;
      task.parts[threadIdx.x] = part;
    }
    if (threadIdx.x == 4) {
      const int n_raw = static_cast<int>(stream.n_raw) + batch.grown;
      task.stream.n_raw = n_raw;
      if (stream.first_raw != kNoWindow) task.stream.first_raw += batch.grown;
      task.item.raw_end = min(item.raw_end, n_raw);
      task.item.raw_begin = min(item.raw_begin, n_raw);
    }
    __syncthreads();
    if (batch.n_new > 0) StoreNew<C>(batch, task, head_size);
    const Output& output = task.output;

    // The first raw units go to the first teams, pages to the teams behind them.
    const int raw_units = (item.raw_end - item.raw_begin + kRawUnitTokens - 1) / kRawUnitTokens;
    Units units{item.raw_begin + team * kRawUnitTokens,
                item.page_begin + (team + teams - raw_units % teams) % teams, teams};
    if (team >= teams) units.raw = item.raw_end, units.page = item.page_end;
    uint8_t* own = memory.warps + warp * memory.warp_bytes;
    Feed<S> feed(shape, batch, task, units, own, memory.header_bytes, lane);
    uint64_t live = units.page < item.page_end ? __ldg(stream.live + units.page) : 0;
    PrepareQueries<C>(shape, batch, task, rows, memory);

    if (team < teams) {
      const Operands raw{reinterpret_cast<const uint4*>(memory.raw_q), memory.row_unit + rows};
      const Operands paged =
          stream.key_inverse ? Operands{reinterpret_cast<const uint4*>(memory.page_q), memory.row_unit} : raw;
      const WarpWork<S> work{batch, task,
                             shape, warp % row_groups * C::kWarpRows,
                             lane,  reinterpret_cast<__half*>(own + memory.feed_bytes)};
      const TokenMap map = MapTokens(stream.k_bits, lane / 4);
      const uint32_t offsets = ProbabilityOffsets(map, stream.v_bits, lane);
      State<S> state;
      state.Reset();
      for (; units.raw < item.raw_end; units.raw += kRawUnitTokens * teams)
        work.Raw(feed, raw, units.raw, state);
      for (; units.page < item.page_end; units.page += teams) {
        const int next = units.page + teams;
        const uint64_t next_live = next < item.page_end ? __ldg(stream.live + next) : 0;
        work.Page(feed, paged, map, offsets, units.page, live, state);
        live = next_live;
      }
      __syncwarp();
      StoreState<C>(shape, state, S::kExact && stream.v_bits == 16, lane, reinterpret_cast<float*>(own),
                    memory.max + warp * C::kWarpRows, memory.sum + warp * C::kWarpRows);
    }
    __syncthreads();

    float* partial = batch.partial + item.slot * PartialFloats(batch.slot_rows, head_size);
    for (int i = threadIdx.x; i < item.row_count * head_size / 4; i += C::kThreads) {
      const int r = i / (head_size / 4), c = i % (head_size / 4) * 4;
      const int at = r / C::kWarpRows * C::kWarpRows + r % C::kWarpRows;  // of team 0
      float max = kNoScore, sum = 0.0f;
      for (int k = 0; k < teams; ++k) max = fmaxf(max, memory.max[k * rows + at]);
      float4 total = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int k = 0; k < teams; ++k) {
        const float own_max = memory.max[k * rows + at];
        if (own_max == kNoScore && memory.sum[k * rows + at] == 0.0f) continue;
        const float weight = own_max == max ? 1.0f : Exp2(own_max - max);
        const int from = k * row_groups + r / C::kWarpRows;
        const float* sums = reinterpret_cast<const float*>(memory.warps + from * memory.warp_bytes);
        Accumulate(total, *reinterpret_cast<const float4*>(sums + r % C::kWarpRows * head_size + c), weight);
        sum = fmaf(memory.sum[k * rows + at], weight, sum);
      }
      if (output.n_slots == 1) {
        Finish(batch, stream, item, r, c, total, max, sum);
      } else {
        *reinterpret_cast<float4*>(partial + r * head_size + c) = total;
        if (c == 0) {
          partial[batch.slot_rows * head_size + r] = max;
          partial[batch.slot_rows * (head_size + 1) + r] = sum;
        }
      }
    }
    if (output.n_slots > 1) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        const bool last =
            atomicAdd(batch.done + item.output, 1u) == static_cast<uint32_t>(output.n_slots - 1);
        if (last) batch.done[item.output] = 0;
        *memory.last = last;
      }
      __syncthreads();
      if (*memory.last) {
        __threadfence();
        MergeSlots<C>(shape, batch, stream, item, output);
      }
    }
    __syncthreads();  // before shared memory is used again
  }
}

}  // namespace moend::cuda
