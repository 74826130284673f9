#include "moend/eval/results.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "moend/base/file.h"
#include "moend/eval/methods.h"
#include "moend/eval/paired.h"
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

Json Write(const ClusterMean& m) {
  Json out = {{"mean", m.mean}, {"n", m.n}, {"contexts", m.clusters}};
  if (m.has_interval()) out["low"] = m.low, out["high"] = m.high;
  return out;
}

Json Write(const Paired& p) {
  Json out = Json::object();
  if (p.difference.n > 0) out["difference"] = Write(p.difference);
  if (p.kld.n > 0)
    out.update({{"kld", Write(p.kld)}, {"kld_99", p.kld_99}, {"same_top", p.same_top}, {"nll", p.nll}});
  if (p.kld.n > 0 && p.difference.n > 0) out["nll_full"] = p.nll_full;
  if (p.n_agreed > 0) out.update({{"agreed", p.agreed}, {"answer_tokens", p.answer_tokens}});
  return out;
}

Json Write(const Answer& a) {
  Json out = {
      {"id", a.id}, {"dataset", a.dataset}, {"score", a.score}, {"tokens", a.tokens}, {"text", a.text}};
  if (!a.ids.empty()) out["ids"] = a.ids;
  if (a.gold_tokens > 0) out.update({{"gold_tokens", a.gold_tokens}, {"nll", a.nll}});
  if (!a.kld.empty()) {
    Json kld = Json::array();  // a ten-millionth of a nat is far below what differs between two machines
    for (const float d : a.kld) kld.push_back(std::round(double{d} * 1e7) / 1e7);
    out.update({{"kld", std::move(kld)}, {"same_top", a.same_top}});
  }
  if (!a.letters.empty()) out.update({{"letters", a.letters}, {"letter_score", a.letter_score}});
  return out;
}

Json Write(const Run& run, const Run* full) {
  Json datasets = Json::object(), contexts = Json::array(), answers = Json::array();
  const bool is_full = &run == full;
  for (const auto& [name, estimate] : Summarize(run)) {
    datasets[name] = Write(estimate);
    if (const Estimate letter = LetterScore(run, name); letter.n > 0) datasets[name]["letter"] = letter.score;
    if (!is_full) datasets[name]["paired"] = Write(ComparePaired(run, full, name));
  }
  for (const FinishedContext& c : run.contexts)
    contexts.push_back(
        {{"id", c.id}, {"tokens", c.tokens}, {"kv_bytes", c.kv_bytes}, {"kv_bytes_full", c.kv_bytes_full}});
  for (const Answer& a : run.answers) answers.push_back(Write(a));
  return {{"variant", run.variant},
          {"scorer", run.scorer},
          {"compression", run.compression},
          {"ratio", run.ratio()},
          {"kv_bytes", run.kv_bytes()},
          {"mode", run.mode},
          {"mean", Write(MeanScore(run))},
          {"paired", is_full ? Json::object() : Write(ComparePaired(run, full))},
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

// Numbers in [low, high], if the field is there.
template <class Number>
Expected<void> ReadNumbers(const JsonNode& object, const char* key, double low, double high,
                           std::vector<Number>& out) {
  if (!object.Has(key)) return {};
  MOEND_ASSIGN(const JsonNode list, object.At(key));
  MOEND_ASSIGN(const int64_t n, list.Size());
  for (int64_t i = 0; i < n; ++i) {
    MOEND_ASSIGN(const JsonNode node, list.At(i));
    MOEND_ASSIGN(const double value, node.Real(low, high));
    out.push_back(static_cast<Number>(value));
  }
  return {};
}

// What files of older versions lack.
Expected<void> ReadPredictions(const JsonNode& node, Answer& answer) {
  MOEND_TRY(ReadNumbers(node, "ids", 0, INT32_MAX, answer.ids));
  if (node.Has("gold_tokens")) {
    MOEND_ASSIGN(answer.gold_tokens, Int(node, "gold_tokens"));
    MOEND_ASSIGN(answer.nll, Real(node, "nll", 1e12));
  }
  MOEND_TRY(ReadNumbers(node, "kld", 0, 1e6, answer.kld));
  if (!answer.kld.empty()) {
    MOEND_ASSIGN(answer.same_top, Int(node, "same_top"));
  }
  MOEND_TRY(ReadNumbers(node, "letters", -1e6, 0, answer.letters));
  if (!answer.letters.empty()) {
    MOEND_ASSIGN(answer.letter_score, Real(node, "letter_score", 1));
  }
  return {};
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
    MOEND_TRY(ReadPredictions(a, answer));
  }
  return run;
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
  return LabelOf(variant, scorer, compression);
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

Estimate LetterScore(const Run& run, const std::string& dataset) {
  double sum = 0;
  int64_t n = 0;
  for (const Answer& a : run.answers) {
    if (a.dataset != dataset || a.letters.empty()) continue;
    sum += a.letter_score;
    ++n;
  }
  return n > 0 ? Wilson(sum / static_cast<double>(n), n) : Estimate{};
}

std::string ToJson(const Results& results) {
  Json runs = Json::array();
  for (const Run& run : results.runs) runs.push_back(Write(run, FullRun(results)));
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

}  // namespace moend::eval
