#pragma once

#include "moend/plan/plan.h"

namespace moend {

// Fills plan.layers of a plan that routes KV heads from plan.heads, as Plan describes it.
void SumUpHeads(Plan& plan);

}  // namespace moend
