// qwen3next, qwen35 and qwen35moe (Qwen3-Next, Qwen3.5): gated delta nets, and every few layers attention
// whose output is gated.
#include "moend/model/arch/arch.h"

namespace moend {
namespace {

constexpr int64_t kMaxKernel = 64, kMaxDeltaHead = 1024;

// Which layers are delta nets: attention.recurrent_layers, or all but every full_attention_interval-th.
Expected<std::vector<bool>> Recurrent(const GgufFile& file, const HyperParams& h) {
  const std::string key = Key(h, "attention.recurrent_layers");
  if (file.Find(key)) return file.Booleans(key, h.n_blocks);
  MOEND_ASSIGN(const int64_t interval, file.Integer(Key(h, "full_attention_interval"), 1, kMaxLayers, 4));
  std::vector<bool> recurrent;
  for (int64_t l = 0; l < h.n_blocks; ++l) recurrent.push_back((l + 1) % interval != 0);
  return recurrent;
}

Expected<DeltaNetParams> ReadDeltaNet(const GgufFile& file, const HyperParams& h) {
  DeltaNetParams p;
  MOEND_ASSIGN(p.kernel, file.Integer(Key(h, "ssm.conv_kernel"), 2, kMaxKernel));
  MOEND_ASSIGN(p.head_size, file.Integer(Key(h, "ssm.state_size"), 1, kMaxDeltaHead));
  MOEND_ASSIGN(p.n_k_heads, file.Integer(Key(h, "ssm.group_count"), 1, kMaxWidth));
  MOEND_ASSIGN(p.n_v_heads, file.Integer(Key(h, "ssm.time_step_rank"), 1, kMaxWidth));
  MOEND_ASSIGN(const int64_t width, file.Integer(Key(h, "ssm.inner_size"), 1, kMaxWidth));
  if (p.n_v_heads % p.n_k_heads != 0)
    return Fail(ErrorCode::kCorrupt, "{}: {} heads of V cannot share {} heads of K of a delta net evenly",
                file.path(), p.n_v_heads, p.n_k_heads);
  if (p.n_v_heads * p.head_size != width)
    return Fail(ErrorCode::kCorrupt, "{}: {} heads of {} channels do not add up to {} = {}", file.path(),
                p.n_v_heads, p.head_size, Key(h, "ssm.inner_size"), width);
  return p;
}

// Text moves along all three axes at once, so that rotation by sections is plain RoPE, but for channels that
// no axis has: those of a fourth one, which text does not move along.
Expected<void> CheckSections(const GgufFile& file, const HyperParams& h) {
  const std::string key = Key(h, "rope.dimension_sections");
  MOEND_ASSIGN(const auto sections, file.Integers(key, 4, 0, kMaxWidth));
  const int64_t all = sections[0] + sections[1] + sections[2] + sections[3];
  if (all == 0 || all > h.head_size)
    return Fail(ErrorCode::kCorrupt, "{}: {} add up to {} pairs of the {} channels of a head", file.path(),
                key, all, h.head_size);
  for (int64_t pair = 0; pair < h.rope.n_dims / 2; ++pair) {
    if (const int64_t at = pair % all; at >= 3 * sections[static_cast<std::size_t>(at % 3)])
      return Fail(ErrorCode::kUnsupported,
                  "{}: {} leaves out the pair {} of channels; moend runs models whose pairs all turn",
                  file.path(), key, pair);
  }
  return {};
}

Expected<void> DescribeHybrid(const GgufFile& file, HyperParams& h, bool grouped) {
  h.ffn_norm = "post_attention_norm";
  MOEND_ASSIGN(const std::vector<bool> recurrent, Recurrent(file, h));
  MOEND_ASSIGN(DeltaNetParams net, ReadDeltaNet(file, h));
  net.grouped = grouped;
  for (std::size_t l = 0; l < h.layers.size(); ++l) {
    if (recurrent[l]) {
      h.layers[l].delta_net = net;
    } else {
      h.layers[l].qk_norm = QkNorm::kHeads;
      h.layers[l].output_gate = true;
    }
  }
  return {};
}

Expected<void> DescribeExperts(const GgufFile& file, HyperParams& h) {
  MOEND_TRY(ReadExperts(file, h, /*required=*/true));
  const bool own_width = file.Find(Key(h, "expert_feed_forward_length"));
  for (LayerParams& layer : h.layers) {
    layer.ffn.normalize = true;
    if (!own_width) layer.ffn.n_ff = h.n_ff / layer.ffn.n_used;
  }
  return ReadSharedExpert(file, h, h.n_ff, /*gate=*/true);
}

}  // namespace

Expected<void> DescribeQwen3Next(const GgufFile& file, HyperParams& h) {
  MOEND_TRY(DescribeHybrid(file, h, /*grouped=*/true));
  return DescribeExperts(file, h);
}

Expected<void> DescribeQwen35(const GgufFile& file, HyperParams& h) {
  MOEND_TRY(DescribeHybrid(file, h, /*grouped=*/false));
  MOEND_TRY(CheckSections(file, h));
  return RefuseExperts(file, h);
}

Expected<void> DescribeQwen35Moe(const GgufFile& file, HyperParams& h) {
  MOEND_TRY(DescribeHybrid(file, h, /*grouped=*/false));
  MOEND_TRY(CheckSections(file, h));
  return DescribeExperts(file, h);
}

}  // namespace moend
