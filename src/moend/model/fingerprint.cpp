#include "moend/model/fingerprint.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace moend {
namespace {

// FNV-1a's structure on 64-bit words, with a rotation so that high bits reach low ones.
class Hasher {
 public:
  void Word(uint64_t word) {
    state_ = std::rotl((state_ ^ word) * 0x9e3779b97f4a7c15u, 29);
    state_ *= 0x100000001b3u;
  }
  void Bytes(std::span<const uint8_t> bytes) {
    Word(bytes.size());
    for (std::size_t i = 0; i < bytes.size(); i += 8) {
      uint64_t word = 0;
      std::memcpy(&word, bytes.data() + i, std::min<std::size_t>(8, bytes.size() - i));
      Word(word);
    }
  }
  void Text(std::string_view text) { Bytes({reinterpret_cast<const uint8_t*>(text.data()), text.size()}); }
  void Real(float value) { Word(std::bit_cast<uint32_t>(value)); }
  // splitmix64's finalizer.
  uint64_t Finish() const {
    uint64_t x = state_;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }

 private:
  uint64_t state_ = 0xcbf29ce484222325u;
};

constexpr int64_t kSampleBytes = 1024, kSamples = 4;

void HashData(Hasher& hash, std::span<const uint8_t> data) {
  const auto size = static_cast<int64_t>(data.size());
  if (size <= kSampleBytes * kSamples) {
    hash.Bytes(data);
    return;
  }
  for (int64_t i = 0; i < kSamples; ++i) {
    // Evenly spread, the last one at the end. The quotient first: the product could overflow.
    const int64_t begin =
        i == kSamples - 1 ? size - kSampleBytes : (size - kSampleBytes) / (kSamples - 1) * i;
    hash.Bytes(data.subspan(static_cast<std::size_t>(begin), kSampleBytes));
  }
}

// What is as in the first architectures adds nothing, so that their hashes stay what files of profiles and
// plans say.
void HashLayers(Hasher& hash, const HyperParams& h) {
  if (h.logit_soft_cap != 0) hash.Real(h.logit_soft_cap);
  if (h.embedding_scale != 1 || h.logit_scale != 1 || h.query_temperature.scale != 0)
    for (float f : {h.embedding_scale, h.logit_scale, h.query_temperature.scale,
                    static_cast<float>(h.query_temperature.every)})
      hash.Real(f);
  for (const LayerParams& l : h.layers) {
    if (const DeltaNetParams& d = l.delta_net; d.n_k_heads > 0)
      for (int64_t n : {d.n_k_heads, d.n_v_heads, d.head_size, d.kernel, int64_t{d.grouped}})
        hash.Word(static_cast<uint64_t>(n));
    if (l.output_gate) hash.Word(1);
    const bool rope = l.rope.n_dims == h.head_size;
    const bool old_norm = l.qk_norm == (h.architecture_name == "qwen3" ? QkNorm::kHeads : QkNorm::kNone);
    const bool old_attention = l.window == 0 && l.soft_cap == 0 && !l.sinks;
    const bool old_ffn = l.ffn.n_experts == 0 && !l.ffn.fused && l.ffn.activation == Activation::kSilu;
    if (rope && old_norm && !l.post_norms && l.residual_scale == 1 && old_attention && old_ffn) continue;
    for (int64_t n : {int64_t{l.rope.n_dims}, static_cast<int64_t>(l.qk_norm), int64_t{l.post_norms},
                      l.ffn.n_ff, int64_t{l.ffn.fused}, l.ffn.n_experts, l.ffn.n_used,
                      int64_t{l.ffn.normalize}, l.ffn.n_ff_shared, int64_t{l.ffn.shared_gate}})
      hash.Word(static_cast<uint64_t>(n));
    hash.Real(l.residual_scale);
    if (l.ffn.selection_bias || l.ffn.weight_scale != 1) {
      hash.Word(l.ffn.selection_bias);
      hash.Real(l.ffn.weight_scale);
    }
    if (!old_attention || l.ffn.activation != Activation::kSilu || l.ffn.router != Router::kSoftmax) {
      for (int64_t n : {l.window, int64_t{l.sinks}, static_cast<int64_t>(l.ffn.activation),
                        static_cast<int64_t>(l.ffn.router), int64_t{l.ffn.expert_biases}})
        hash.Word(static_cast<uint64_t>(n));
      for (float f : {l.soft_cap, l.rope.freq_base, l.rope.freq_scale}) hash.Real(f);
    }
  }
}

}  // namespace

std::string ModelHash(const GgufFile& file, const HyperParams& h) {
  Hasher hash;
  hash.Text(h.architecture_name);
  for (int64_t n :
       {h.n_layers, h.n_embd, h.n_heads, h.n_kv_heads, h.head_size, h.n_ff, h.n_vocab, h.n_ctx_train})
    hash.Word(static_cast<uint64_t>(n));
  const RopeParams& r = h.rope;
  for (float f : {h.rms_eps, h.softmax_scale, r.freq_base, r.freq_scale, r.ext_factor, r.attn_factor,
                  r.beta_fast, r.beta_slow})
    hash.Real(f);
  hash.Word(static_cast<uint64_t>(r.n_ctx_orig));

  HashLayers(hash, h);

  // By name, so that the order in the file does not matter.
  std::vector<const GgufTensor*> tensors;
  for (const GgufTensor& t : file.tensors()) tensors.push_back(&t);
  std::sort(tensors.begin(), tensors.end(), [](auto* a, auto* b) { return a->name < b->name; });
  for (const GgufTensor* t : tensors) {
    hash.Text(t->name);
    hash.Word(static_cast<uint64_t>(t->type));
    for (int64_t n : t->ne) hash.Word(static_cast<uint64_t>(n));
    HashData(hash, {t->data, static_cast<std::size_t>(t->bytes)});
  }
  return fmt::format("{:016x}", hash.Finish());
}

}  // namespace moend
