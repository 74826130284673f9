#include "moend/plan/plan.h"

#include <algorithm>
#include <span>

#include "moend/base/file.h"
#include "moend/plan/json_fields.h"
#include "moend/plan/learned_scores_json.h"
#include "moend/plan/query_stats_json.h"

namespace moend {
namespace {

std::string Describe(const Fingerprint& model) {
  const int64_t sliding = model.sliding_layers(), states = model.state_layers();
  return fmt::format("{} ({}, {} layers{}{}, {} KV heads of {}, hash {})",
                     model.name.empty() ? "a nameless model" : Printable(model.name),
                     Printable(model.architecture), model.n_layers,
                     sliding > 0 ? fmt::format(", {} of them sliding", sliding) : "",
                     states > 0 ? fmt::format(", {} of them with a state", states) : "",
                     model.shape.n_kv_heads, model.shape.head_size, Printable(model.hash, 16));
}

// An expert for each KV head of a layer, in all layers or in none.
Expected<void> ReadHeads(const JsonNode& layer, int64_t l, Plan& plan) {
  const bool expected = l == 0 ? layer.Has("heads") : !plan.heads.empty();
  if (!expected && layer.Has("heads")) return layer.Wrong("routes its KV heads; the layers before it do not");
  if (!expected) return {};
  MOEND_ASSIGN(const JsonNode heads, layer.At("heads"));
  MOEND_ASSIGN(const int64_t n, heads.Size());
  if (n != plan.model.shape.n_kv_heads)
    return heads.Wrong("has {} KV heads; model.n_kv_heads is {}", n, plan.model.shape.n_kv_heads);
  for (int64_t h = 0; h < n; ++h) {
    MOEND_ASSIGN(const JsonNode head, heads.At(h));
    MOEND_ASSIGN(const Expert expert, ReadExpert(head));
    plan.heads.push_back(expert);
  }
  return {};
}

// The layers' experts, and their predicted losses where the file has them.
Expected<void> ReadLayers(const JsonNode& layers, Plan& plan) {
  MOEND_ASSIGN(const int64_t n, layers.Size());
  if (n != plan.model.n_layers)
    return layers.Wrong("has {} layers; model.n_layers is {}", n, plan.model.n_layers);
  for (int64_t l = 0; l < n; ++l) {
    MOEND_ASSIGN(const JsonNode layer, layers.At(l));
    MOEND_ASSIGN(const Expert expert, ReadExpert(layer));
    plan.layers.push_back(expert);
    MOEND_TRY(ReadHeads(layer, l, plan));
    const bool expected = l == 0 ? layer.Has("predicted") : !plan.predicted.empty();
    if (!expected && layer.Has("predicted"))
      return layer.Wrong("has a predicted loss; the layers before it have none");
    if (!expected) continue;
    MOEND_ASSIGN(const JsonNode node, layer.At("predicted"));
    MOEND_ASSIGN(const double loss, node.Real(-kMaxLoss, kMaxLoss));
    plan.predicted.push_back(loss);
  }
  return {};
}

}  // namespace

std::vector<std::string_view> ScorersOf(std::string_view scorer) {
  std::vector<std::string_view> names;
  for (std::size_t begin = 0; begin <= scorer.size();) {
    const std::size_t end = std::min(scorer.find(',', begin), scorer.size());
    names.push_back(scorer.substr(begin, end - begin));
    begin = end + 1;
  }
  return names;
}

Expected<Plan> ParsePlan(const std::string& json, const std::string& source) {
  MOEND_ASSIGN(const nlohmann::json document, ParseJson(json, source));
  const JsonNode root(document, source);
  MOEND_TRY(CheckHeader(root, source, "plan", Plan::kSchema));

  Plan plan;
  MOEND_ASSIGN(const JsonNode model, root.At("model"));
  MOEND_ASSIGN(plan.model, ReadFingerprint(model));
  for (const auto& [key, member] : {std::pair{"variant", &Plan::variant},
                                    {"scorer", &Plan::scorer},
                                    {"solver", &Plan::solver},
                                    {"metric", &Plan::metric}}) {
    MOEND_ASSIGN(const JsonNode node, root.At(key));
    MOEND_ASSIGN(plan.*member, node.Text(member == &Plan::scorer ? kLongestScorer : 64));
  }
  MOEND_ASSIGN(const JsonNode guard, root.At("protected"));
  MOEND_ASSIGN(plan.guard, ReadProtected(guard));
  MOEND_ASSIGN(const JsonNode context, root.At("context_length"));
  MOEND_ASSIGN(plan.context_length, context.Int(1, kMaxTokens));
  MOEND_ASSIGN(const JsonNode budget, root.At("budget_bytes"));
  MOEND_ASSIGN(plan.budget_bytes, budget.Int(0, INT64_MAX));
  MOEND_ASSIGN(const JsonNode bytes, root.At("bytes"));
  MOEND_ASSIGN(plan.bytes, bytes.Int(0, INT64_MAX));
  MOEND_ASSIGN(const JsonNode layers, root.At("layers"));
  MOEND_TRY(ReadLayers(layers, plan));
  MOEND_TRY(CheckFixedLayers(plan, source));
  for (const auto& [key, member] :
       {std::pair{"adaptive_heads", &Plan::adaptive_heads}, {"refit", &Plan::refit}}) {
    if (!root.Has(key)) continue;
    MOEND_ASSIGN(const JsonNode node, root.At(key));
    MOEND_ASSIGN(plan.*member, node.Bool());
  }
  MOEND_ASSIGN(plan.queries, ReadQueryStats(root, plan.model.n_layers, plan.model.shape));
  MOEND_ASSIGN(plan.learned, ReadLearnedScores(root, plan.model.n_layers, plan.model.shape.n_kv_heads));
  return plan;
}

std::string ToJson(const Plan& plan) {
  nlohmann::ordered_json layers = nlohmann::ordered_json::array();
  for (std::size_t l = 0; l < plan.layers.size(); ++l) {
    nlohmann::ordered_json layer = Write(plan.layers[l]);
    if (l < plan.predicted.size()) layer["predicted"] = plan.predicted[l];
    for (int64_t h = 0; !plan.heads.empty() && h < plan.model.shape.n_kv_heads; ++h)
      layer["heads"].push_back(Write(plan.expert(static_cast<int64_t>(l), h)));
    layers.push_back(std::move(layer));
  }
  nlohmann::ordered_json object = {{"moend", "plan"},
                                   {"schema", Plan::kSchema},
                                   {"model", Write(plan.model)},
                                   {"variant", plan.variant},
                                   {"scorer", plan.scorer},
                                   {"solver", plan.solver},
                                   {"metric", plan.metric},
                                   {"protected", Write(plan.guard)},
                                   {"context_length", plan.context_length},
                                   {"budget_bytes", plan.budget_bytes},
                                   {"bytes", plan.bytes},
                                   {"layers", std::move(layers)}};
  if (plan.adaptive_heads) object["adaptive_heads"] = true;
  if (plan.refit) object["refit"] = true;
  WriteQueryStats(plan.queries, object);
  WriteLearnedScores(plan.learned, object);
  return Pretty(object);
}

Expected<Plan> LoadPlan(const std::string& path) {
  MOEND_ASSIGN(const std::string json, ReadFile(path, kMaxJsonBytes));
  return ParsePlan(json, path);
}

Expected<void> CheckSameModel(const Fingerprint& made_for, const Fingerprint& running,
                              const std::string& source) {
  // The name is for people: a renamed file with the same weights is the same model.
  Fingerprint renamed = made_for;
  renamed.name = running.name;
  if (renamed == running) return {};
  return Fail(ErrorCode::kMismatch,
              "{} was made for the model {}, but the model here is {}; calibrate again with this model",
              source, Describe(made_for), Describe(running));
}

int64_t Fingerprint::sliding_layers() const {
  return std::ranges::count_if(windows, [](int64_t window) { return window > 0 && window != kHoldsState; });
}

int64_t Fingerprint::state_layers() const {
  return std::ranges::count(windows, kHoldsState);
}

bool Evicts(const Plan& plan) {
  const auto evicts = [](const Expert& e) { return e.keep < 1; };
  return std::any_of(plan.layers.begin(), plan.layers.end(), evicts) ||
         std::any_of(plan.heads.begin(), plan.heads.end(), evicts);
}

Expected<void> CheckFixedLayers(const Plan& plan, const std::string& source) {
  for (int64_t l = 0; l < std::min(std::ssize(plan.layers), std::ssize(plan.model.windows)); ++l) {
    if (plan.model.window(l) == 0) continue;
    bool full = plan.layers[static_cast<std::size_t>(l)] == Expert{};
    for (int64_t h = 0; h < plan.model.shape.n_kv_heads; ++h) full = full && plan.expert(l, h) == Expert{};
    if (!full && plan.model.holds_state(l))
      return Fail(ErrorCode::kMismatch,
                  "{} compresses layer {}, which remembers a state instead of K/V: its expert must keep all "
                  "tokens at "
                  "16 bit",
                  source, l);
    if (!full)
      return Fail(ErrorCode::kMismatch,
                  "{} compresses layer {}, which sees the newest {} tokens only and remembers those as they "
                  "are: its expert must keep all of them at 16 bit",
                  source, l, plan.model.window(l));
  }
  return {};
}

void CompressAlike(Plan& plan, const Expert& expert) {
  for (std::size_t l = 0; l < plan.layers.size(); ++l)
    if (plan.model.window(static_cast<int64_t>(l)) == 0) plan.layers[l] = expert;
}

Plan FullPlan(const Fingerprint& model, int64_t context_length) {
  Plan plan;
  plan.model = model;
  plan.variant = "full";
  plan.context_length = context_length;
  plan.layers.assign(static_cast<std::size_t>(std::clamp<int64_t>(model.n_layers, 0, kMaxLayers)), Expert{});
  // Callers pass what a loaded model says, for which the arithmetic cannot fail; a plan that reports 0 bytes
  // is still a plan.
  plan.bytes = PlanBytes(plan, context_length, 0).value_or(0);
  plan.budget_bytes = plan.bytes;
  return plan;
}

Expected<int64_t> FixedBytes(const Fingerprint& model, int64_t window, int64_t n_heads, int64_t n_tokens) {
  if (window == Fingerprint::kHoldsState) return model.state_bytes / model.shape.n_kv_heads * n_heads;
  return WindowBytes({n_heads, model.shape.head_size}, window, n_tokens);
}

Expected<int64_t> PlanBytes(const Plan& plan, int64_t n_tokens, int64_t score_bytes) {
  const bool by_head = !plan.heads.empty();
  const KvShape shape = by_head ? KvShape{1, plan.model.shape.head_size} : plan.model.shape;
  const auto rows = by_head ? std::span(plan.heads) : std::span(plan.layers);
  int64_t total = 0;
  for (int64_t i = 0; i < std::ssize(rows); ++i) {
    const int64_t window = plan.model.window(by_head ? i / plan.model.shape.n_kv_heads : i);
    MOEND_ASSIGN(const int64_t bytes, window > 0 ? FixedBytes(plan.model, window, shape.n_kv_heads, n_tokens)
                                                 : LayerBytes(shape, rows[static_cast<std::size_t>(i)],
                                                              plan.guard, n_tokens, score_bytes));
    if (__builtin_add_overflow(total, bytes, &total))
      return Fail(ErrorCode::kInvalidArgument,
                  "a cache of {} tokens in {} layers has too many bytes to count", n_tokens,
                  plan.layers.size());
  }
  return total;
}

int64_t FullBytes(const Fingerprint& model, int64_t n_tokens) {
  int64_t total = 0;
  const int64_t full = model.n_layers - std::ssize(model.windows);
  if (__builtin_mul_overflow(FullLayerBytes(model.shape, n_tokens), full, &total)) return INT64_MAX;
  for (const int64_t window : model.windows) {
    const int64_t seen = window > 0 ? std::min(window, n_tokens) : n_tokens;
    const int64_t bytes =
        window == Fingerprint::kHoldsState ? model.state_bytes : FullLayerBytes(model.shape, seen);
    if (__builtin_add_overflow(total, bytes, &total)) return INT64_MAX;
  }
  return total;
}

}  // namespace moend
