// Attention on a device while a prompt is read: ggml's flash attention over 16 bit K/V of the layer at hand,
// which the next layer overwrites.
#pragma once

#include <ggml-cpp.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "moend/base/error.h"
#include "moend/model/graph.h"
#include "moend/model/model.h"

namespace moend {

// A context for so many tensors, without their data; null when there is no memory.
ggml_context_ptr DescribeTensors(int64_t n);

class OwnAttention {
 public:
  // `device` in whose memory K/V lie. `most_rows`: of a block.
  void Init(const HyperParams& h, ggml_backend_dev_t device, int64_t most_rows);

  // What a block's graph needs.
  struct Block {
    int64_t before = 0, n = 0;
    const ggml_tensor* mask = nullptr;  // the strip that the block's mask is cut from
  };
  // Memory for such a block of a layer, which Build() is then called for; nothing where the device does not
  // attend to it so: no such kernel, no memory for `own.most` tokens, or a block of the layer that it was not
  // given.
  std::optional<Block> Prepare(const LayerParams& p, const AttentionHook::OwnTokens& own, int64_t n);

  // Stores k, v of the block and attends: nodes of `ctx`. q, k, v as in AttentionInputs. Returns f32
  // [head_size * n_heads, n].
  ggml_tensor* Build(ggml_context* ctx, ggml_cgraph* graph, const LayerParams& p, const LayerWeights& w,
                     const Block& block, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v) const;

 private:
  // f16 [columns, rows]: row i sees the columns up to Origin() + i, and of a window's columns the newest.
  struct Strip {
    int64_t window = 0;
    ggml_context_ptr ctx;
    ggml_backend_buffer_ptr buffer;
    ggml_tensor* mask = nullptr;
  };
  static constexpr int64_t kUnit = 256;  // ggml's kernels are fastest for multiples of this
  static int64_t Padded(int64_t tokens) { return (tokens + kUnit - 1) / kUnit * kUnit; }
  bool Supported(const LayerParams& p, int64_t n) const;
  bool Reserve(int64_t most);
  const ggml_tensor* StripOf(int64_t window);

  const HyperParams* h_ = nullptr;
  ggml_backend_dev_t device_ = nullptr;
  int64_t most_rows_ = 0, capacity_ = 0;
  int64_t stored_ = -1;  // tokens of the layer at hand that are there; -1: not all that came before
  ggml_context_ptr ctx_;
  ggml_backend_buffer_ptr buffer_;
  ggml_tensor *k_ = nullptr, *v_ = nullptr;  // f16 [n_kv_heads * head_size, capacity_]
  std::vector<Strip> strips_;                // one a window
};

}  // namespace moend
