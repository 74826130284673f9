// Hyper-parameters from the keys of a GGUF file.
#pragma once

#include "moend/base/error.h"
#include "moend/model/gguf.h"
#include "moend/model/model.h"

namespace moend {

// kUnsupported names what moend does not run (architecture, head size, kind of RoPE scaling) and what it
// does; kCorrupt names keys that are missing, ill-typed, out of range or contradict each other. RoPE scaling
// is read the way libllama reads it, so that both compute the same logits.
Expected<HyperParams> ReadHyperParams(const GgufFile& file);

}  // namespace moend
