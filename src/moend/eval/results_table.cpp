#include <algorithm>
#include <map>

#include "moend/eval/markdown.h"
#include "moend/eval/paired.h"
#include "moend/eval/results.h"
#include "moend/score/scorer.h"

namespace moend::eval {
namespace {

std::string Percent(double share) {
  return fmt::format("{:.1f}", 100 * share);
}

std::string Cell(const Estimate& e) {
  if (e.n == 0) return "-";
  return fmt::format("{} [{:.0f}, {:.0f}]", Percent(e.score), 100 * e.low, 100 * e.high);
}

// "-3.2 [-5.1, -1.4]", in percent points.
std::string DifferenceCell(const ClusterMean& m) {
  if (m.n == 0) return "-";
  if (!m.has_interval()) return fmt::format("{:+.1f}", 100 * m.mean);
  return fmt::format("{:+.1f} [{:+.1f}, {:+.1f}]", 100 * m.mean, 100 * m.low, 100 * m.high);
}

std::string DivergenceCell(const ClusterMean& m) {
  if (m.n == 0) return "-";
  if (!m.has_interval()) return fmt::format("{:.4f}", m.mean);
  return fmt::format("{:.4f} [{:.4f}, {:.4f}]", m.mean, m.low, m.high);
}

}  // namespace

std::string FormatTable(const Results& results) {
  std::vector<std::string> datasets;
  std::map<std::string, int64_t> counts;
  const Run* full = FullRun(results);
  bool diverges = false;
  for (const Run& run : results.runs) {
    for (const Answer& a : run.answers) diverges |= !a.kld.empty();
    for (const auto& [name, estimate] : Summarize(run)) {
      if (std::ranges::find(datasets, name) == datasets.end()) datasets.push_back(name);
      counts[name] = std::max(counts[name], estimate.n);
    }
  }
  const bool paired = full && results.runs.size() > 1;
  std::vector<std::vector<std::string>> rows = {{"variant", "scorer", "asked", "ratio", "MiB", "mean"}};
  if (paired) rows[0].push_back("vs full");
  if (diverges) rows[0].insert(rows[0].end(), {"KLD", "99% KLD", "same top, %"});
  if (paired) rows[0].push_back("same tokens");
  for (const std::string& name : datasets) rows[0].push_back(fmt::format("{} (n={})", name, counts[name]));
  for (const Run& run : results.runs) {
    std::vector<std::string>& row = rows.emplace_back();
    row = {run.variant,
           run.scorer.empty() ? "-" : ShortScorerName(run.scorer),
           run.compression > 0 ? fmt::format("{:g}x", run.compression) : "-",
           fmt::format("{:.2f}x", run.ratio()),
           fmt::format("{:.2f}", static_cast<double>(run.kv_bytes()) / (1024.0 * 1024.0)),
           Cell(MeanScore(run))};
    const bool is_full = &run == full;
    const Paired p = ComparePaired(run, full);
    if (paired) row.push_back(is_full ? "-" : DifferenceCell(p.difference));
    if (diverges) {
      row.push_back(DivergenceCell(p.kld));
      row.push_back(p.kld.n > 0 ? fmt::format("{:.3f}", p.kld_99) : "-");
      row.push_back(p.kld.n > 0 ? Percent(p.same_top) : "-");
    }
    if (paired)
      row.push_back(is_full || p.n_agreed == 0 ? "-"
                                               : fmt::format("{:.1f} of {:.1f}", p.agreed, p.answer_tokens));
    const auto summary = Summarize(run);
    for (const std::string& name : datasets) {
      const auto it = std::ranges::find(summary, name, [](const auto& pair) { return pair.first; });
      if (it == summary.end()) {
        row.push_back("-");
        continue;
      }
      std::string cell = Cell(it->second);
      if (it->second.n < counts[name]) cell += fmt::format(" n={}", it->second.n);
      if (const Estimate letter = LetterScore(run, name); letter.n > 0)
        cell += fmt::format(", letter {}", Percent(letter.score));
      row.push_back(std::move(cell));
    }
  }
  return MarkdownTable(rows, 2);
}

}  // namespace moend::eval
