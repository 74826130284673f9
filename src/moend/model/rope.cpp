#include "moend/model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace moend {
namespace {

// YaRN (arXiv 2309.00071): the pair that turns `rotations` times over the original context.
double PairOfRotations(const RopeParams& r, double rotations) {
  return r.n_dims * std::log(r.n_ctx_orig / (rotations * 2 * std::numbers::pi)) /
         (2 * std::log(double{r.freq_base}));
}

// 1 for pairs that turn so often that they keep their rate, 0 for those that are slowed down fully.
double KeptShare(const RopeParams& r, int64_t pair) {
  const double low = std::max(0.0, std::floor(PairOfRotations(r, r.beta_fast)));
  const double high = std::min(r.n_dims - 1.0, std::ceil(PairOfRotations(r, r.beta_slow)));
  const double ramp = (static_cast<double>(pair) - low) / std::max(0.001, high - low);
  return 1 - std::clamp(ramp, 0.0, 1.0);
}

}  // namespace

std::vector<RopePair> RopePairs(const Model& model, int64_t layer) {
  const HyperParams& hp = model.hparams();
  const RopeParams& r = hp.layers[static_cast<std::size_t>(layer)].rope;
  const ggml_tensor* factors = model.weights().layers[static_cast<std::size_t>(layer)].rope_freqs;
  const int64_t turned = r.n_dims / 2;
  std::vector<RopePair> pairs;
  for (int64_t p = 0; p < hp.head_size / 2; ++p) {
    if (p >= turned) {
      pairs.push_back({2 * p, 2 * p + 1, 0});
      continue;
    }
    double rate = std::pow(double{r.freq_base}, -2.0 * static_cast<double>(p) / r.n_dims);
    if (factors && p < factors->ne[0]) rate /= static_cast<const float*>(factors->data)[p];
    const double slowed = r.freq_scale * rate;
    const double kept = r.ext_factor != 0 ? r.ext_factor * KeptShare(r, p) : 0;
    rate = slowed + kept * (rate - slowed);
    if (r.mode == GGML_ROPE_TYPE_NEOX) {
      pairs.push_back({p, p + turned, rate});
    } else {
      pairs.push_back({2 * p, 2 * p + 1, rate});
    }
  }
  return pairs;
}

}  // namespace moend
