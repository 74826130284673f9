#include "moend/calibrate/sensitivity.h"

#include <algorithm>
#include <cmath>

#include "moend/calibrate/probe.h"
#include "moend/engine/engine_impl.h"
#include "moend/engine/repetition.h"
#include "moend/solve/solve.h"

namespace moend {
namespace {

constexpr double kPrior = 0.1;
constexpr double kCompression = 14;
constexpr int kLossBits = 40;
constexpr double kReadingShare = 0.3;  // of the time, for the progress bar only

// Tokens that are measured: enough to say something, and for models of many heads no more than take about
// as long as reading the text.
int64_t MeasuredTokens(int64_t n_tokens, int64_t rows) {
  static constexpr int64_t kFewest = 48, kMost = 192;
  return std::min(n_tokens / 4, std::clamp(4 * n_tokens / rows, kFewest, kMost));
}

// KV heads of the layers that compress at all.
int64_t RoutedRows(const Fingerprint& model) {
  return (model.n_layers - model.sliding_layers() - model.state_layers()) * model.shape.n_kv_heads;
}

std::vector<double> Weights(const Profile& profile) {
  double error = 0, kl = 0;
  for (const Sensitivity& s : profile.sensitivity) {
    error += s.error;
    kl += s.kl;
  }
  if (!(error > 0) || !(kl > 0)) return std::vector<double>(profile.sensitivity.size(), 1.0);
  const double prior = kPrior * error / static_cast<double>(RoutedRows(profile.model));
  std::vector<double> weights;
  for (const Sensitivity& s : profile.sensitivity)
    weights.push_back((s.kl + prior * kl / error) / (s.error + prior));
  return weights;
}

template <class Change>
void ChangeLosses(Profile& profile, const Change& change) {
  if (profile.sensitivity.empty()) return;
  const std::vector<double> weights = Weights(profile);
  const auto heads = static_cast<std::size_t>(profile.model.shape.n_kv_heads);
  for (std::size_t l = 0; l < profile.cells.size(); ++l) {
    for (std::size_t e = 0; e < profile.experts.size(); ++e) {
      double sum = 0;
      for (std::size_t row = l * heads; row < (l + 1) * heads; ++row)
        sum += profile.head_cells[row][e].kl = change(profile.head_cells[row][e].kl, weights[row]);
      profile.cells[l][e].kl = sum;
    }
  }
}

}  // namespace

void WeightLosses(Profile& profile) {
  ChangeLosses(profile, [](double loss, double weight) { return loss * weight; });
}

void UnweightLosses(Profile& profile) {
  ChangeLosses(profile, [](double loss, double weight) { return RoundLoss(loss / weight); });
}

double RoundLoss(double loss) {
  int exponent = 0;
  const double mantissa = std::frexp(loss, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(mantissa, kLossBits)), exponent - kLossBits);
}

Expected<void> ProbeHeads(Engine& engine, std::span<const int32_t> chunk, Profile& profile,
                          const std::function<bool(double)>& tick) {
  Engine::Impl& machine = engine.impl();
  const auto n = static_cast<int64_t>(chunk.size());
  const int64_t heads = profile.model.shape.n_kv_heads, rows = profile.model.n_layers * heads;
  SolveRequest request;
  request.variant = Variant::k2dHeads;
  request.context_length = n;
  double compression = kCompression;
  CompressFullLayers(profile.model, compression, request);
  request.min_keep = kDefaultMinKeep;
  request.floor_price = kDefaultFloorPrice;
  auto solved = Solve(profile, request);
  // A short text has no room for as little: as much as it can do.
  for (; !solved && solved.error().code == ErrorCode::kBudget && compression > 2; compression *= 0.7) {
    CompressFullLayers(profile.model, compression, request);
    solved = Solve(profile, request);
  }
  if (!solved) return Forward(solved);
  // Half of what is measured is what the text itself says next, half what it is asked for again: the heads
  // that copy are not the only ones that count.
  const int64_t half = MeasuredTokens(n, std::max<int64_t>(1, RoutedRows(profile.model))) / 2;
  MOEND_ASSIGN(const auto part, AskForPart(*machine.model, chunk, (n - half) / 2, half));
  std::vector<int32_t> tokens(chunk.begin(), chunk.end());
  tokens.insert(tokens.end(), part.begin(), part.end());
  MOEND_ASSIGN(const auto scorer, MakeScorer(profile.scorer));
  Probe probe(machine, *scorer, profile.guard);
  MOEND_TRY(probe.Read(tokens, half + std::ssize(part),
                       [&](double done) { return !tick || tick(kReadingShare * done); }));
  std::vector<Sensitivity> measured(static_cast<std::size_t>(rows));
  Profile plain = profile;
  UnweightLosses(plain);
  for (int64_t row = 0; row < rows; ++row) {
    const auto at = static_cast<std::size_t>(row);
    std::vector<Expert> layer(static_cast<std::size_t>(heads));
    const Expert& expert = layer[static_cast<std::size_t>(row % heads)] = solved->plan.heads[at];
    MOEND_ASSIGN(const ProfileCell cell, probe.MeasureLayer(row / heads, layer));
    const auto e = std::ranges::find(profile.experts, expert) - profile.experts.begin();
    if (expert != Expert{}) measured[at] = {plain.head_cells[at][static_cast<std::size_t>(e)].kl, cell.kl};
    if (tick &&
        !tick(kReadingShare + (1 - kReadingShare) * static_cast<double>(row + 1) / static_cast<double>(rows)))
      return Fail(ErrorCode::kCancelled, "the calibration was stopped");
  }
  plain.sensitivity.resize(measured.size());
  for (std::size_t row = 0; row < measured.size(); ++row) {
    plain.sensitivity[row].error += measured[row].error;
    plain.sensitivity[row].kl += measured[row].kl;
  }
  ++plain.probed;
  plain.checks.clear();
  WeightLosses(plain);
  profile = std::move(plain);
  return {};
}

}  // namespace moend
