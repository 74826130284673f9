// What the decode kernel reads: plain structs, shared by the host's C++ and by CUDA. Policy (who owns the
// memory, which part is worked on where) is made on the host: plan.h. Device pointers are borrowed; element
// offsets and sizes are 64 bit.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MOEND_HOST_DEVICE __host__ __device__
#else
#define MOEND_HOST_DEVICE
#endif

namespace moend::cuda {

// A page's address is pool + id * kPageUnit: pages of every width share one pool of up to 256 GiB.
inline constexpr int64_t kPageUnit = 64;

// What a warp takes at once: a page, or a block of raw (unquantized) tokens.
inline constexpr int kUnitTokens = 64, kRawUnitTokens = 16;

inline constexpr int32_t kNoWindow = INT32_MIN / 2;

// One KV head of one context, and its query rows. Row r is token r / group, query head r % group.
struct Stream {
  const uint32_t* pages = nullptr;     // [n_pages] ids of pages in the page format of plan/layout.h
  const uint64_t* live = nullptr;      // [n_pages] bit t: slot t holds a token
  uint16_t* raw_k = nullptr;           // raw tokens as in StreamView (attention/params.h), in whole blocks
  uint16_t* raw_v = nullptr;           //
  const float* key_inverse = nullptr;  // f32 [head_size]: KeyRotation::inverse; null: keys as they are
  int64_t n_pages = 0;
  int64_t n_raw = 0;
  int64_t q = 0, out = 0;                // element offsets of row 0 in Batch::q and Batch::out
  int64_t q_stride = 0, out_stride = 0;  // elements between two tokens; heads of a token are head_size apart
  // Sliding window, of a stream without pages: token i sees the raw tokens from first_raw + i on, so that it
  // is n_raw + behind - window of QueryRows (attention/params.h).
  int32_t first_raw = kNoWindow;
  int32_t rows = 0;   // 1 or more
  int32_t group = 1;  // query heads per KV head
  int32_t own = 0;    // newest raw tokens that are the queries' own: token i sees all but own - 1 - i
  int32_t head = 0;   // query head of row 0 in Batch::sinks
  int32_t k_bits = 16, v_bits = 16;
  int32_t k_min = 0, v_scale = 0, v_min = 0, k_codes = 0, v_codes = 0;  // PageLayout's offsets
};

// A part of a stream for some of its rows, done by one block.
struct Item {
  int32_t stream = 0;
  int32_t output = 0;  // index into Batch::outputs
  int32_t page_begin = 0, page_end = 0;
  int32_t raw_begin = 0, raw_end = 0;  // tokens; raw_begin is a multiple of kRawUnitTokens
  int32_t row_begin = 0, row_count = 0;
  int64_t slot = 0;  // where the partial result goes
};

// Rows of a stream that are merged from slots [slot, slot + n_slots).
struct Output {
  int64_t slot = 0;
  int64_t n_slots = 0;
};

// A layer's decode attention.
struct Batch {
  const uint8_t* pool = nullptr;    // kPageUnit-aligned
  const Stream* streams = nullptr;  //
  const Item* items = nullptr;      //
  const int32_t* bins = nullptr;    // [n_bins + 1] block b does items [bins[b], bins[b + 1])
  const Output* outputs = nullptr;  //
  const float* q = nullptr;         //
  float* out = nullptr;             //
  float* partial = nullptr;         // [n_slots][PartialFloats(slot_rows, head_size)]
  uint32_t* done = nullptr;         // [n_outputs] zero before the first launch; every launch leaves zeros
  const float* sinks = nullptr;     // f32 [query heads]: logits that join every softmax; null: none
  float soft_cap = 0;               // scores become cap * tanh(score / cap); 0: off
  float q_scale = 1;                // queries are multiplied by it: the softmax scale, if they are not yet
  int32_t n_bins = 0;
  int32_t head_size = 0;
  int32_t slot_rows = 0;  // most rows of an item
  // Raw tokens that every stream got since it was written. Items are made for as many as there may be
  // (MakeWorkPlan() of larger n_raw); what lies behind the last token is not looked at.
  int32_t grown = 0;
  // The newest `n_new` of these are not there yet: whoever attends to them puts them there, as half floats
  // like those of RawTokens::Store (cache/raw_tokens.h). f32, of stream i and token t: i * head_size + t *
  // new_stride on.
  int32_t n_new = 0;
  int64_t new_stride = 0;
  const float *new_k = nullptr, *new_v = nullptr;
  // These floats are copied on the way.
  const float* copied = nullptr;
  float* copy = nullptr;
  int64_t n_copied = 0;
};

// Bytes that go to a device's memory, from memory of the host that the device can read. Addresses and sizes
// are multiples of 16.
struct Piece {
  uint8_t* to = nullptr;
  const uint8_t* from = nullptr;
  int64_t bytes = 0;
};

// A partial result: sums f32 [rows][head_size], then maxima and sums of weights f32 [rows] each.
MOEND_HOST_DEVICE constexpr int64_t PartialFloats(int64_t rows, int64_t head_size) {
  return rows * (head_size + 4);
}

}  // namespace moend::cuda
