// The parts that Profile and Plan files have in common.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "moend/plan/json_reader.h"
#include "moend/plan/plan.h"

namespace moend {

inline constexpr int64_t kMaxLayers = 1024;
inline constexpr int64_t kMaxKvHeads = 1024;
inline constexpr int64_t kMaxHeadSize = 256;
inline constexpr int64_t kMaxTokens = INT32_MAX;  // positions are 32 bit
inline constexpr int64_t kMaxGuard = 1 << 20;     // sinks or window
inline constexpr int64_t kMaxWindow = 1 << 24;    // of a sliding layer
inline constexpr double kMaxLoss = 1e30;
inline constexpr int64_t kMaxJsonBytes = 128 << 20;  // of a Profile or Plan file

// Checks {"moend": kind, "schema": version} before anything else is looked at.
Expected<void> CheckHeader(const JsonNode& root, const std::string& source, std::string_view kind,
                           int schema);

Expected<Fingerprint> ReadFingerprint(const JsonNode& node);
Expected<Protected> ReadProtected(const JsonNode& node);
Expected<Expert> ReadExpert(const JsonNode& node);  // ignores other fields of the object

nlohmann::ordered_json Write(const Fingerprint& model);
nlohmann::ordered_json Write(const Protected& guard);
nlohmann::ordered_json Write(const Expert& expert);

// One line a field, and one line an element of an array of objects: diffs stay readable, and so do files.
// Strings that are not UTF-8 are repaired. Ends in a newline.
std::string Pretty(const nlohmann::ordered_json& object);

}  // namespace moend
