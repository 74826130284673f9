#include <algorithm>
#include <cmath>
#include <limits>

#include "moend/base/file.h"
#include "moend/plan/json_fields.h"
#include "moend/plan/learned_scores_json.h"
#include "moend/plan/plan.h"
#include "moend/plan/query_stats_json.h"

namespace moend {
namespace {

constexpr int64_t kMaxExperts = 1024;
constexpr int64_t kMaxChunks = 1 << 30;
Expected<std::vector<Expert>> ReadExperts(const JsonNode& node) {
  MOEND_ASSIGN(const int64_t n, node.Size());
  if (n < 1 || n > kMaxExperts) return node.Wrong("has {} experts; possible: 1 to {}", n, kMaxExperts);
  std::vector<Expert> experts;
  for (int64_t e = 0; e < n; ++e) {
    MOEND_ASSIGN(const JsonNode element, node.At(e));
    MOEND_ASSIGN(const Expert expert, ReadExpert(element));
    if (e > 0 && !(experts.back() < expert))
      return element.Wrong("is out of order; experts ascend by keep, k_bits, v_bits, each once");
    experts.push_back(expert);
  }
  return experts;
}

// layer.kl and layer.l2: one number an expert.
Expected<void> ReadLosses(const JsonNode& layer, std::string_view key, double ProfileCell::*member,
                          std::vector<ProfileCell>& cells) {
  MOEND_ASSIGN(const JsonNode node, layer.At(key));
  MOEND_ASSIGN(const int64_t n, node.Size());
  if (n != static_cast<int64_t>(cells.size()))
    return node.Wrong("has {} numbers; needed: one for each of the {} experts", n, cells.size());
  for (int64_t e = 0; e < n; ++e) {
    MOEND_ASSIGN(const JsonNode element, node.At(e));
    MOEND_ASSIGN(cells[static_cast<std::size_t>(e)].*member, element.Real(-kMaxLoss, kMaxLoss));
  }
  return {};
}

Expected<std::vector<ProfileCell>> ReadCells(const JsonNode& node, std::size_t n_experts) {
  std::vector<ProfileCell> cells(n_experts);
  MOEND_TRY(ReadLosses(node, "kl", &ProfileCell::kl, cells));
  MOEND_TRY(ReadLosses(node, "l2", &ProfileCell::l2, cells));
  return cells;
}

nlohmann::ordered_json WriteCells(const std::vector<ProfileCell>& cells) {
  nlohmann::ordered_json kl = nlohmann::ordered_json::array(), l2 = kl;
  for (const ProfileCell& cell : cells) {
    kl.push_back(cell.kl);
    l2.push_back(cell.l2);
  }
  return {{"kl", std::move(kl)}, {"l2", std::move(l2)}};
}

constexpr ProfileMethod kMethods[] = {ProfileMethod::kLogits, ProfileMethod::kReconstruction};

Expected<void> ReadChecks(const JsonNode& node, std::vector<ProfileCheck>& checks) {
  MOEND_ASSIGN(const int64_t n, node.Size());
  for (int64_t i = 0; i < n; ++i) {
    MOEND_ASSIGN(const JsonNode element, node.At(i));
    ProfileCheck check;
    for (const auto& [key, member] : {std::pair{"compression", &ProfileCheck::compression},
                                      {"predicted", &ProfileCheck::predicted},
                                      {"measured_kl", &ProfileCheck::measured}}) {
      MOEND_ASSIGN(const JsonNode number, element.At(key));
      MOEND_ASSIGN(check.*member, number.Real(0, kMaxLoss));
    }
    if (!checks.empty() && check.predicted < checks.back().predicted)
      return element.Wrong("is out of order; checks ascend by predicted");
    checks.push_back(check);
  }
  return {};
}

// sensitivity: {texts, error: one number a KV head, kl: likewise}
Expected<void> ReadSensitivity(const JsonNode& node, Profile& profile) {
  MOEND_ASSIGN(const JsonNode texts, node.At("texts"));
  MOEND_ASSIGN(profile.probed, texts.Int(1, kMaxChunks));
  if (profile.head_cells.empty()) return node.Wrong("is of KV heads, of which the profile has no losses");
  profile.sensitivity.resize(profile.head_cells.size());
  for (const auto& [key, member] :
       {std::pair{"error", &Sensitivity::error}, std::pair{"kl", &Sensitivity::kl}}) {
    MOEND_ASSIGN(const JsonNode numbers, node.At(key));
    MOEND_ASSIGN(const int64_t n, numbers.Size());
    if (n != std::ssize(profile.sensitivity))
      return numbers.Wrong("has {} numbers; needed: one for each of the {} KV heads", n,
                           profile.sensitivity.size());
    for (int64_t row = 0; row < n; ++row) {
      MOEND_ASSIGN(const JsonNode number, numbers.At(row));
      MOEND_ASSIGN(profile.sensitivity[static_cast<std::size_t>(row)].*member, number.Real(0, kMaxLoss));
    }
  }
  return {};
}

}  // namespace

const char* Name(ProfileMethod method) {
  return method == ProfileMethod::kLogits ? "logits" : "reconstruction";
}

double ExpectedKl(const Profile& profile, double loss) {
  const auto& checks = profile.checks;
  const auto useless = [](const ProfileCheck& c) { return !(c.predicted > 0 && c.measured > 0); };
  if (checks.empty() || std::ranges::any_of(checks, useless)) return std::numeric_limits<double>::quiet_NaN();
  if (!(loss > 0)) return 0;
  const auto above = std::ranges::find_if(checks, [&](const ProfileCheck& c) { return c.predicted > loss; });
  if (above == checks.begin()) return loss * above->measured / above->predicted;
  const ProfileCheck& below = above[-1];
  if (above == checks.end()) return loss * below.measured / below.predicted;
  const double share = std::log(loss / below.predicted) / std::log(above->predicted / below.predicted);
  return below.measured * std::pow(above->measured / below.measured, share);
}

Expected<Profile> ParseProfile(const std::string& json, const std::string& source) {
  MOEND_ASSIGN(const nlohmann::json document, ParseJson(json, source));
  const JsonNode root(document, source);
  MOEND_TRY(CheckHeader(root, source, "profile", Profile::kSchema));

  Profile profile;
  MOEND_ASSIGN(const JsonNode model, root.At("model"));
  MOEND_ASSIGN(profile.model, ReadFingerprint(model));
  if (root.Has("method")) {
    MOEND_ASSIGN(const JsonNode node, root.At("method"));
    MOEND_ASSIGN(const std::string name, node.Text(64));
    const auto* const found =
        std::ranges::find_if(kMethods, [&](ProfileMethod method) { return name == Name(method); });
    if (found == std::end(kMethods)) return node.Wrong("is neither logits nor reconstruction");
    profile.method = *found;
  }
  MOEND_ASSIGN(const JsonNode scorer, root.At("scorer"));
  MOEND_ASSIGN(profile.scorer, scorer.Text(kLongestScorer));
  MOEND_ASSIGN(const JsonNode guard, root.At("protected"));
  MOEND_ASSIGN(profile.guard, ReadProtected(guard));
  MOEND_ASSIGN(const JsonNode length, root.At("length"));
  MOEND_ASSIGN(profile.length, length.Int(1, kMaxTokens));
  MOEND_ASSIGN(const JsonNode evaluated, root.At("evaluated"));
  MOEND_ASSIGN(profile.evaluated, evaluated.Int(0, profile.length));
  MOEND_ASSIGN(const JsonNode chunks, root.At("chunks"));
  MOEND_ASSIGN(profile.chunks, chunks.Int(0, kMaxChunks));
  MOEND_ASSIGN(const JsonNode wanted, root.At("chunks_wanted"));
  MOEND_ASSIGN(profile.chunks_wanted, wanted.Int(0, kMaxChunks));
  MOEND_ASSIGN(const JsonNode experts, root.At("experts"));
  MOEND_ASSIGN(profile.experts, ReadExperts(experts));

  MOEND_ASSIGN(const JsonNode layers, root.At("layers"));
  MOEND_ASSIGN(const int64_t n_layers, layers.Size());
  if (n_layers != profile.model.n_layers)
    return layers.Wrong("has {} layers; model.n_layers is {}", n_layers, profile.model.n_layers);
  for (int64_t l = 0; l < n_layers; ++l) {
    MOEND_ASSIGN(const JsonNode layer, layers.At(l));
    MOEND_ASSIGN(auto cells, ReadCells(layer, profile.experts.size()));
    profile.cells.push_back(std::move(cells));
    const bool expected = l == 0 ? layer.Has("heads") : !profile.head_cells.empty();
    if (!expected && layer.Has("heads"))
      return layer.Wrong("measures its KV heads; the layers before it do not");
    if (!expected) continue;
    MOEND_ASSIGN(const JsonNode heads, layer.At("heads"));
    MOEND_ASSIGN(const int64_t n, heads.Size());
    if (n != profile.model.shape.n_kv_heads)
      return heads.Wrong("has {} KV heads; model.n_kv_heads is {}", n, profile.model.shape.n_kv_heads);
    for (int64_t h = 0; h < n; ++h) {
      MOEND_ASSIGN(const JsonNode head, heads.At(h));
      MOEND_ASSIGN(auto head_cells, ReadCells(head, profile.experts.size()));
      profile.head_cells.push_back(std::move(head_cells));
    }
  }
  if (root.Has("sensitivity")) {
    MOEND_ASSIGN(const JsonNode sensitivity, root.At("sensitivity"));
    MOEND_TRY(ReadSensitivity(sensitivity, profile));
  }
  if (root.Has("checks")) {
    MOEND_ASSIGN(const JsonNode checks, root.At("checks"));
    MOEND_TRY(ReadChecks(checks, profile.checks));
  }
  MOEND_ASSIGN(profile.queries, ReadQueryStats(root, profile.model.n_layers, profile.model.shape));
  MOEND_ASSIGN(profile.learned,
               ReadLearnedScores(root, profile.model.n_layers, profile.model.shape.n_kv_heads));
  return profile;
}

std::string ToJson(const Profile& profile) {
  nlohmann::ordered_json experts = nlohmann::ordered_json::array(), layers = experts;
  for (const Expert& expert : profile.experts) experts.push_back(Write(expert));
  const auto heads = static_cast<std::size_t>(profile.model.shape.n_kv_heads);
  for (std::size_t l = 0; l < profile.cells.size(); ++l) {
    layers.push_back(WriteCells(profile.cells[l]));
    for (std::size_t h = 0; h < heads && l * heads + h < profile.head_cells.size(); ++h)
      layers.back()["heads"].push_back(WriteCells(profile.head_cells[l * heads + h]));
  }
  nlohmann::ordered_json object = {{"moend", "profile"},
                                   {"schema", Profile::kSchema},
                                   {"model", Write(profile.model)},
                                   {"method", Name(profile.method)},
                                   {"scorer", profile.scorer},
                                   {"protected", Write(profile.guard)},
                                   {"length", profile.length},
                                   {"evaluated", profile.evaluated},
                                   {"chunks", profile.chunks},
                                   {"chunks_wanted", profile.chunks_wanted},
                                   {"experts", std::move(experts)},
                                   {"layers", std::move(layers)}};
  if (!profile.sensitivity.empty()) {
    auto& sensitivity = object["sensitivity"] = {{"texts", profile.probed}};
    for (const Sensitivity& s : profile.sensitivity) {
      sensitivity["error"].push_back(s.error);
      sensitivity["kl"].push_back(s.kl);
    }
  }
  for (const ProfileCheck& check : profile.checks)
    object["checks"].push_back({{"compression", check.compression},
                                {"predicted", check.predicted},
                                {"measured_kl", check.measured}});
  WriteQueryStats(profile.queries, object);
  WriteLearnedScores(profile.learned, object);
  return Pretty(object);
}

Expected<void> SaveProfile(const Profile& profile, const std::string& path) {
  for (const auto* rows : {&profile.cells, &profile.head_cells})
    for (std::size_t row = 0; row < rows->size(); ++row)
      for (const ProfileCell& cell : (*rows)[row])
        if (!std::isfinite(cell.kl) || !std::isfinite(cell.l2))
          return Fail(ErrorCode::kInvalidArgument,
                      "{} is not written: row {} of its losses has kl {} and l2 {}, which are no losses",
                      path, row, cell.kl, cell.l2);
  for (const Sensitivity& s : profile.sensitivity)
    if (!std::isfinite(s.error) || !std::isfinite(s.kl))
      return Fail(ErrorCode::kInvalidArgument,
                  "{} is not written: a KV head's sensitivity has error {} and kl {}, which are no losses",
                  path, s.error, s.kl);
  for (const ProfileCheck& check : profile.checks)
    if (!std::isfinite(check.predicted) || !std::isfinite(check.measured))
      return Fail(ErrorCode::kInvalidArgument,
                  "{} is not written: at {}x it predicts {} and measured {}, which are no losses", path,
                  check.compression, check.predicted, check.measured);
  if (profile.queries)
    for (const QueryPair& pair : profile.queries->pairs)
      if (!std::isfinite(pair.re) || !std::isfinite(pair.im) || !std::isfinite(pair.length))
        return Fail(ErrorCode::kInvalidArgument,
                    "{} is not written: a statistic of its queries is not finite", path);
  return WriteFileAtomically(path, ToJson(profile));
}

Expected<Profile> LoadProfile(const std::string& path) {
  MOEND_ASSIGN(const std::string json, ReadFile(path, kMaxJsonBytes));
  return ParseProfile(json, path);
}

}  // namespace moend
