// llama: Llama 1 to 3, Mistral 7B, SmolLM2 and many others.
#include "moend/model/arch/arch.h"

namespace moend {

Expected<void> DescribeLlama(const GgufFile& file, HyperParams& h) {
  h.optional.biases = h.optional.rope_freqs = true;
  return RefuseExperts(file, h);
}

}  // namespace moend
