// The calibration of the MoE-nD paper (arXiv 2604.17695), for comparison: one prompt of 27 tokens, tokens
// evicted at random, and the relative L2 error of each layer's attention output as the only measure.
#pragma once

#include <span>
#include <vector>

#include "moend/engine/engine.h"
#include "moend/plan/plan.h"

namespace moend {

inline constexpr int64_t kPaperTokens = 27;

// keep {0.1, 0.25, 0.5, 0.75, 0.9, 1.0} x K {16, 8, 4} bit x V {16, 8, 4} bit, ascending.
std::vector<Expert> PaperExperts();

// A profile whose KL is 0 everywhere: solve it by l2. Of so few tokens none is protected, and all that a page
// would hold are quantized together: with a page's usual 64 tokens and its sinks and window there would be
// nothing to quantize or to evict. A query sees the kept tokens before it, and always its own token, whose
// K/V are compressed as well. The paper leaves these details open. Plans made from the profile run with
// `scorer` and `guard`, which the measurement knows nothing of. kInvalidArgument unless there are 2 to 64
// tokens.
Expected<Profile> CalibrateLikePaper(Engine& engine, std::span<const int32_t> tokens);

}  // namespace moend
