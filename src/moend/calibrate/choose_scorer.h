// CalibrateOptions::scorer = kAutoScorer: which scorer each layer is to have.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "moend/calibrate/calibrate.h"
#include "moend/engine/engine_impl.h"

namespace moend {

// A name for each layer with commas between them, or one name where all layers have the same. `tick` gets the
// share done and may stop it (kCancelled). The caller holds the machine, and options.experts are those that
// will be measured.
Expected<std::string> ChooseScorers(Engine::Impl& machine, std::span<const std::vector<int32_t>> chunks,
                                    const CalibrateOptions& options, const std::function<bool(double)>& tick);

}  // namespace moend
