// Query statistics in Profile and Plan files: {"query_tokens": n, "queries": [{"layer", "head", "re", "im",
// "length"}, ...]}, a line each query head, numbers of four digits. Both fields are optional.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>

#include "moend/plan/json_reader.h"
#include "moend/plan/query_stats.h"

namespace moend {

void WriteQueryStats(const std::shared_ptr<const QueryStats>& stats, nlohmann::ordered_json& object);

// Null when the file has none. n_layers and shape are those of the file's model, already checked.
Expected<std::shared_ptr<const QueryStats>> ReadQueryStats(const JsonNode& root, int64_t n_layers,
                                                           const KvShape& shape);

}  // namespace moend
