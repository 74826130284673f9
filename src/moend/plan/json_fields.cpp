#include "moend/plan/json_fields.h"

#include <algorithm>

namespace moend {
namespace {

using nlohmann::ordered_json;

constexpr int64_t kStateInFiles = -1;  // Fingerprint::kHoldsState
constexpr int64_t kMaxStateBytes = int64_t{1} << 40;

Expected<int> ReadBits(const JsonNode& parent, std::string_view key) {
  MOEND_ASSIGN(const JsonNode node, parent.At(key));
  MOEND_ASSIGN(const int64_t bits, node.Int(INT32_MIN, INT32_MAX));
  if (!IsBitWidth(static_cast<int>(bits)))
    return node.Wrong("is {}; possible: {}", bits, fmt::join(kBitWidths, ", "));
  return static_cast<int>(bits);
}

Expected<int64_t> ReadInt(const JsonNode& parent, std::string_view key, int64_t low, int64_t high) {
  MOEND_ASSIGN(const JsonNode node, parent.At(key));
  return node.Int(low, high);
}

Expected<std::string> ReadText(const JsonNode& parent, std::string_view key, std::size_t limit) {
  MOEND_ASSIGN(const JsonNode node, parent.At(key));
  return node.Text(limit);
}

bool IsHash(const std::string& s) {
  return s.size() == 16 && s.find_first_not_of("0123456789abcdef") == std::string::npos;
}

std::string Line(const ordered_json& value) {
  return value.dump(-1, ' ', false, ordered_json::error_handler_t::replace);
}

}  // namespace

Expected<void> CheckHeader(const JsonNode& root, const std::string& source, std::string_view kind,
                           int schema) {
  MOEND_ASSIGN(const JsonNode marker, root.At("moend"));
  MOEND_ASSIGN(const std::string found, marker.Text(64));
  if (found != kind) {
    return Fail(ErrorCode::kMismatch, "{}: this is a \"{}\" file of moend, where a \"{}\" is needed{}",
                source, Printable(found), kind,
                found == "profile" && kind == "plan" ? " (moend solve makes a plan from a profile)" : "");
  }
  MOEND_ASSIGN(const JsonNode version, root.At("schema"));
  MOEND_ASSIGN(const int64_t n, version.Int(INT64_MIN, INT64_MAX));
  if (n != schema) {
    return Fail(ErrorCode::kMismatch, "{}: a {} of schema version {}; this program reads version {}{}",
                source, kind, n, schema,
                n > schema          ? " and is older than the file"
                : kind == "profile" ? " (moend calibrate measures it anew)"
                                    : " (moend solve makes it anew)");
  }
  return {};
}

Expected<Fingerprint> ReadFingerprint(const JsonNode& node) {
  Fingerprint model;
  MOEND_ASSIGN(model.architecture, ReadText(node, "architecture", 64));
  MOEND_ASSIGN(model.name, ReadText(node, "name", 1024));
  MOEND_ASSIGN(model.n_layers, ReadInt(node, "n_layers", 1, kMaxLayers));
  MOEND_ASSIGN(model.shape.n_kv_heads, ReadInt(node, "n_kv_heads", 1, kMaxKvHeads));
  MOEND_ASSIGN(const JsonNode size, node.At("head_size"));
  MOEND_ASSIGN(model.shape.head_size, size.Int(16, kMaxHeadSize));
  if (model.shape.head_size % 16 != 0)
    return size.Wrong("is {}; possible: multiples of 16 up to {}", model.shape.head_size, kMaxHeadSize);
  MOEND_ASSIGN(const JsonNode hash, node.At("hash"));
  MOEND_ASSIGN(model.hash, hash.Text(1024));
  if (!IsHash(model.hash))
    return hash.Wrong("is \"{}\", where 16 hex digits are needed", Printable(model.hash, 40));
  if (!node.Has("windows")) return model;
  MOEND_ASSIGN(const JsonNode windows, node.At("windows"));
  MOEND_ASSIGN(const int64_t n, windows.Size());
  if (n != model.n_layers) return windows.Wrong("has {} layers; n_layers is {}", n, model.n_layers);
  for (int64_t l = 0; l < n; ++l) {
    MOEND_ASSIGN(const JsonNode element, windows.At(l));
    MOEND_ASSIGN(int64_t window, element.Int(kStateInFiles, kMaxWindow));
    if (window == kStateInFiles) window = Fingerprint::kHoldsState;
    model.windows.push_back(window);
  }
  if (model.state_layers() == 0) return model;
  MOEND_ASSIGN(const JsonNode bytes, node.At("state_bytes"));
  MOEND_ASSIGN(model.state_bytes, bytes.Int(1, kMaxStateBytes));
  if (model.state_bytes % model.shape.n_kv_heads != 0)
    return bytes.Wrong("is {}, which is no multiple of the {} KV heads", model.state_bytes,
                       model.shape.n_kv_heads);
  return model;
}

Expected<Protected> ReadProtected(const JsonNode& node) {
  Protected guard;
  MOEND_ASSIGN(guard.sinks, ReadInt(node, "sinks", 0, kMaxGuard));
  MOEND_ASSIGN(guard.window, ReadInt(node, "window", 0, kMaxGuard));
  return guard;
}

Expected<Expert> ReadExpert(const JsonNode& node) {
  Expert expert;
  MOEND_ASSIGN(const JsonNode keep, node.At("keep"));
  MOEND_ASSIGN(expert.keep, keep.Real(-1e30, 1e30));
  if (expert.keep <= 0 || expert.keep > 1)
    return keep.Wrong("is {}; possible: above 0 and up to 1", expert.keep);
  MOEND_ASSIGN(expert.k_bits, ReadBits(node, "k_bits"));
  MOEND_ASSIGN(expert.v_bits, ReadBits(node, "v_bits"));
  return expert;
}

ordered_json Write(const Fingerprint& model) {
  ordered_json object = {{"architecture", model.architecture}, {"name", model.name},
                         {"n_layers", model.n_layers},         {"n_kv_heads", model.shape.n_kv_heads},
                         {"head_size", model.shape.head_size}, {"hash", model.hash}};
  if (!model.windows.empty()) {
    std::vector<int64_t> windows = model.windows;
    std::ranges::replace(windows, Fingerprint::kHoldsState, kStateInFiles);
    object["windows"] = windows;
  }
  if (model.state_bytes > 0) object["state_bytes"] = model.state_bytes;
  return object;
}

ordered_json Write(const Protected& guard) {
  return {{"sinks", guard.sinks}, {"window", guard.window}};
}

ordered_json Write(const Expert& expert) {
  return {{"keep", expert.keep}, {"k_bits", expert.k_bits}, {"v_bits", expert.v_bits}};
}

std::string Pretty(const ordered_json& object) {
  std::string out = "{";
  const char* separator = "\n  ";
  for (const auto& [key, value] : object.items()) {
    out += separator + Line(key) + ": ";
    separator = ",\n  ";
    if (!value.is_array() || value.empty() || !value.front().is_object()) {
      out += Line(value);
      continue;
    }
    for (std::size_t i = 0; i < value.size(); ++i) out += (i ? ",\n    " : "[\n    ") + Line(value[i]);
    out += "\n  ]";
  }
  return out + "\n}\n";
}

}  // namespace moend
