// The definition of what the kernels compute: one row, one token and one channel at a time, in float64.
#include "moend/attention/attention.h"
#include "moend/attention/rotation.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace moend::reference {
namespace {

double HalfToDouble(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

double HalfAt(const uint8_t* base, int64_t index) {
  uint16_t bits = 0;
  std::memcpy(&bits, base + index * 2, sizeof(bits));
  return HalfToDouble(bits);
}

// Byte b of row r before packing (plan/layout.h).
int Unpacked(const uint8_t* codes, int bits, int64_t r, int64_t b) {
  const int per_byte = 8 / bits;
  const uint8_t packed = codes[(r / per_byte) * kPageTokens + b];
  return (packed >> ((r % per_byte) * bits)) & ((1 << bits) - 1);
}

int CodeAt(const uint8_t* codes, int bits, int64_t head_size, int64_t r, int64_t b) {
  if (bits != 3) return Unpacked(codes, bits, r, b);
  const uint8_t* high = codes + head_size / 4 * kPageTokens;
  return Unpacked(codes, 2, r, b) | Unpacked(high, 1, r, b) << 2;
}

double PageK(const PageLayout& layout, const uint8_t* page, int64_t token, int64_t channel) {
  if (layout.k_bits == 16) return HalfAt(page + layout.k_codes, channel * kPageTokens + token);
  const int64_t row = channel / 4 * 4 + token / 16;
  const int64_t byte = token % 16 * 4 + channel % 4;
  const int code = CodeAt(page + layout.k_codes, layout.k_bits, layout.head_size, row, byte);
  return HalfAt(page + layout.k_min, channel) + HalfAt(page + layout.k_scale, channel) * code;
}

// The rows as packed pages want them.
std::vector<float> PageQueries(const StreamView& kv, const QueryRows& q) {
  const int64_t head = kv.layout.head_size;
  std::vector<float> rows(q.q, q.q + q.rows * head);
  if (kv.rotation) RotateRows(q.q, q.rows, head, kv.rotation->inverse, rows.data());
  return rows;
}

double PageV(const PageLayout& layout, const uint8_t* page, int64_t token, int64_t channel) {
  if (layout.v_bits == 16) return HalfAt(page + layout.v_codes, token * layout.head_size + channel);
  const int64_t row = channel / 16 * 16 + token / 4;
  const int64_t byte = channel % 16 * 4 + token % 4;
  const int code = CodeAt(page + layout.v_codes, layout.v_bits, layout.head_size, row, byte);
  const int64_t group = channel / (layout.head_size / layout.v_groups);
  const int64_t at = group * kPageTokens + token;
  return HalfAt(page + layout.v_min, at) + HalfAt(page + layout.v_scale, at) * code;
}

// Everything below sees K and V through get(token, channel).
template <class GetK>
double Score(const float* q, int64_t head_size, int64_t token, float soft_cap, const GetK& k) {
  double score = 0;
  for (int64_t c = 0; c < head_size; ++c) score += static_cast<double>(q[c]) * k(token, c);
  return soft_cap == 0 ? score : soft_cap * std::tanh(score / soft_cap);
}

// Whether row r, whose token is `newest`, sees token t.
bool Sees(const QueryRows& q, int64_t newest, int64_t t) {
  return t <= newest && (q.window == 0 || newest - t < q.window);
}

// Adds the tokens [0, n) with visible(token) to one row of the state.
template <class GetK, class GetV, class Visible>
void AttendRow(const float* q, int64_t head_size, float soft_cap, int64_t n, const GetK& k, const GetV& v,
               const Visible& visible, float* out, float* max, float* sum) {
  std::vector<double> scores;
  std::vector<int64_t> tokens;
  for (int64_t t = 0; t < n; ++t) {
    if (!visible(t)) continue;
    tokens.push_back(t);
    scores.push_back(Score(q, head_size, t, soft_cap, k));
  }
  if (tokens.empty()) return;
  double highest = *max;
  for (double s : scores) highest = std::fmax(highest, s);
  const float new_max = static_cast<float>(highest);  // rounded before its use, so that state is consistent
  const double base = std::isinf(new_max) && new_max < 0 ? 0.0 : new_max;
  const double old_weight = std::exp(*max - base);
  double new_sum = *sum * old_weight;
  for (double& s : scores) new_sum += s = std::exp(s - base);
  for (int64_t c = 0; c < head_size; ++c) {
    double acc = out[c] * old_weight;
    for (size_t i = 0; i < tokens.size(); ++i) acc += scores[i] * v(tokens[i], c);
    out[c] = static_cast<float>(acc);
  }
  *max = new_max;
  *sum = static_cast<float>(new_sum);
}

// The parts of a stream as (token, channel) functions.
struct RawPart {
  const StreamView& kv;
  double K(int64_t t, int64_t c) const {
    const int64_t block = t / kRawBlockTokens;
    return HalfToDouble(kv.raw_k[block * kv.layout.head_size * kRawBlockTokens + c * kv.RawStride(block) +
                                 t % kRawBlockTokens]);
  }
  double V(int64_t t, int64_t c) const { return HalfToDouble(kv.raw_v[t * kv.layout.head_size + c]); }
};

struct DensePart {
  const DenseView& kv;
  double K(int64_t t, int64_t c) const {
    const int64_t block = t / kPageTokens * kv.head_size * kPageTokens;
    return HalfToDouble(kv.k[block + c * kPageTokens + t % kPageTokens]);
  }
  double V(int64_t t, int64_t c) const { return HalfToDouble(kv.v[t * kv.head_size + c]); }
};

// Row r sees token t where visible(r, t).
template <class Visible>
void AttendDense(const DenseView& kv, const QueryRows& q, SoftmaxState state, const Visible& visible) {
  const DensePart part{kv};
  for (int64_t r = 0; r < q.rows; ++r) {
    AttendRow(
        q.q + r * kv.head_size, kv.head_size, q.soft_cap, kv.n_tokens,
        [&](int64_t t, int64_t c) { return part.K(t, c); },
        [&](int64_t t, int64_t c) { return part.V(t, c); }, [&](int64_t t) { return visible(r, t); },
        state.out + r * kv.head_size, state.max + r, state.sum + r);
  }
}

}  // namespace

void AttendStream(const StreamView& kv, int64_t page_begin, int64_t page_end, bool raw, const QueryRows& q,
                  SoftmaxState state, float* /*workspace*/) {
  const int64_t head = kv.layout.head_size;
  const std::vector<float> page_q = PageQueries(kv, q);
  for (int64_t r = 0; r < q.rows; ++r) {
    float* out = state.out + r * head;
    for (int64_t p = page_begin; p < page_end; ++p) {
      const uint8_t* page = kv.pages[p];
      AttendRow(
          page_q.data() + r * head, head, q.soft_cap, kPageTokens,
          [&](int64_t t, int64_t c) { return PageK(kv.layout, page, t, c); },
          [&](int64_t t, int64_t c) { return PageV(kv.layout, page, t, c); },
          [&](int64_t t) { return (kv.live[p] >> t & 1) != 0; }, out, state.max + r, state.sum + r);
    }
    if (!raw) continue;
    const RawPart part{kv};
    AttendRow(
        q.q + r * head, head, q.soft_cap, kv.n_raw, [&](int64_t t, int64_t c) { return part.K(t, c); },
        [&](int64_t t, int64_t c) { return part.V(t, c); },
        [&](int64_t t) { return Sees(q, kv.n_raw - 1 + q.behind + r / q.group, t); }, out, state.max + r,
        state.sum + r);
  }
}

void AttendCausal(const DenseView& kv, int64_t first, const QueryRows& q, SoftmaxState state,
                  float* /*workspace*/) {
  AttendDense(kv, q, state, [&](int64_t r, int64_t t) { return Sees(q, first + r / q.group, t); });
}

void ColumnSumsCausal(const DenseView& kv, int64_t first, int64_t begin, int64_t end, const QueryRows& q,
                      const float* max, const float* sum, float* sums, float* /*workspace*/) {
  const DensePart part{kv};
  for (int64_t t = begin; t < end; ++t) {
    double total = 0;
    for (int64_t r = 0; r < q.rows; ++r) {
      if (!Sees(q, first + r / q.group, t) || sum[r] == 0.0f) continue;
      const double score = Score(q.q + r * kv.head_size, kv.head_size, t, q.soft_cap,
                                 [&](int64_t token, int64_t c) { return part.K(token, c); });
      total += std::exp(score - max[r]) / sum[r];
    }
    sums[t] = static_cast<float>(sums[t] + total);
  }
}

namespace {

bool Chose(const ChosenPages& chosen, int64_t token, int64_t rows, int64_t r) {
  return !(chosen.most[token / kPageTokens * rows + r] <
           chosen.least[r]);  // what is no number is not left out
}

}  // namespace

void PageMaxima(const DenseView& kv, const QueryRows& q, float* most, float* /*workspace*/) {
  const DensePart part{kv};
  std::fill_n(most, (kv.n_tokens + kPageTokens - 1) / kPageTokens * q.rows, -INFINITY);
  for (int64_t t = 0; t < kv.n_tokens; ++t) {
    for (int64_t r = 0; r < q.rows; ++r) {
      const double score = Score(q.q + r * kv.head_size, kv.head_size, t, q.soft_cap,
                                 [&](int64_t token, int64_t c) { return part.K(token, c); });
      float& so_far = most[t / kPageTokens * q.rows + r];
      so_far = std::fmax(so_far, static_cast<float>(score));
    }
  }
}

void ChoosePages(const float* most, int64_t pages, int64_t rows, SoftmaxState state, float share,
                 float* least) {
  for (int64_t r = 0; r < rows; ++r) {
    double max = state.max[r], sum = 0;
    for (int64_t p = 0; p < pages; ++p) max = std::fmax(max, most[p * rows + r]);
    if (state.sum[r] > 0) sum = state.sum[r] * std::exp(state.max[r] - max);
    for (int64_t p = 0; p < pages; ++p) sum += std::exp(most[p * rows + r] - max);
    least[r] = static_cast<float>(max + std::log(sum * share));
  }
}

void AttendChosen(const DenseView& kv, const QueryRows& q, const ChosenPages& chosen, SoftmaxState state,
                  float* /*workspace*/) {
  AttendDense(kv, q, state, [&](int64_t r, int64_t t) { return Chose(chosen, t, q.rows, r); });
}

void ColumnSquaresChosen(const DenseView& kv, const QueryRows& q, const ChosenPages& chosen, const float* max,
                         const float* sum, const float* weight, float* squares, float* /*workspace*/) {
  const DensePart part{kv};
  for (int64_t t = 0; t < kv.n_tokens; ++t) {
    double total = 0;
    for (int64_t r = 0; r < q.rows; ++r) {
      if (!Chose(chosen, t, q.rows, r) || sum[r] == 0.0f) continue;
      const double score = Score(q.q + r * kv.head_size, kv.head_size, t, q.soft_cap,
                                 [&](int64_t token, int64_t c) { return part.K(token, c); });
      const double share = std::exp(score - max[r]) / sum[r];
      total += weight[r] * share * share;
    }
    squares[t] = static_cast<float>(squares[t] + total);
  }
}

void ColumnOutputsCausal(const DenseView& kv, int64_t first, const QueryRows& q, const float* max,
                         const float* sum, const float* in, float* out, float* /*workspace*/) {
  const DensePart part{kv};
  std::vector<double> total(static_cast<size_t>(kv.head_size));
  for (int64_t t = 0; t < kv.n_tokens; ++t) {
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t r = 0; r < q.rows; ++r) {
      if (!Sees(q, first + r / q.group, t) || sum[r] == 0.0f) continue;
      const double score = Score(q.q + r * kv.head_size, kv.head_size, t, q.soft_cap,
                                 [&](int64_t token, int64_t c) { return part.K(token, c); });
      const double weight = std::exp(score - max[r]) / sum[r];
      for (int64_t c = 0; c < kv.head_size; ++c)
        total[static_cast<size_t>(c)] += weight * in[r * kv.head_size + c];
    }
    for (int64_t c = 0; c < kv.head_size; ++c)
      out[t * kv.head_size + c] =
          static_cast<float>(out[t * kv.head_size + c] + total[static_cast<size_t>(c)]);
  }
}

void ColumnSumsStream(const StreamView& kv, const QueryRows& q, const float* max, const float* sum,
                      float* sums, float* /*workspace*/) {
  const int64_t head = kv.layout.head_size;
  const std::vector<float> page_q = PageQueries(kv, q);
  for (int64_t p = 0; p < kv.n_pages; ++p) {
    for (int64_t t = 0; t < kPageTokens; ++t) {
      if ((kv.live[p] >> t & 1) == 0) continue;
      double total = 0;
      for (int64_t r = 0; r < q.rows; ++r) {
        if (sum[r] == 0.0f) continue;
        const double score =
            Score(page_q.data() + r * head, head, t, q.soft_cap,
                  [&](int64_t token, int64_t c) { return PageK(kv.layout, kv.pages[p], token, c); });
        total += std::exp(score - max[r]) / sum[r];
      }
      sums[p * kPageTokens + t] = static_cast<float>(sums[p * kPageTokens + t] + total);
    }
  }
}

void MergeStates(SoftmaxState into, SoftmaxState from, int64_t rows, int64_t head_size) {
  for (int64_t r = 0; r < rows; ++r) {
    const double max = std::fmax(into.max[r], from.max[r]);
    const double base = max == -INFINITY ? 0.0 : max;
    const double keep = std::exp(into.max[r] - base);
    const double add = std::exp(from.max[r] - base);
    for (int64_t c = r * head_size; c < (r + 1) * head_size; ++c)
      into.out[c] = static_cast<float>(into.out[c] * keep + from.out[c] * add);
    into.sum[r] = static_cast<float>(into.sum[r] * keep + from.sum[r] * add);
    into.max[r] = static_cast<float>(max);
  }
}

void Finish(SoftmaxState state, int64_t rows, int64_t head_size) {
  for (int64_t r = 0; r < rows; ++r) {
    const double scale = state.sum[r] == 0.0f ? 0.0 : 1.0 / state.sum[r];
    for (int64_t c = r * head_size; c < (r + 1) * head_size; ++c)
      state.out[c] = static_cast<float>(state.out[c] * scale);
  }
}

}  // namespace moend::reference
