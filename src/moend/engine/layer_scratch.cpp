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

}  // namespace

Expected<LayerScratch> LayerScratch::Create(std::shared_ptr<Ledger> ledger, const KvShape& shape,
                                            int64_t n_heads, int64_t capacity, int64_t score_tokens,
                                            const ScorerNeeds& needs) {
  LayerScratch s;
  s.ledger_ = ledger;
  s.shape_ = shape;
  s.n_heads_ = n_heads;
  s.capacity_ = capacity;
  s.score_tokens_ = std::min(score_tokens, capacity);
  s.n_observed_ = std::min(needs.observed_queries, s.score_tokens_);
  const int64_t elements = shape.n_kv_heads * Pages(capacity) * kPageTokens * shape.head_size;
  MOEND_ASSIGN(s.k_, Buffer<uint16_t>::Create(ledger, elements));
  MOEND_ASSIGN(s.v_, Buffer<uint16_t>::Create(ledger, elements));
  MOEND_ASSIGN(s.observed_, Buffer<float>::Create(ledger, s.n_observed_ * n_heads * shape.head_size));
  MOEND_ASSIGN(s.accumulated_,
               Buffer<float>::Create(ledger, needs.accumulated ? shape.n_kv_heads * s.score_tokens_ : 0));
  const int64_t moments = s.score_tokens_ > 0 ? shape.n_kv_heads * shape.head_size * shape.head_size : 0;
  MOEND_ASSIGN(s.moment_, Buffer<float>::Create(ledger, moments));
  s.Clear();
  return s;
}

void LayerScratch::Clear() {
  n_tokens_ = 0;
  std::fill_n(accumulated_.data(), accumulated_.size(), 0.0f);
  std::fill_n(moment_.data(), moment_.size(), 0.0f);
}

void LayerScratch::Append(const float* q, const float* k, const float* v, int64_t n, float softmax_scale) {
  const int64_t d = shape_.head_size, heads = shape_.n_kv_heads, group = n_heads_ / heads;
  const int64_t stride = Pages(capacity_) * kPageTokens * d;
  n = std::min(n, capacity_ - n_tokens_);
  uint16_t half[256];
  for (int64_t i = 0; i < n; ++i) {
    const int64_t t = n_tokens_ + i, page = t / kPageTokens, slot = t % kPageTokens;
    for (int64_t h = 0; h < heads; ++h) {
      uint16_t* kp = k_.data() + h * stride + page * d * kPageTokens;
      // A new page starts finite everywhere: the kernels read whole pages and mask afterwards.
      if (slot == 0) std::memset(kp, 0, static_cast<std::size_t>(d * kPageTokens) * sizeof(uint16_t));
      ggml_fp32_to_fp16_row(k + (i * heads + h) * d, half, d);
      for (int64_t c = 0; c < d; ++c) kp[c * kPageTokens + slot] = half[c];
      ggml_fp32_to_fp16_row(v + (i * heads + h) * d, v_.data() + h * stride + t * d, d);
    }
    if (t >= score_tokens_ - kMomentTokens && t < score_tokens_)
      for (int64_t h = 0; h < n_heads_; ++h)
        AddMoment(q + (i * n_heads_ + h) * d, d, moment_.data() + h / group * d * d);
    const int64_t seen_from = score_tokens_ - n_observed_;
    if (t < seen_from || t >= score_tokens_) continue;
    for (int64_t h = 0; h < n_heads_; ++h) {
      const float* from = q + (i * n_heads_ + h) * d;
      float* to =
          observed_.data() + ((h / group) * n_observed_ * group + (t - seen_from) * group + h % group) * d;
      for (int64_t c = 0; c < d; ++c) to[c] = from[c] * softmax_scale;
    }
  }
  n_tokens_ += n;
}

DenseView LayerScratch::view(int64_t head, int64_t n) const {
  const int64_t stride = Pages(capacity_) * kPageTokens * shape_.head_size;
  return {shape_.head_size, k_.data() + head * stride, v_.data() + head * stride, std::min(n, n_tokens_)};
}

QueryRows LayerScratch::observed(int64_t head) const {
  const int64_t group = n_heads_ / shape_.n_kv_heads;
  const int64_t rows = n_observed_ * group;
  return {observed_.data() + head * rows * shape_.head_size, rows, group};
}

std::span<const float> LayerScratch::moment(int64_t head) const {
  const int64_t size = shape_.head_size * shape_.head_size;
  if (moment_.size() == 0) return {};
  return {moment_.data() + head * size, static_cast<std::size_t>(size)};
}

float* LayerScratch::accumulated(int64_t head) {
  return accumulated_.size() ? accumulated_.data() + head * score_tokens_ : nullptr;
}

}  // namespace moend
