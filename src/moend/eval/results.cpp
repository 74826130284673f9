#include "moend/eval/results.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "moend/base/file.h"
#include "moend/plan/json_fields.h"
#include "moend/score/scorer.h"

namespace moend::eval {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kMaxRuns = 100'000;
constexpr int64_t kMaxFileBytes = int64_t{4} << 30;
constexpr std::size_t kMaxText = 64 << 20;

Json Write(const Estimate& e) {
  return {{"score", e.score}, {"n", e.n}, {"low", e.low}, {"high", e.high}};
}

Json Write(const Settings& s) {
  return {{"suite", s.suite},
          {"suite_hash", s.suite_hash},
          {"mode", s.mode},
          {"prompt_tokens", s.prompt_tokens},
          {"max_new_tokens", s.max_new_tokens},
          {"max_new_scale", s.max_new_scale},
          {"context_length", s.context_length}};
}

Json Write(const Run& run) {
  Json datasets = Json::object(), contexts = Json::array(), answers = Json::array();
  for (const auto& [name, estimate] : Summarize(run)) datasets[name] = Write(estimate);
  for (const FinishedContext& c : run.contexts)
    contexts.push_back(
        {{"id", c.id}, {"tokens", c.tokens}, {"kv_bytes", c.kv_bytes}, {"kv_bytes_full", c.kv_bytes_full}});
  for (const Answer& a : run.answers)
    answers.push_back(
        {{"id", a.id}, {"dataset", a.dataset}, {"score", a.score}, {"tokens", a.tokens}, {"text", a.text}});
  return {{"variant", run.variant},
          {"scorer", run.scorer},
          {"compression", run.compression},
          {"ratio", run.ratio()},
          {"kv_bytes", run.kv_bytes()},
          {"mode", run.mode},
          {"mean", Write(MeanScore(run))},
          {"datasets", std::move(datasets)},
          {"plan", Json::parse(ToJson(run.plan))},
          {"contexts", std::move(contexts)},
          {"answers", std::move(answers)}};
}

std::string Dump(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// One line a field; elements of arrays of objects get a line each, down to `depth` levels.
void WriteLines(const Json& object, int depth, const std::string& indent, std::string& out) {
  out += "{\n";
  for (auto it = object.begin(); it != object.end(); ++it) {
    if (it != object.begin()) out += ",\n";
    out += indent + " " + Dump(it.key()) + ": ";
    if (!it->is_array() || it->empty() || !it->front().is_object()) {
      out += Dump(*it);
      continue;
    }
    out += "[\n";
    for (std::size_t i = 0; i < it->size(); ++i) {
      out += indent + "  ";
      if (depth > 1)
        WriteLines((*it)[i], depth - 1, indent + "  ", out);
      else
        out += Dump((*it)[i]);
      out += i + 1 < it->size() ? ",\n" : "\n";
    }
    out += indent + " ]";
  }
  out += "\n" + indent + "}";
}

// ---- reading
// ------------------------------------------------------------------------------------------------

Expected<int64_t> Int(const JsonNode& object, const char* key) {
  MOEND_ASSIGN(const JsonNode node, object.At(key));
  return node.Int(0, INT64_MAX);
}
Expected<double> Real(const JsonNode& object, const char* key, double high) {
  MOEND_ASSIGN(const JsonNode node, object.At(key));
  return node.Real(0, high);
}
Expected<std::string> Text(const JsonNode& object, const char* key, std::size_t limit = 4096) {
  MOEND_ASSIGN(const JsonNode node, object.At(key));
  return node.Text(limit);
}

Expected<Settings> ReadSettings(const JsonNode& node) {
  Settings s;
  MOEND_ASSIGN(s.suite, Text(node, "suite"));
  MOEND_ASSIGN(s.suite_hash, Text(node, "suite_hash"));
  MOEND_ASSIGN(s.mode, Text(node, "mode"));
  MOEND_ASSIGN(s.prompt_tokens, Int(node, "prompt_tokens"));
  MOEND_ASSIGN(s.max_new_tokens, Int(node, "max_new_tokens"));
  MOEND_ASSIGN(s.max_new_scale, Real(node, "max_new_scale", 1e6));
  MOEND_ASSIGN(s.context_length, Int(node, "context_length"));
  return s;
}

Expected<Run> ReadRun(const JsonNode& node, const nlohmann::json& plan, const std::string& source) {
  Run run;
  MOEND_ASSIGN(run.variant, Text(node, "variant"));
  MOEND_ASSIGN(run.scorer, Text(node, "scorer", kLongestScorer));
  MOEND_ASSIGN(run.mode, Text(node, "mode"));
  MOEND_ASSIGN(run.compression, Real(node, "compression", 1e12));
  MOEND_ASSIGN(run.plan, ParsePlan(plan.dump(), source));
  MOEND_ASSIGN(const JsonNode contexts, node.At("contexts"));
  MOEND_ASSIGN(const int64_t n_contexts, contexts.Size());
  for (int64_t i = 0; i < n_contexts; ++i) {
    MOEND_ASSIGN(const JsonNode c, contexts.At(i));
    FinishedContext& context = run.contexts.emplace_back();
    MOEND_ASSIGN(context.id, Text(c, "id"));
    MOEND_ASSIGN(context.tokens, Int(c, "tokens"));
    MOEND_ASSIGN(context.kv_bytes, Int(c, "kv_bytes"));
    MOEND_ASSIGN(context.kv_bytes_full, Int(c, "kv_bytes_full"));
  }
  MOEND_ASSIGN(const JsonNode answers, node.At("answers"));
  MOEND_ASSIGN(const int64_t n_answers, answers.Size());
  for (int64_t i = 0; i < n_answers; ++i) {
    MOEND_ASSIGN(const JsonNode a, answers.At(i));
    Answer& answer = run.answers.emplace_back();
    MOEND_ASSIGN(answer.id, Text(a, "id"));
    MOEND_ASSIGN(answer.dataset, Text(a, "dataset"));
    MOEND_ASSIGN(answer.score, Real(a, "score", 1));
    MOEND_ASSIGN(answer.tokens, Int(a, "tokens"));
    MOEND_ASSIGN(answer.text, Text(a, "text", kMaxText));
  }
  return run;
}

std::string Percent(double share) {
  return fmt::format("{:.1f}", 100 * share);
}

std::string Cell(const Estimate& e) {
  if (e.n == 0) return "-";
  return fmt::format("{} [{:.0f}, {:.0f}]", Percent(e.score), 100 * e.low, 100 * e.high);
}

}  // namespace

int64_t Run::kv_bytes() const {
  if (contexts.empty()) return 0;
  double sum = 0;
  for (const FinishedContext& c : contexts) sum += static_cast<double>(c.kv_bytes);
  return std::llround(sum / static_cast<double>(contexts.size()));
}

double Run::ratio() const {
  double full = 0, allocated = 0;
  for (const FinishedContext& c : contexts) {
    full += static_cast<double>(c.kv_bytes_full);
    allocated += static_cast<double>(c.kv_bytes);
  }
  return allocated > 0 ? full / allocated : 0;
}

std::string Run::label() const {
  std::string text = variant;
  if (!scorer.empty()) text += fmt::format("/{}", ShortScorerName(scorer));
  if (compression > 0) text += fmt::format(" {:g}x", compression);
  return text;
}

std::vector<std::pair<std::string, Estimate>> Summarize(const Run& run) {
  struct Sum {
    double score = 0;
    int64_t n = 0;
  };
  std::vector<std::string> order;
  std::map<std::string, Sum> sums;
  for (const Answer& answer : run.answers) {
    Sum& sum = sums[answer.dataset];
    if (sum.n++ == 0) order.push_back(answer.dataset);
    sum.score += answer.score;
  }
  std::vector<std::pair<std::string, Estimate>> out;
  for (const std::string& name : order)
    out.emplace_back(name, Wilson(sums[name].score / static_cast<double>(sums[name].n), sums[name].n));
  return out;
}

Estimate MeanScore(const Run& run) {
  std::vector<Estimate> parts;
  for (const auto& [name, estimate] : Summarize(run)) parts.push_back(estimate);
  return MeanOver(parts);
}

std::string ToJson(const Results& results) {
  Json runs = Json::array();
  for (const Run& run : results.runs) runs.push_back(Write(run));
  const Json root = {{"moend", "eval"},
                     {"schema", Results::kSchema},
                     {"model", moend::Write(results.model)},
                     {"settings", Write(results.settings)},
                     {"n_contexts", results.n_contexts},
                     {"n_questions", results.n_questions},
                     {"n_malformed", results.n_malformed},
                     {"n_truncated", results.n_truncated},
                     {"complete", results.complete},
                     {"runs", std::move(runs)}};
  std::string out;
  WriteLines(root, 2, "", out);
  return out + "\n";
}

Expected<Results> ParseResults(const std::string& json, const std::string& source) {
  MOEND_ASSIGN(const nlohmann::json document, ParseJson(json, source));
  const JsonNode root(document, source);
  MOEND_TRY(CheckHeader(root, source, "eval", Results::kSchema));
  Results results;
  MOEND_ASSIGN(const JsonNode model, root.At("model"));
  MOEND_ASSIGN(results.model, ReadFingerprint(model));
  MOEND_ASSIGN(const JsonNode settings, root.At("settings"));
  MOEND_ASSIGN(results.settings, ReadSettings(settings));
  MOEND_ASSIGN(results.n_contexts, Int(root, "n_contexts"));
  MOEND_ASSIGN(results.n_questions, Int(root, "n_questions"));
  MOEND_ASSIGN(results.n_malformed, Int(root, "n_malformed"));
  MOEND_ASSIGN(results.n_truncated, Int(root, "n_truncated"));
  const auto complete = document.find("complete");
  results.complete = complete != document.end() && *complete == true;
  MOEND_ASSIGN(const JsonNode runs, root.At("runs"));
  MOEND_ASSIGN(const int64_t n, runs.Size());
  if (n > kMaxRuns) return runs.Wrong("has {} runs; at most {} are possible", n, kMaxRuns);
  for (int64_t i = 0; i < n; ++i) {
    MOEND_ASSIGN(const JsonNode node, runs.At(i));
    MOEND_TRY(node.At("plan"));
    const nlohmann::json& plan = document["runs"][static_cast<std::size_t>(i)]["plan"];
    MOEND_ASSIGN(Run run, ReadRun(node, plan, fmt::format("{}: the plan of runs[{}]", source, i)));
    results.runs.push_back(std::move(run));
  }
  return results;
}

Expected<Results> LoadResults(const std::string& path) {
  MOEND_ASSIGN(const std::string json, ReadFile(path, kMaxFileBytes));
  return ParseResults(json, path);
}

std::string FormatTable(const Results& results) {
  std::vector<std::string> datasets;
  std::map<std::string, int64_t> counts;
  for (const Run& run : results.runs) {
    for (const auto& [name, estimate] : Summarize(run)) {
      if (std::ranges::find(datasets, name) == datasets.end()) datasets.push_back(name);
      counts[name] = std::max(counts[name], estimate.n);
    }
  }
  std::vector<std::vector<std::string>> rows = {{"variant", "scorer", "asked", "ratio", "MiB", "mean"}};
  for (const std::string& name : datasets) rows[0].push_back(fmt::format("{} (n={})", name, counts[name]));
  for (const Run& run : results.runs) {
    std::vector<std::string>& row = rows.emplace_back();
    row = {run.variant,
           run.scorer.empty() ? "-" : ShortScorerName(run.scorer),
           run.compression > 0 ? fmt::format("{:g}x", run.compression) : "-",
           fmt::format("{:.2f}x", run.ratio()),
           fmt::format("{:.2f}", static_cast<double>(run.kv_bytes()) / (1024.0 * 1024.0)),
           Cell(MeanScore(run))};
    const auto summary = Summarize(run);
    for (const std::string& name : datasets) {
      const auto it = std::ranges::find(summary, name, [](const auto& pair) { return pair.first; });
      const bool partial = it != summary.end() && it->second.n < counts[name];
      row.push_back(
          it == summary.end() ? "-" : Cell(it->second) + (partial ? fmt::format(" n={}", it->second.n) : ""));
    }
  }
  std::vector<std::size_t> widths(rows[0].size(), 0);
  for (const auto& row : rows)
    for (std::size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], row[c].size());
  std::string out;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    for (std::size_t c = 0; c < rows[r].size(); ++c)
      out += c < 2 ? fmt::format("| {:<{}} ", rows[r][c], widths[c])
                   : fmt::format("| {:>{}} ", rows[r][c], widths[c]);
    out += "|\n";
    if (r > 0) continue;
    for (std::size_t c = 0; c < widths.size(); ++c)
      out += fmt::format("|{:-<{}}", "", widths[c] + 1) + (c < 2 ? "-" : ":");
    out += "|\n";
  }
  return out;
}

}  // namespace moend::eval
