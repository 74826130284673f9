// glm4: GLM-4 9B and 32B. Half of a head's channels are turned; norms stand before and behind.
#include "moend/model/arch/arch.h"

namespace moend {

Expected<void> DescribeGlm4(const GgufFile& file, HyperParams& h) {
  if (const std::string key = Key(h, "rope.dimension_sections"); file.Find(key))
    return Fail(ErrorCode::kUnsupported, "{} has RoPE in sections ({}), for images; moend runs text models",
                file.path(), key);
  for (LayerParams& layer : h.layers) {
    layer.post_norms = true;
    layer.ffn.fused = true;
  }
  return RefuseExperts(file, h);
}

}  // namespace moend
