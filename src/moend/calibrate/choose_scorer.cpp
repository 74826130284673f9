#include "moend/calibrate/choose_scorer.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string_view>

#include "moend/calibrate/probe.h"
#include "moend/engine/queries.h"

namespace moend {
namespace {

constexpr std::string_view kAutoScorers[] = {"keydiff", "expected"};

// How many times less another scorer must lose before it takes the place of the first. In layers where two
// lose about alike it is chance which of them wins, and the first one is the better when little is kept:
// where one chunk of 256 tokens spoke for expected attention in layer 6 of the reference model as well, plans
// of 40x answered 72 % of the 16k suite; with KeyDiff alone, measured alike, 83.
constexpr double kClearlyLess = 1.5;
constexpr double kLeast = 1e-5;  // below it a kl is rounding
constexpr double kReadShare = 0.1;

// The keep ratios that evict.
std::vector<double> Keeps(const std::vector<Expert>& experts) {
  std::vector<double> keeps;
  for (const Expert& e : experts)
    if (e.keep < 1 && (keeps.empty() || keeps.back() != e.keep)) keeps.push_back(e.keep);
  return keeps;
}

}  // namespace

std::span<const std::string_view> AutoScorers() {
  return kAutoScorers;
}

Expected<std::string> ChooseScorers(Engine::Impl& machine, std::span<const std::vector<int32_t>> chunks,
                                    const CalibrateOptions& options,
                                    const std::function<bool(double)>& tick) {
  const HyperParams& hp = machine.model->hparams();
  const std::vector<double> keeps = Keeps(options.experts);
  std::vector<std::unique_ptr<Scorer>> scorers;
  for (const std::string_view name : kAutoScorers) {
    MOEND_ASSIGN(scorers.emplace_back(), MakeScorer(name));
  }
  MOEND_ASSIGN(const auto all, MakeScorer(fmt::format("{}", fmt::join(kAutoScorers, ","))));
  Probe probe(machine, *all, options.guard);
  const auto n_layers = static_cast<std::size_t>(hp.n_layers);
  // kl[layer][scorer][keep], summed over the chunks
  std::vector kl(n_layers, std::vector(scorers.size(), std::vector<double>(keeps.size())));
  std::shared_ptr<const QueryStats> queries;
  double chunk = 0;
  for (const std::vector<int32_t>& tokens : chunks) {
    const auto report = [&](double share) {
      return !tick || tick((chunk + share) / static_cast<double>(chunks.size()));
    };
    MOEND_TRY(
        probe.Read(tokens, options.evaluated, [&](double share) { return report(kReadShare * share); }));
    queries = MergeQueryStats(queries, probe.queries());
    if (all->needs().query_stats) {
      MOEND_ASSIGN(auto expected, MakeQueryModel(*machine.model, queries));
      probe.Expect(std::move(expected));
    }
    const double work = static_cast<double>(scorers.size() * n_layers);
    double done = 0;
    for (std::size_t s = 0; s < scorers.size(); ++s) {
      probe.Use(*scorers[s]);
      for (std::size_t l = 0; l < n_layers; ++l) {
        for (std::size_t k = 0; k < keeps.size() && hp.layers[l].compresses(); ++k) {
          const std::vector<Expert> heads(static_cast<std::size_t>(hp.n_kv_heads), Expert{keeps[k], 16, 16});
          MOEND_ASSIGN(const ProfileCell cell, probe.MeasureLayer(static_cast<int64_t>(l), heads));
          kl[l][s][k] += cell.kl;
        }
        if (!report(kReadShare + (1 - kReadShare) * ++done / work))
          return Fail(ErrorCode::kCancelled, "the calibration was stopped");
      }
    }
    probe.Use(*all);
    ++chunk;
  }
  std::vector<std::string_view> chosen;
  for (const auto& layer : kl) {
    std::vector<double> losses;  // mean of log kl
    for (const auto& row : layer) {
      double sum = 0;
      for (const double x : row) sum += std::log(std::max(kLeast, x / static_cast<double>(chunks.size())));
      losses.push_back(row.empty() ? 0 : sum / static_cast<double>(row.size()));
    }
    const auto best = std::ranges::min_element(losses) - losses.begin();
    const bool clear = losses[static_cast<std::size_t>(best)] < losses[0] - std::log(kClearlyLess);
    chosen.push_back(kAutoScorers[clear ? best : 0]);
  }
  const bool same = std::ranges::all_of(chosen, [&](std::string_view n) { return n == chosen[0]; });
  return same ? std::string(chosen[0]) : fmt::format("{}", fmt::join(chosen, ","));
}

}  // namespace moend
