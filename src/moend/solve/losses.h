// The losses that a Profile measured, made fit for solving.
#pragma once

#include <optional>
#include <vector>

#include "moend/solve/solve.h"

namespace moend {

// What is routed: a row of losses a layer, or one a KV head ([layer * n_kv_heads + head]).
enum class Rows { kLayers, kHeads };

// Fingerprint::window() of the layer that a row is about.
inline int64_t WindowOfRow(const Fingerprint& model, Rows rows, std::size_t row) {
  const auto r = static_cast<int64_t>(row);
  return model.window(rows == Rows::kHeads ? r / model.shape.n_kv_heads : r);
}

// losses[row][expert], of which those of sliding layers mean nothing. From a kl that logits gave the row's
// noise is subtracted, which is that of kNoiseExpert where the profile has it; what is then negative becomes
// 0. An expert that keeps at least as many tokens, K bits and V bits as another cannot truly lose more; where
// noise measured it so, both move to the middle: each loss becomes the mean of the smallest loss measured for
// itself or any lesser expert and the largest measured for itself or any greater one. This is monotone, and
// equals isotonic regression where two neighbours contradict each other.
Expected<std::vector<std::vector<double>>> CleanLosses(const Profile& profile, Metric metric,
                                                       Rows rows = Rows::kLayers);

// The loss of a layer at any keep ratio with the given bits: linear between the profile's keep ratios, the
// nearest one's outside them. Nothing compressed loses nothing, measured or not. nullopt where the profile
// has no expert of these bits.
std::optional<double> LossAt(const std::vector<Expert>& experts, const std::vector<double>& losses,
                             const Expert& expert);

}  // namespace moend
