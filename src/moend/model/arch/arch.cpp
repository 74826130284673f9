#include "moend/model/arch/arch.h"

#include <array>
#include <vector>

namespace moend {
namespace {

constexpr int kNormal = GGML_ROPE_TYPE_NORMAL, kNeox = GGML_ROPE_TYPE_NEOX;

constexpr std::array kArchitectures = {
    Architecture{"llama", kNormal, false, DescribeLlama},
    Architecture{"qwen2", kNeox, false, DescribeQwen2},
    Architecture{"qwen2moe", kNeox, false, DescribeQwen2Moe},
    Architecture{"qwen3", kNeox, false, DescribeQwen3},
    Architecture{"qwen3moe", kNeox, false, DescribeQwen3Moe},
    Architecture{"qwen3next", kNeox, true, DescribeQwen3Next, /*passes_prediction=*/true},
    Architecture{"qwen35", kNeox, true, DescribeQwen35, /*passes_prediction=*/true},
    Architecture{"qwen35moe", kNeox, true, DescribeQwen35Moe, /*passes_prediction=*/true},
    Architecture{"olmoe", kNeox, false, DescribeOlmoe},
    Architecture{"gemma2", kNeox, false, DescribeGemma2},
    Architecture{"gemma3", kNeox, false, DescribeGemma3},
    Architecture{"gpt-oss", kNeox, false, DescribeGptOss},
    Architecture{"phi3", kNeox, true, DescribePhi3},
    Architecture{"smollm3", kNormal, false, DescribeSmollm3},
    Architecture{"granite", kNormal, false, DescribeGranite},
    Architecture{"granitemoe", kNormal, false, DescribeGranite},
    Architecture{"mistral3", kNormal, false, DescribeMistral3},
    Architecture{"minimax-m2", kNeox, true, DescribeMinimaxM2},
    Architecture{"glm4moe", kNeox, true, DescribeGlm4Moe, /*passes_prediction=*/true},
    Architecture{"glm4", kNormal, true, DescribeGlm4},
};

}  // namespace

std::span<const Architecture> Architectures() {
  return kArchitectures;
}

const Architecture* FindArchitecture(std::string_view name) {
  for (const Architecture& a : kArchitectures)
    if (a.name == name) return &a;
  return nullptr;
}

std::string ArchitectureNames() {
  std::vector<std::string_view> names;
  for (const Architecture& a : kArchitectures) names.push_back(a.name);
  std::string out;
  for (std::size_t i = 0; i < names.size(); ++i)
    out += fmt::format("{}{}", i == 0 ? "" : i + 1 == names.size() ? " and " : ", ", names[i]);
  return out;
}

std::string Key(const HyperParams& h, const char* name) {
  return fmt::format("{}.{}", h.architecture_name, name);
}

Expected<void> ReadExperts(const GgufFile& file, HyperParams& h, bool required) {
  MOEND_ASSIGN(const int64_t count, file.Integer(Key(h, "expert_count"), 0, kMaxExperts, 0));
  MOEND_ASSIGN(const int64_t used,
               file.SameInteger(Key(h, "expert_used_count"), h.n_blocks, 0, kMaxExperts, 0));
  if (count == 0 && !required) return {};
  if (count == 0 || used == 0 || used > count)
    return Fail(ErrorCode::kCorrupt, "{} has {} experts of which {} are used at once", file.path(), count,
                used);
  if (used > kMaxUsedExperts)
    return Fail(ErrorCode::kUnsupported, "{} uses {} experts at once; moend runs models that use up to {}",
                file.path(), used, kMaxUsedExperts);
  MOEND_ASSIGN(const int64_t n_ff,
               file.SameInteger(Key(h, "expert_feed_forward_length"), h.n_blocks, 0, kMaxWidth, 0));
  MOEND_ASSIGN(const int64_t groups, file.Integer(Key(h, "expert_group_count"), 0, kMaxExperts, 0));
  if (groups > 1)
    return Fail(ErrorCode::kUnsupported,
                "{} chooses among {} groups of experts first; moend runs models that choose among all",
                file.path(), groups);
  for (LayerParams& layer : h.layers) {
    layer.ffn.n_experts = count;
    layer.ffn.n_used = used;
    if (n_ff > 0) layer.ffn.n_ff = n_ff;
  }
  return {};
}

Expected<void> RequireSigmoid(const GgufFile& file, const HyperParams& h) {
  constexpr int64_t kNone = 0, kSigmoid = 2;
  MOEND_ASSIGN(const int64_t function, file.Integer(Key(h, "expert_gating_func"), 0, INT32_MAX, kNone));
  if (function != kNone && function != kSigmoid)
    return Fail(ErrorCode::kUnsupported,
                "{} weighs its experts by function {}; moend runs the architecture {} with {}, the sigmoid",
                file.path(), function, h.architecture_name, kSigmoid);
  return {};
}

Expected<void> ReadSharedExpert(const GgufFile& file, HyperParams& h, int64_t fallback, bool gate) {
  MOEND_ASSIGN(int64_t n_ff, file.Integer(Key(h, "expert_shared_feed_forward_length"), 0, kMaxWidth, 0));
  if (n_ff == 0) n_ff = fallback;
  for (LayerParams& layer : h.layers) {
    layer.ffn.n_ff_shared = n_ff;
    layer.ffn.shared_gate = gate;
  }
  return {};
}

Expected<void> ReadWindows(const GgufFile& file, HyperParams& h, std::optional<int64_t> fallback,
                           int64_t pattern, float freq_base) {
  const std::string window_key = Key(h, "attention.sliding_window");
  int64_t window = 0;
  if (file.Find(window_key) || !fallback) {
    MOEND_ASSIGN(window, file.Integer(window_key, 1, kMaxSlidingWindow));
  } else {
    window = *fallback;
  }
  if (window == 0) return {};
  for (const char* name : {"attention.key_length_swa", "attention.value_length_swa"}) {
    MOEND_ASSIGN(const int64_t size, file.Integer(Key(h, name), 0, kMaxWidth, h.head_size));
    if (size != h.head_size)
      return Fail(ErrorCode::kUnsupported,
                  "{}: {} is {}, and heads of full layers have {} channels; moend runs models where both are "
                  "equal",
                  file.path(), Key(h, name), size, h.head_size);
  }
  MOEND_ASSIGN(freq_base, file.Real(Key(h, "rope.freq_base_swa"), freq_base));
  if (!(freq_base > 1.0f))
    return Fail(ErrorCode::kCorrupt, "{}: {} is {}, but must be above 1", file.path(),
                Key(h, "rope.freq_base_swa"), freq_base);
  const std::string pattern_key = Key(h, "attention.sliding_window_pattern");
  const GgufValue* given = file.Find(pattern_key);
  std::vector<bool> sliding;
  if (given && given->is_array) {
    MOEND_ASSIGN(sliding, file.Booleans(pattern_key, h.n_layers));
  } else {
    // More than there are layers would leave no full one, which nobody writes down like that.
    MOEND_ASSIGN(pattern, file.Integer(pattern_key, 1, h.n_layers, pattern));
    for (int64_t l = 0; l < h.n_layers; ++l) sliding.push_back(l % pattern < pattern - 1);
  }
  for (std::size_t l = 0; l < sliding.size(); ++l) {
    if (!sliding[l]) continue;
    h.layers[l].window = window;
    h.layers[l].rope.freq_base = freq_base;
  }
  return {};
}

Expected<float> ReadSoftCap(const GgufFile& file, const std::string& key, float fallback) {
  MOEND_ASSIGN(const float cap, file.Real(key, fallback));
  if (cap < 0) return Fail(ErrorCode::kCorrupt, "{}: {} is {}, below 0", file.path(), key, cap);
  return cap;
}

Expected<void> RefuseExperts(const GgufFile& file, const HyperParams& h) {
  MOEND_ASSIGN(const int64_t count, file.Integer(Key(h, "expert_count"), 0, INT64_MAX, 0));
  if (count > 0)
    return Fail(ErrorCode::kUnsupported,
                "{} is a mixture of {} experts; moend runs the architecture {} only without experts",
                file.path(), count, h.architecture_name);
  return {};
}

}  // namespace moend
