// Losses from a repetition instead of from runs of the model: what each recipe does to the attention outputs
// of queries that ask for the context again, token by token. A text is read twice, whatever the number of
// recipes; the second reading is the one of engine/repetition.h, and its queries, spread over the whole text,
// are the sample. Of KV head h and an expert,
//     kl ~ mean over sampled tokens of |W_O (o - o')|^2 / |x|^2
// o, o': the outputs of its query heads over all tokens and over the cache as the expert leaves it, W_O: the
// projection into the residual stream, x: the residual stream. Eviction and bits are measured apart and
// added, and so are heads, since their errors are hardly correlated. It is the KL of whole plans up to a
// factor, which checks of whole plans measure (Profile::checks).
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "moend/calibrate/calibrate.h"
#include "moend/calibrate/learning.h"

namespace moend {

// 16 shares of the tokens, 9 pairs of bits, all with all; ascending.
std::vector<Expert> ReconstructionExperts();

// Fills profile.cells and head_cells, which are zeros and have the size of profile.experts, with a text's
// losses; those of experts of 16 bits add up to 1, so that all texts count alike. The scorer is
// profile.scorer; one that does not repeat (ScorerNeeds) is measured on the same queries. kUnsupported when
// the model misses the text that it is asked to repeat by most_copy_loss nats a token or more; kCancelled
// when `tick`, which gets the share done, returns false. `learner` may be null. The caller holds the machine.
Expected<void> MeasureReconstruction(Engine& engine, std::span<const int32_t> tokens, double most_copy_loss,
                                     Profile& profile, ScoreLearner* learner,
                                     const std::function<bool(double)>& tick);

// What MeasureReconstruction() lets `learner` see, and nothing else.
Expected<void> LearnReconstruction(Engine& engine, std::span<const int32_t> tokens, ScoreLearner& learner,
                                   const std::function<bool(double)>& tick);

// Solves for some compressions at the length of `chunk` and measures the plans on what the model says when it
// is asked for a part of the chunk again: fills profile.checks.
Expected<void> CheckPlans(Engine& engine, std::span<const int32_t> chunk, Profile& profile,
                          const std::function<bool(double)>& tick);

}  // namespace moend
