// The scorers, each made by the function of its file.
#pragma once

#include <memory>
#include <span>

#include "moend/score/scorer.h"

namespace moend {

std::unique_ptr<Scorer> MakeReconstruct();
std::unique_ptr<Scorer> MakeLearned();
std::unique_ptr<Scorer> MakeStreaming();
std::unique_ptr<Scorer> MakeRandom();
std::unique_ptr<Scorer> MakeSnapKv();
std::unique_ptr<Scorer> MakeTova();
std::unique_ptr<Scorer> MakeH2o();
std::unique_ptr<Scorer> MakeKeyDiff();
std::unique_ptr<Scorer> MakeKeyNorm();
std::unique_ptr<Scorer> MakeExpectedAttention();
std::unique_ptr<Scorer> MakeTrigonometric();

// Replaces what is not finite by the lowest finite score.
void MakeFinite(std::span<float> scores);

}  // namespace moend
