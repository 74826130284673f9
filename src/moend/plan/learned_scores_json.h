// Learned scores in Profile and Plan files: "learned": {"n_embd": n, "weights": [...]}, a string for each KV
// head of each layer, base64 of n half floats, low byte first. The field is optional.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>

#include "moend/plan/json_reader.h"
#include "moend/plan/learned_scores.h"

namespace moend {

void WriteLearnedScores(const std::shared_ptr<const LearnedScores>& learned, nlohmann::ordered_json& object);

// Null when the file has none. n_layers and n_kv_heads are those of the file's model, already checked.
Expected<std::shared_ptr<const LearnedScores>> ReadLearnedScores(const JsonNode& root, int64_t n_layers,
                                                                 int64_t n_kv_heads);

}  // namespace moend
