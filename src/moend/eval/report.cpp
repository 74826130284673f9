#include "moend/eval/report.h"

#include <filesystem>
#include <nlohmann/json.hpp>

#include "moend/eval/paired.h"
#include "moend/eval/report_assets.h"
#include "moend/eval/text.h"
#include "moend/score/scorer.h"

namespace moend::eval {
namespace {

using Json = nlohmann::ordered_json;

Json WriteEstimate(const Estimate& e) {
  return {{"score", e.score}, {"n", e.n}, {"low", e.low}, {"high", e.high}};
}

Json WriteExpert(const Expert& e) {
  return {{"keep", e.keep}, {"k_bits", e.k_bits}, {"v_bits", e.v_bits}};
}

Json WriteExperts(const std::vector<Expert>& experts) {
  Json out = Json::array();
  for (const Expert& e : experts) out.push_back(WriteExpert(e));
  return out;
}

// An expert a layer, and in plans that route KV heads one a head besides.
Json WriteLayers(const Plan& plan) {
  Json out = WriteExperts(plan.layers);
  if (plan.heads.empty()) return out;
  for (std::size_t l = 0; l < plan.layers.size(); ++l)
    for (int64_t h = 0; h < plan.model.shape.n_kv_heads; ++h)
      out[l]["heads"].push_back(WriteExpert(plan.expert(static_cast<int64_t>(l), h)));
  return out;
}

// Against the full cache; null for that itself.
Json WritePaired(const Run& run, const Run* full, const std::string& dataset) {
  if (&run == full) return nullptr;
  const Paired p = ComparePaired(run, full, dataset);
  Json out = Json::object();
  if (p.difference.n > 0)
    out["difference"] = {{"mean", p.difference.mean}, {"low", p.difference.low}, {"high", p.difference.high}};
  if (p.kld.n > 0)
    out.update({{"kld", {{"mean", p.kld.mean}, {"low", p.kld.low}, {"high", p.kld.high}}},
                {"kld_99", p.kld_99},
                {"same_top", p.same_top}});
  if (p.n_agreed > 0) out.update({{"agreed", p.agreed}, {"answer_tokens", p.answer_tokens}});
  return out;
}

Json WriteSuite(const Results& results) {
  Json runs = Json::array();
  const Run* full = FullRun(results);
  for (const Run& run : results.runs) {
    Json datasets = Json::object(), paired = Json::object();
    for (const auto& [name, estimate] : Summarize(run)) {
      datasets[name] = WriteEstimate(estimate);
      paired[name] = WritePaired(run, full, name);
    }
    paired[""] = WritePaired(run, full, "");
    runs.push_back({{"paired", std::move(paired)},
                    {"variant", run.variant},
                    {"scorer", ShortScorerName(run.scorer)},
                    {"compression", run.compression},
                    {"ratio", run.ratio()},
                    {"kv_bytes", run.kv_bytes()},
                    {"mean", WriteEstimate(MeanScore(run))},
                    {"datasets", std::move(datasets)},
                    {"layers", WriteLayers(run.plan)}});
  }
  return {{"name", std::filesystem::path(results.settings.suite).stem().string()},
          {"mode", results.settings.mode},
          {"context_length", results.settings.context_length},
          {"n_contexts", results.n_contexts},
          {"n_questions", results.n_questions},
          {"n_malformed", results.n_malformed},
          {"n_truncated", results.n_truncated},
          {"complete", results.complete},
          {"runs", std::move(runs)}};
}

Json WriteProfile(const Profile& profile) {
  Json kl = Json::array(), l2 = Json::array();
  for (const auto& row : profile.cells) {
    Json kl_row = Json::array(), l2_row = Json::array();
    for (const ProfileCell& cell : row) kl_row.push_back(cell.kl), l2_row.push_back(cell.l2);
    kl.push_back(std::move(kl_row)), l2.push_back(std::move(l2_row));
  }
  return {{"scorer", profile.scorer}, {"length", profile.length},
          {"chunks", profile.chunks}, {"experts", WriteExperts(profile.experts)},
          {"kl", std::move(kl)},      {"l2", std::move(l2)}};
}

std::string Subtitle(const Fingerprint& m) {
  return fmt::format(
      "{} ({}, {} layers, {} KV heads of {}): answers with the K/V cache compressed, by allocated bytes.",
      m.name.empty() ? "A model without a name" : m.name, m.architecture, m.n_layers, m.shape.n_kv_heads,
      m.shape.head_size);
}

}  // namespace

Expected<std::string> MakeReport(const ReportInput& input) {
  if (input.results.empty())
    return Fail(ErrorCode::kInvalidArgument, "a report needs at least one evaluation");
  if (assets::plots.empty())
    return Fail(
        ErrorCode::kUnsupported,
        "this moend was built without the plotting library; run scripts/fetch-report-plots and build again");
  const Fingerprint& model = input.results.front().model;
  Json suites = Json::array();
  for (const Results& results : input.results) {
    MOEND_TRY(
        CheckSameModel(results.model, model, fmt::format("the evaluation of {}", results.settings.suite)));
    suites.push_back(WriteSuite(results));
  }
  if (input.profile) MOEND_TRY(CheckSameModel(input.profile->model, model, "the profile"));
  if (input.plan) MOEND_TRY(CheckSameModel(input.plan->model, model, "the plan"));
  Json data = {{"subtitle", Subtitle(model)},
               {"footer", "Made by moend report with D3 and Observable Plot (ISC licence)."},
               {"suites", std::move(suites)}};
  if (input.profile) data["profile"] = WriteProfile(*input.profile);
  if (input.plan) data["plan"] = {{"source", input.plan_source}, {"layers", WriteLayers(*input.plan)}};
  // Inside <script>, "</script" and "<!--" would end or confuse the data, whatever JSON thinks of them.
  const std::string json =
      ReplaceAll(data.dump(-1, ' ', false, Json::error_handler_t::replace), "<", "\\u003c");
  // Text is only ever put where the template has a place, never searched again: data may hold "{{...}}".
  std::string page;
  std::string_view rest = assets::page;
  while (true) {
    const std::size_t open = rest.find("{{"), close = rest.find("}}");
    if (open == std::string_view::npos || close == std::string_view::npos) break;
    const std::string_view name = rest.substr(open + 2, close - open - 2);
    page += rest.substr(0, open);
    page += name == "style"    ? assets::style
            : name == "plots"  ? assets::plots
            : name == "script" ? assets::script
                               : std::string_view(json);
    rest.remove_prefix(close + 2);
  }
  return page.append(rest);
}

}  // namespace moend::eval
