// smollm3: every fourth layer has no RoPE.
#include "moend/model/arch/arch.h"

namespace moend {

Expected<void> DescribeSmollm3(const GgufFile& file, HyperParams& h) {
  constexpr std::size_t kStep = 4;
  for (std::size_t l = kStep - 1; l < h.layers.size(); l += kStep) h.layers[l].rope.n_dims = 0;
  return RefuseExperts(file, h);
}

}  // namespace moend
