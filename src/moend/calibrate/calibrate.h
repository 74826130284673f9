// Fills a Profile: for every layer and expert, what the model loses when this layer alone has the expert.
//
// A chunk is `length` tokens that end where a text ends (texts are separated by the model's BOS token, if the
// file spells it out). The first tokens are read and their K/V kept; the layer's K/V are compressed with the
// scorer and codecs that will run; the last `evaluated` tokens are then read over the compressed layer and
// compared with the full cache:
//   l2 = ||attention(full) - attention(compressed)|| / ||attention(full)||   over the evaluated tokens of
//   that layer
//   kl = mean over the evaluated tokens of KL(softmax(logits full) || softmax(logits compressed))
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moend/engine/engine.h"
#include "moend/plan/plan.h"

namespace moend {

// Chooses a scorer for each layer: the first of AutoScorers(), or another one with which evicting that layer
// at 16 bit loses clearly less (geometric mean over the keep ratios of the mean kl of all chunks; one more
// reading of each). Profile::scorer then names one for each layer, or the one that all layers have.
inline constexpr const char* kAutoScorer = "auto";
std::span<const std::string_view> AutoScorers();

struct CalibrateOptions {
  // kReconstruction reads each chunk twice whatever the number of experts, and always fills head_cells;
  // kLogits runs the model for every layer and expert.
  ProfileMethod method = ProfileMethod::kLogits;
  // Of kReconstruction: nats a token by which a model may miss a text that it is asked to repeat. One that
  // does repeat gives each token nearly all of the probability; beyond this, what it attends to means
  // nothing.
  double most_copy_loss = 1;
  std::string scorer = kDefaultScorer;  // a name of MakeScorer(), or kAutoScorer: "reconstruct" for the first
  Protected guard;
  int64_t length = 8192;        // tokens of a chunk; fewer when the text is shorter
  int64_t evaluated = 512;      // of which the last ones are measured
  int64_t chunks = 2;           // how many; 0: as many as the texts give
  std::vector<Expert> experts;  // empty: ReconstructionExperts() or DefaultExperts()
  // Also fill Profile::head_cells. For a single KV head only the parts of each expert are measured, its keep
  // ratio at 16 bit and its bits with every token kept, and taken together as kl = sum less the noise (see
  // kNoiseExpert), l2 = root of the sum of squares: quantization can only harm tokens that stayed, so the sum
  // is a bound, and the cost is that of a tenth of the experts.
  bool heads = false;
};

// 50 pairs of keep and (K bits, V bits), ascending. K never gets fewer bits than V: the opposite loses more
// for the same bytes.
std::vector<Expert> DefaultExperts();

// Cuts tokens into chunks as described above, longest texts first in file order. kInvalidArgument when all
// are too short.
Expected<std::vector<std::vector<int32_t>>> MakeChunks(std::span<const std::vector<int32_t>> texts,
                                                       int32_t bos, const CalibrateOptions& options);

// The steps are "chunk", then for kReconstruction "probe" (calibrate/sensitivity.h) and "check"
// (Profile::checks), each one of so many.
struct CalibrateProgress {
  int64_t index = 0, count = 0;
  double done = 0;  // 0 to 1, over all the work
  const char* step = "chunk";
};

// Continues `profile` (from an interrupted run with the same options; otherwise kMismatch says what differs),
// or starts when it is empty (no cells). After each finished chunk `save` is called with the profile so far.
// Returning false from `progress` stops with kCancelled; the finished chunks are in the last saved profile.
Expected<Profile> Calibrate(std::shared_ptr<Engine> engine, std::span<const std::vector<int32_t>> chunks,
                            const CalibrateOptions& options, Profile profile,
                            const std::function<bool(const CalibrateProgress&)>& progress,
                            const std::function<Expected<void>(const Profile&)>& save);

}  // namespace moend
