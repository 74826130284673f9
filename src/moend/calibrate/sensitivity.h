// How far the errors of a KV head's attention output move the logits. Errors of the same size, relative to
// the residual stream, do not cost the same: where a head copies what was read, or feeds others that do, a
// nat may hang on what elsewhere is noise, and the costs of two heads differ by factors of up to a hundred.
// Which heads these are is a property of the model, hardly of the text, so a few texts tell.
//
// Of KV head i the loss of every expert is multiplied by
//     (kl_i + s * K / E) / (error_i + s),   s = kPrior * E / rows
// error_i and kl_i: what the profile predicted for a compression of this head alone, and the KL that was
// measured, summed over the texts; E and K: the sums over all heads. So little evidence says little.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <span>

#include "moend/calibrate/calibrate.h"

namespace moend {

// Texts of a calibration on which sensitivities are measured.
inline constexpr int64_t kProbedTexts = 4;

// Whether Calibrate() has nothing left to do with a profile that has all of `n_chunks` chunks.
inline bool IsProbed(const Profile& profile, int64_t n_chunks) {
  return profile.method == ProfileMethod::kLogits ||
         (profile.probed >= std::min(n_chunks, kProbedTexts) && !profile.checks.empty());
}

// Solves for some compression, compresses what each KV head gets there, one head at a time, and measures the
// logits on the chunk's end and on a part of the chunk that the model is asked for again. Adds to
// profile.sensitivity and counts the text in profile.probed; the losses are weighted anew. kCancelled when
// `tick`, which gets the share done, returns false. The caller holds the machine.
Expected<void> ProbeHeads(Engine& engine, std::span<const int32_t> chunk, Profile& profile,
                          const std::function<bool(double)>& tick);

// Multiplies the losses of profile.head_cells by what the header says and makes those of profile.cells their
// sums; the second takes that back, exactly where losses were RoundLoss()ed. Nothing happens without
// sensitivities.
void WeightLosses(Profile& profile);
void UnweightLosses(Profile& profile);

// To 40 bits, some 12 digits: what a product and a quotient by the same number do to the last bits is gone.
double RoundLoss(double loss);

}  // namespace moend
