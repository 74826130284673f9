#include "moend/engine/layer_scratch.h"

#include <ggml.h>

#include <algorithm>
#include <cstring>

namespace moend {
namespace {

int64_t Pages(int64_t tokens) {
  return (tokens + kPageTokens - 1) / kPageTokens;
}

// moment += q q'
void AddMoment(const float* q, int64_t d, float* moment) {
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < d; ++j) moment[i * d + j] += q[i] * q[j];
}

// Whether item i is among `wanted` ones that are spread over all `total`.
bool IsOneOf(int64_t i, int64_t wanted, int64_t total) {
  return (i + 1) * wanted / total != i * wanted / total;
}

// What the buffers of a scratch hold, in elements.
struct Sizes {
  Sizes(const KvShape& shape, int64_t n_heads, int64_t capacity, int64_t score, const ScorerNeeds& needs)
      : score_tokens(std::min(score, capacity)),
        n_observed(std::min(needs.observed_queries, score_tokens)),
        most_repeated(needs.repetition ? needs.reference_tokens : 0),
        most_own(needs.learned ? needs.reference_tokens : 0),
        kv(shape.n_kv_heads * Pages(capacity) * kPageTokens * shape.head_size),
        observed(n_observed * n_heads * shape.head_size),
        accumulated(needs.accumulated ? shape.n_kv_heads * score_tokens : 0),
        needed(needs.repetition ? shape.n_kv_heads * score_tokens : 0),
        expected(needs.learned ? shape.n_kv_heads * score_tokens : 0),
        repeated(most_repeated * n_heads * shape.head_size),
        own(most_own * n_heads * shape.head_size),
        moment(score_tokens > 0 ? shape.n_kv_heads * shape.head_size * shape.head_size : 0) {}
  int64_t score_tokens, n_observed, most_repeated, most_own;
  int64_t kv;  // of k and of v, 16 bit; the others are f32
  int64_t observed, accumulated, needed, expected, repeated, own, moment;
};

}  // namespace

int64_t LayerScratch::Bytes(const KvShape& shape, int64_t n_heads, int64_t capacity, int64_t score_tokens,
                            const ScorerNeeds& needs, int64_t state_floats) {
  const Sizes size(shape, n_heads, capacity, score_tokens, needs);
  int64_t bytes = 2 * RoundUp(size.kv * static_cast<int64_t>(sizeof(uint16_t)), kCacheLine);
  for (const int64_t n : {size.observed, size.accumulated, size.needed, size.expected, size.repeated,
                          size.own, size.most_repeated, size.moment, state_floats})
    bytes += RoundUp(n * static_cast<int64_t>(sizeof(float)), kCacheLine);
  return bytes;
}

Expected<LayerScratch> LayerScratch::Create(std::shared_ptr<Ledger> ledger, const KvShape& shape,
                                            int64_t n_heads, int64_t capacity, int64_t score_tokens,
                                            const ScorerNeeds& needs, int64_t state_floats) {
  LayerScratch s;
  s.ledger_ = ledger;
  s.shape_ = shape;
  s.n_heads_ = n_heads;
  s.capacity_ = capacity;
  const Sizes size(shape, n_heads, capacity, score_tokens, needs);
  s.score_tokens_ = size.score_tokens;
  s.n_observed_ = size.n_observed;
  s.repeated_.most = size.most_repeated;
  s.own_.most = size.most_own;
  MOEND_ASSIGN(s.k_, Buffer<uint16_t>::Create(ledger, size.kv));
  MOEND_ASSIGN(s.v_, Buffer<uint16_t>::Create(ledger, size.kv));
  MOEND_ASSIGN(s.observed_, Buffer<float>::Create(ledger, size.observed));
  MOEND_ASSIGN(s.accumulated_, Buffer<float>::Create(ledger, size.accumulated));
  MOEND_ASSIGN(s.needed_, Buffer<float>::Create(ledger, size.needed));
  MOEND_ASSIGN(s.expected_, Buffer<float>::Create(ledger, size.expected));
  MOEND_ASSIGN(s.repeated_.q, Buffer<float>::Create(ledger, size.repeated));
  MOEND_ASSIGN(s.own_.q, Buffer<float>::Create(ledger, size.own));
  MOEND_ASSIGN(s.reference_weight_, Buffer<float>::Create(ledger, size.most_repeated));
  MOEND_ASSIGN(s.moment_, Buffer<float>::Create(ledger, size.moment));
  MOEND_ASSIGN(s.state_, Buffer<float>::Create(ledger, state_floats));
  s.Clear();
  return s;
}

void LayerScratch::Clear() {
  n_tokens_ = repeated_.n = own_.n = 0;
  std::fill_n(accumulated_.data(), accumulated_.size(), 0.0f);
  std::fill_n(needed_.data(), needed_.size(), 0.0f);
  std::fill_n(expected_.data(), expected_.size(), 0.0f);
  std::fill_n(moment_.data(), moment_.size(), 0.0f);
  std::ranges::fill(state(), 0.0f);
}

Expected<void> LayerScratch::KeepState() {
  MOEND_ASSIGN(kept_state_, Buffer<float>::Create(ledger_, state_.size()));
  std::ranges::copy(state(), kept_state_.data());
  return {};
}

void LayerScratch::Truncate(int64_t n) {
  n_tokens_ = std::min(n, n_tokens_);
  std::copy_n(kept_state_.data(), kept_state_.size(), state_.data());
}

void LayerScratch::Append(const float* q, const float* k, const float* v, int64_t n,
                          const AttentionStyle& style, const Each& each) {
  style_ = style;
  n = std::min(n, capacity_ - n_tokens_);
  const auto on_each = [&](int64_t count, const std::function<void(int64_t)>& f) {
    if (each) return each(count, f);
    for (int64_t i = 0; i < count; ++i) f(i);
  };
  const int64_t first_page = n_tokens_ / kPageTokens, pages = Pages(n_tokens_ + n) - first_page;
  on_each(shape_.n_kv_heads * pages, [&](int64_t item) {
    const int64_t begin = (first_page + item % pages) * kPageTokens - n_tokens_;
    AppendTokens(item / pages, k, v, std::max<int64_t>(0, begin), std::min(n, begin + kPageTokens));
  });
  if (SeesQueries(n)) on_each(shape_.n_kv_heads, [&](int64_t head) { Observe(head, q, n); });
  n_tokens_ += n;
}

void LayerScratch::AppendTokens(int64_t head, const float* k, const float* v, int64_t begin, int64_t end) {
  const int64_t d = shape_.head_size, heads = shape_.n_kv_heads;
  const int64_t stride = Pages(capacity_) * kPageTokens * d;
  constexpr int64_t kRun = 16;  // tokens turned together, since channels lie far apart
  uint16_t half[kRun][256];
  for (int64_t i = begin; i < end;) {
    const int64_t t = n_tokens_ + i, page = t / kPageTokens, slot = t % kPageTokens;
    const int64_t run = std::min({kRun, end - i, kPageTokens - slot});
    uint16_t* kp = k_.data() + head * stride + page * d * kPageTokens;
    // A new page starts finite everywhere: the kernels read whole pages and mask afterwards.
    if (slot == 0) std::memset(kp, 0, static_cast<std::size_t>(d * kPageTokens) * sizeof(uint16_t));
    for (int64_t r = 0; r < run; ++r) {
      ggml_fp32_to_fp16_row(k + ((i + r) * heads + head) * d, half[r], d);
      ggml_fp32_to_fp16_row(v + ((i + r) * heads + head) * d, v_.data() + head * stride + (t + r) * d, d);
    }
    for (int64_t c = 0; c < d; ++c)
      for (int64_t r = 0; r < run; ++r) kp[c * kPageTokens + slot + r] = half[r][c];
    i += run;
  }
}

void LayerScratch::Observe(int64_t head, const float* q, int64_t n) {
  const int64_t d = shape_.head_size, heads = shape_.n_kv_heads, group = n_heads_ / heads;
  const int64_t seen_from = score_tokens_ - n_observed_;
  for (int64_t i = std::max<int64_t>(0, score_tokens_ - kMomentTokens - n_tokens_);
       i < n && n_tokens_ + i < score_tokens_; ++i)
    for (int64_t g = 0; g < group; ++g)
      AddMoment(q + ((i * heads + head) * group + g) * d, d, moment_.data() + head * d * d);
  for (int64_t i = std::max<int64_t>(0, seen_from - n_tokens_); i < n && n_tokens_ + i < score_tokens_; ++i) {
    const float* from = q + (i * heads + head) * group * d;
    float* to = observed_.data() + (head * n_observed_ + n_tokens_ + i - seen_from) * group * d;
    for (int64_t c = 0; c < group * d; ++c) to[c] = from[c] * style_.scale;
  }
}

bool LayerScratch::SeesQueries(int64_t n) const {
  return n_tokens_ < score_tokens_ && n_tokens_ + n > score_tokens_ - std::max(kMomentTokens, n_observed_);
}

bool LayerScratch::WantsQueries(int64_t n) const {
  if (SeesQueries(n)) return true;
  for (int64_t t = n_tokens_; t < n_tokens_ + n; ++t)
    if (RefersTo(t)) return true;
  return false;
}

DenseView LayerScratch::view(int64_t head, int64_t n) const {
  const int64_t stride = Pages(capacity_) * kPageTokens * shape_.head_size;
  return {shape_.head_size, k_.data() + head * stride, v_.data() + head * stride, std::min(n, n_tokens_)};
}

QueryRows LayerScratch::observed(int64_t head) const {
  const int64_t group = n_heads_ / shape_.n_kv_heads;
  const int64_t rows = n_observed_ * group;
  return style_.Rows(observed_.data() + head * rows * shape_.head_size, rows, group, head);
}

std::span<const float> LayerScratch::moment(int64_t head) const {
  const int64_t size = shape_.head_size * shape_.head_size;
  if (moment_.size() == 0) return {};
  return {moment_.data() + head * size, static_cast<std::size_t>(size)};
}

float* LayerScratch::accumulated(int64_t head) {
  return accumulated_.size() ? accumulated_.data() + head * score_tokens_ : nullptr;
}

void LayerScratch::Add(const float* q, const AttentionStyle& style, Reference& to) {
  const int64_t d = shape_.head_size, group = n_heads_ / shape_.n_kv_heads;
  for (int64_t h = 0; h < n_heads_; ++h) {
    const int64_t row = h / group * to.most * group + to.n * group + h % group;
    for (int64_t c = 0; c < d; ++c) to.q[row * d + c] = q[h * d + c] * style.scale;
  }
  ++to.n;
}

void LayerScratch::Refer(const float* q, const float* weight, int64_t index, int64_t n, int64_t total) {
  const int64_t wanted = std::min(repeated_.most, total);
  for (int64_t i = 0; i < n && repeated_.n < wanted; ++i) {
    if (!IsOneOf(index + i, wanted, total)) continue;
    reference_weight_[repeated_.n] = weight[i];
    Add(q + i * n_heads_ * shape_.head_size, style_, repeated_);
  }
}

bool LayerScratch::RefersTo(int64_t t) const {
  const int64_t wanted = std::min(own_.most, score_tokens_);
  return t < score_tokens_ && own_.n < wanted && IsOneOf(t, wanted, score_tokens_);
}

void LayerScratch::ReferOwn(const float* q, const AttentionStyle& style) {
  Add(q, style, own_);
}

void LayerScratch::ScaleReference(float scale) {
  for (int64_t i = 0; i < repeated_.n; ++i) reference_weight_[i] *= scale;
}

QueryRows LayerScratch::Rows(const Reference& from, int64_t head) const {
  const int64_t group = n_heads_ / shape_.n_kv_heads;
  return style_.Rows(from.q.data() + head * from.most * group * shape_.head_size, from.n * group, group,
                     head);
}

float* LayerScratch::needed(int64_t head) {
  return needed_.size() ? needed_.data() + head * score_tokens_ : nullptr;
}

float* LayerScratch::expected(int64_t head) {
  return expected_.size() ? expected_.data() + head * score_tokens_ : nullptr;
}

}  // namespace moend
