#include "moend/engine/own_attention.h"

#include <ggml-backend.h>

#include <cmath>

namespace moend {

ggml_context_ptr DescribeTensors(int64_t n) {
  return ggml_context_ptr(
      ggml_init({ggml_tensor_overhead() * static_cast<std::size_t>(n), nullptr, /*no_alloc=*/true}));
}

void OwnAttention::Init(const HyperParams& h, ggml_backend_dev_t device, int64_t most_rows) {
  h_ = &h;
  device_ = device;
  most_rows_ = most_rows;
}

std::optional<OwnAttention::Block> OwnAttention::Prepare(const LayerParams& p,
                                                         const AttentionHook::OwnTokens& own, int64_t n) {
  // A block that was attended to elsewhere is not there, nor are those before it any more.
  const bool follows = own.before == 0 || own.before == stored_;
  stored_ = -1;
  if (!follows) return std::nullopt;
  // What lies there of the layer is lost when the memory grows.
  if (own.most > capacity_ && (own.before > 0 || !Reserve(own.most))) return std::nullopt;
  if (!Supported(p, n)) return std::nullopt;
  const ggml_tensor* mask = StripOf(p.window);
  if (!mask) return std::nullopt;
  stored_ = own.before + n;
  return Block{own.before, n, mask};
}

bool OwnAttention::Supported(const LayerParams& p, int64_t n) const {
  const ggml_context_ptr ctx = DescribeTensors(32);
  if (!ctx) return false;
  const auto rows = [&](ggml_type type, int64_t tokens, int64_t heads) {
    ggml_tensor* t = ggml_new_tensor_3d(ctx.get(), type, h_->head_size, heads, tokens);
    return ggml_permute(ctx.get(), t, 0, 2, 1, 3);
  };
  const int64_t columns = Padded(n);
  ggml_tensor* op = ggml_flash_attn_ext(
      ctx.get(), rows(GGML_TYPE_F32, n, h_->n_heads), rows(GGML_TYPE_F16, columns, h_->n_kv_heads),
      rows(GGML_TYPE_F16, columns, h_->n_kv_heads), ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, columns, n),
      h_->softmax_scale, 0.0f, p.soft_cap);
  if (p.sinks) ggml_flash_attn_ext_add_sinks(op, ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, h_->n_heads));
  return ggml_backend_dev_supports_op(device_, op);
}

bool OwnAttention::Reserve(int64_t most) {
  strips_.clear();
  buffer_.reset();
  capacity_ = 0;
  ctx_ = DescribeTensors(2);
  if (!ctx_) return false;
  const int64_t width = h_->n_kv_heads * h_->head_size, tokens = Padded(most);
  k_ = ggml_new_tensor_2d(ctx_.get(), GGML_TYPE_F16, width, tokens);
  v_ = ggml_new_tensor_2d(ctx_.get(), GGML_TYPE_F16, width, tokens);
  buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx_.get(), ggml_backend_dev_buffer_type(device_)));
  if (!buffer_) return false;
  // What is masked is read, too, and must be numbers.
  ggml_backend_buffer_clear(buffer_.get(), 0);
  capacity_ = tokens;
  return true;
}

const ggml_tensor* OwnAttention::StripOf(int64_t window) {
  for (const Strip& s : strips_)
    if (s.window == window) return s.mask;
  Strip strip;
  strip.window = window;
  strip.ctx = DescribeTensors(1);
  if (!strip.ctx) return nullptr;
  const int64_t columns = capacity_ + Padded(most_rows_) + kUnit;
  strip.mask = ggml_new_tensor_2d(strip.ctx.get(), GGML_TYPE_F16, columns, most_rows_);
  strip.buffer.reset(
      ggml_backend_alloc_ctx_tensors_from_buft(strip.ctx.get(), ggml_backend_dev_buffer_type(device_)));
  if (!strip.buffer) return nullptr;
  const ggml_fp16_t seen = ggml_fp32_to_fp16(0.0f), hidden = ggml_fp32_to_fp16(-INFINITY);
  std::vector<ggml_fp16_t> row(static_cast<std::size_t>(columns));
  for (int64_t i = 0; i < most_rows_; ++i) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t behind = capacity_ + i - c;  // tokens between the query's and the key's
      row[static_cast<std::size_t>(c)] = behind >= 0 && (window == 0 || behind < window) ? seen : hidden;
    }
    ggml_backend_tensor_set(strip.mask, row.data(), static_cast<std::size_t>(i) * strip.mask->nb[1],
                            row.size() * sizeof(ggml_fp16_t));
  }
  strips_.push_back(std::move(strip));
  return strips_.back().mask;
}

ggml_tensor* OwnAttention::Build(ggml_context* ctx, ggml_cgraph* graph, const LayerParams& p,
                                 const LayerWeights& w, const Block& block, ggml_tensor* q, ggml_tensor* k,
                                 ggml_tensor* v) const {
  const int64_t size = h_->head_size, width = h_->n_kv_heads * size, columns = Padded(block.before + block.n);
  const auto store = [&](ggml_tensor* from, ggml_tensor* to) {
    ggml_tensor* rows =
        ggml_view_2d(ctx, to, width, block.n, to->nb[1], static_cast<std::size_t>(block.before) * to->nb[1]);
    ggml_build_forward_expand(graph, ggml_cpy(ctx, ggml_reshape_2d(ctx, from, width, block.n), rows));
  };
  store(k, k_);
  store(v, v_);
  const auto all = [&](ggml_tensor* t) {
    return ggml_view_3d(ctx, t, size, columns, h_->n_kv_heads, t->nb[1], ggml_row_size(GGML_TYPE_F16, size),
                        0);
  };
  ggml_tensor* strip = const_cast<ggml_tensor*>(block.mask);
  ggml_tensor* mask =
      ggml_cont(ctx, ggml_view_2d(ctx, strip, columns, block.n, strip->nb[1],
                                  static_cast<std::size_t>(capacity_ - block.before) * sizeof(ggml_fp16_t)));
  ggml_tensor* out = ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), all(k_), all(v_), mask,
                                         h_->softmax_scale, 0.0f, p.soft_cap);
  if (p.sinks) ggml_flash_attn_ext_add_sinks(out, w.sinks);
  return ggml_reshape_2d(ctx, out, size * h_->n_heads, block.n);
}

}  // namespace moend
