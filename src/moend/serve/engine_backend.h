// The real backend: sessions of one Engine under one plan, all counted by one ledger.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "moend/engine/engine.h"
#include "moend/plan/plan.h"
#include "moend/serve/backend.h"

namespace moend::serve {

struct EngineBackendOptions {
  Plan plan;
  std::vector<Plan> further;  // ever smaller plans for idle contexts (FurtherPlans)
  std::string scorer = {};    // empty: the plan's
  int64_t n_ctx = 0;          // most tokens of a context; 0: what the model was trained for
};

// kMismatch when a plan was made for another model; kInvalidArgument for a context longer than the model's.
Expected<std::unique_ptr<Backend>> MakeEngineBackend(std::shared_ptr<Engine> engine,
                                                     const EngineBackendOptions& options);

// What saved contexts depend on beside the model's tokens: two backends may exchange them if and only if this
// is equal.
std::string CacheId(const Plan& plan, const std::string& scorer, const std::string& model_hash);

// Up to `count` plans along the profile's curve, each clearly smaller than the one before, beginning below
// `base`: solved for a part of its bytes at `n_tokens`, and no layer ever with more tokens or bits than
// before. Empty when the profile has nothing smaller.
std::vector<Plan> FurtherPlans(const Profile& profile, const Plan& base, int64_t n_tokens, int count);

}  // namespace moend::serve
