// The architectures that moend runs: how each one's keys in a GGUF file become HyperParams.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "moend/base/error.h"
#include "moend/model/gguf.h"
#include "moend/model/model.h"

namespace moend {

// `h` comes with what all architectures have in common, its layers all alike, RoPE over the file's keys in
// the mode that `Architecture` says. Errors as ReadHyperParams.
using Describe = Expected<void> (*)(const GgufFile& file, HyperParams& h);

struct Architecture {
  const char* name;  // general.architecture
  int rope_mode;
  bool partial_rope;  // fewer channels than a head has may be turned
  Describe describe;
  // Layers for multi-token prediction, which only speed up, are passed over; else a file that has them is
  // refused.
  bool passes_prediction = false;
};

std::span<const Architecture> Architectures();
const Architecture* FindArchitecture(std::string_view name);
// Those that run: "llama, qwen2, ... and glm4"
std::string ArchitectureNames();

// A key of the file's architecture: Key(h, "block_count") is "llama.block_count".
std::string Key(const HyperParams& h, const char* name);

inline constexpr int64_t kMaxLayers = 512;  // libllama's bounds
inline constexpr int64_t kMaxExperts = 512;
inline constexpr int64_t kMaxUsedExperts = 64;
inline constexpr int64_t kMaxWidth = 1 << 20;
inline constexpr int64_t kMaxContext = 1 << 30;
inline constexpr int64_t kMaxSlidingWindow = 1 << 24;  // what a cache can protect

// expert_count and expert_used_count into every layer's ffn, with expert_feed_forward_length as n_ff where
// the file has it. kCorrupt when the architecture needs experts and there are none (`required`), or more are
// used than there are.
Expected<void> ReadExperts(const GgufFile& file, HyperParams& h, bool required);
// expert_gating_func: the sigmoid, which is what the architecture has where the key is missing. kUnsupported
// for another.
Expected<void> RequireSigmoid(const GgufFile& file, const HyperParams& h);
// expert_shared_feed_forward_length; `fallback` where it is missing or 0.
Expected<void> ReadSharedExpert(const GgufFile& file, HyperParams& h, int64_t fallback, bool gate);
// The layers' windows: attention.sliding_window (`fallback` where it is missing, or 0 for none), in the
// layers that attention.sliding_window_pattern names one by one, or, where it is a number n or missing (then
// `pattern`), in all but every nth. Sliding layers turn at rope.freq_base_swa (`freq_base` where it is
// missing). kCorrupt for a window of 0, and for a pattern that does not fit the layers.
Expected<void> ReadWindows(const GgufFile& file, HyperParams& h, std::optional<int64_t> fallback,
                           int64_t pattern, float freq_base);
// A soft cap: 0 where the key says so, or where it is missing and the fallback is 0. kCorrupt below 0.
Expected<float> ReadSoftCap(const GgufFile& file, const std::string& key, float fallback);
// kUnsupported for a model of experts.
Expected<void> RefuseExperts(const GgufFile& file, const HyperParams& h);

// One line a function, in a file named for the family.
Expected<void> DescribeLlama(const GgufFile& file, HyperParams& h);
Expected<void> DescribeQwen2(const GgufFile& file, HyperParams& h);
Expected<void> DescribeQwen2Moe(const GgufFile& file, HyperParams& h);
Expected<void> DescribeQwen3(const GgufFile& file, HyperParams& h);
Expected<void> DescribeQwen3Moe(const GgufFile& file, HyperParams& h);
Expected<void> DescribeQwen3Next(const GgufFile& file, HyperParams& h);
Expected<void> DescribeQwen35(const GgufFile& file, HyperParams& h);
Expected<void> DescribeQwen35Moe(const GgufFile& file, HyperParams& h);
Expected<void> DescribeOlmoe(const GgufFile& file, HyperParams& h);
Expected<void> DescribePhi3(const GgufFile& file, HyperParams& h);
Expected<void> DescribeSmollm3(const GgufFile& file, HyperParams& h);
Expected<void> DescribeGranite(const GgufFile& file, HyperParams& h);
Expected<void> DescribeMistral3(const GgufFile& file, HyperParams& h);
Expected<void> DescribeGemma2(const GgufFile& file, HyperParams& h);
Expected<void> DescribeGemma3(const GgufFile& file, HyperParams& h);
Expected<void> DescribeGptOss(const GgufFile& file, HyperParams& h);
Expected<void> DescribeGlm4Moe(const GgufFile& file, HyperParams& h);
Expected<void> DescribeMinimaxM2(const GgufFile& file, HyperParams& h);
Expected<void> DescribeGlm4(const GgufFile& file, HyperParams& h);

}  // namespace moend
