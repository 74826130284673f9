#include "moend/plan/describe.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <vector>

#include "moend/plan/heat_map.h"
#include "moend/plan/json_reader.h"

namespace moend {
namespace {

constexpr double kMib = 1 << 20;

std::string ModelLines(const Fingerprint& model) {
  const int64_t sliding = model.sliding_layers(), states = model.state_layers();
  return fmt::format("{}\n{}, {} layers{}{}, {} KV heads of {}\n",
                     model.name.empty() ? "a nameless model" : Printable(model.name, 60),
                     Printable(model.architecture, 16), model.n_layers,
                     sliding > 0 ? fmt::format(" of which {} slide", sliding) : "",
                     states > 0 ? fmt::format(" of which {} hold a state", states) : "",
                     model.shape.n_kv_heads, model.shape.head_size);
}

std::string GuardText(const Protected& guard) {
  return fmt::format("{} sinks and the newest {} tokens", guard.sinks, guard.window);
}

// A name for each layer becomes "expected 1-4 9, keydiff 0 5-8".
std::string ScorerText(const std::string& scorer) {
  const auto names = ScorersOf(scorer);
  if (names.size() == 1) return Printable(scorer, 16);
  std::map<std::string, std::vector<int>> layers;
  for (std::size_t l = 0; l < names.size(); ++l) layers[std::string(names[l])].push_back(static_cast<int>(l));
  std::string text;
  for (const auto& [name, of] : layers) {
    text += (text.empty() ? "" : ", ") + Printable(name, 16);
    for (std::size_t i = 0; i < of.size();) {
      std::size_t last = i;
      while (last + 1 < of.size() && of[last + 1] == of[last] + 1) ++last;
      text += last > i ? fmt::format(" {}-{}", of[i], of[last]) : fmt::format(" {}", of[i]);
      i = last + 1;
    }
  }
  return text;
}

// Largest over smallest loss of one expert among the layers; nothing where it was not measured or loses
// nothing.
std::string Spread(const Profile& profile, const Expert& expert, double ProfileCell::*metric) {
  const auto it = std::find(profile.experts.begin(), profile.experts.end(), expert);
  if (it == profile.experts.end()) return "";
  const auto e = static_cast<std::size_t>(it - profile.experts.begin());
  double least = HUGE_VAL, most = 0;
  for (std::size_t l = 0; l < profile.cells.size(); ++l) {
    const auto& row = profile.cells[l];
    if (profile.model.window(static_cast<int64_t>(l)) > 0) continue;
    if (e >= row.size()) return "";
    least = std::min(least, row[e].*metric);
    most = std::max(most, row[e].*metric);
  }
  return least > 0 && most > 0 ? fmt::format("{:.3g}x", most / least) : "";
}

// How different the layers are, one axis at a time while the other two are left at their best.
std::string Spreads(const Profile& profile, const TextStyle& style) {
  Expert best = profile.experts.front();
  for (const Expert& e : profile.experts) {
    best.keep = std::max(best.keep, e.keep);
    best.k_bits = std::max(best.k_bits, e.k_bits);
    best.v_bits = std::max(best.v_bits, e.v_bits);
  }
  std::vector<std::string> parts;
  for (const Expert& e : profile.experts) {
    const bool keep = e.keep != best.keep, k = e.k_bits != best.k_bits, v = e.v_bits != best.v_bits;
    if (keep + k + v != 1) continue;
    const std::string kl = Spread(profile, e, &ProfileCell::kl), l2 = Spread(profile, e, &ProfileCell::l2);
    if (kl.empty() && l2.empty()) continue;
    const std::string what = keep ? fmt::format("keep {:.3g}%", 100 * e.keep)
                             : k  ? fmt::format("K {} bit", e.k_bits)
                                  : fmt::format("V {} bit", e.v_bits);
    parts.push_back(fmt::format("{}: kl {}, l2 {}", what, kl.empty() ? "-" : kl, l2.empty() ? "-" : l2));
  }
  if (parts.empty()) return "";
  std::size_t widest = 0;
  for (const std::string& part : parts) widest = std::max(widest, part.size());
  const auto room = static_cast<std::size_t>(std::max(style.width, kMinTextWidth));
  const std::size_t columns = std::max<std::size_t>(1, room / (widest + 3));
  std::string out = "\nhow far the layers are apart (largest / smallest loss)\n";
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const bool last = i + 1 == parts.size() || (i + 1) % columns == 0;
    out += last ? parts[i] + "\n" : fmt::format("{:<{}}", parts[i], widest + 3);
  }
  return out;
}

// The scorer's state a slot that plan.bytes counted: the plan does not say, the sum does.
int64_t ScoreBytes(const Plan& plan) {
  const auto without = PlanBytes(plan, plan.context_length, 0);
  return without && *without != plan.bytes ? 4 : 0;
}

std::string Bar(double share, int width, bool color) {
  const int length = share > 0 ? std::clamp(static_cast<int>(std::lround(share * width)), 1, width) : 0;
  const std::string blocks(static_cast<std::size_t>(length), color ? ' ' : '#');
  return color && length > 0 ? fmt::format("\x1b[48;5;161m{}\x1b[0m", blocks) : blocks;
}

// A layer that no plan compresses.
std::string FixedRow(const Plan& plan, int64_t layer) {
  const int64_t window = plan.model.window(layer);
  const auto bytes = FixedBytes(plan.model, window, plan.model.shape.n_kv_heads, plan.context_length);
  if (plan.model.holds_state(layer))
    return fmt::format("{:>5}  {:>8}  {:>9}  {:>6}  {:>6}  {:>10.3f}\n", layer, "state", "", "", "",
                       static_cast<double>(plan.model.state_bytes) / kMib);
  return fmt::format("{:>5}  {:>8}  {:>9}  {:>6}  {:>6}  {:>10}\n", layer, "window",
                     std::min(window, plan.context_length), 16, 16,
                     bytes ? fmt::format("{:.3f}", static_cast<double>(*bytes) / kMib) : "?");
}

// A layer, or one KV head of it. A loss of NaN is not shown.
std::string Row(const Plan& plan, const std::string& name, const Expert& e, int64_t n_heads, double loss,
                int64_t score_bytes, double most, int bar_width, bool color) {
  const auto bytes =
      LayerBytes({n_heads, plan.model.shape.head_size}, e, plan.guard, plan.context_length, score_bytes);
  std::string row = fmt::format("{:>5}  {:>7.3g}%  {:>9}  {:>6}  {:>6}  {:>10}", name, 100 * e.keep,
                                KeptTokens(e.keep, plan.guard, plan.context_length), e.k_bits, e.v_bits,
                                bytes ? fmt::format("{:.3f}", static_cast<double>(*bytes) / kMib) : "?");
  if (std::isnan(loss)) return row + "\n";
  row += fmt::format("  {:>10.3g}", loss);
  const std::string bar = Bar(most > 0 ? loss / most : 0, bar_width, color);
  return row + (bar.empty() ? "" : "  " + bar) + "\n";
}

std::string Totals(const Plan& plan) {
  const int64_t full = FullBytes(plan.model, plan.context_length);
  double kept = 0;  // numbers, of K and V
  for (int64_t l = 0; l < std::ssize(plan.layers); ++l) {
    if (plan.model.holds_state(l)) continue;
    for (int64_t h = 0; h < plan.model.shape.n_kv_heads; ++h)
      kept += static_cast<double>(plan.model.window(l) > 0
                                      ? std::min(plan.model.window(l), plan.context_length)
                                      : KeptTokens(plan.expert(l, h).keep, plan.guard, plan.context_length)) *
              2.0 * static_cast<double>(plan.model.shape.head_size);
  }
  const auto mib = [](int64_t bytes) { return static_cast<double>(bytes) / kMib; };
  std::string out = fmt::format("{:.3f} MiB of {:.3f} MiB uncompressed", mib(plan.bytes), mib(full));
  if (plan.bytes > 0 && kept > 0) {
    out += fmt::format(": {:.2f}x smaller\n{:.2f} bits an element seen, {:.2f} an element kept",
                       static_cast<double>(full) / static_cast<double>(plan.bytes),
                       16.0 * static_cast<double>(plan.bytes) / static_cast<double>(full),
                       8.0 * static_cast<double>(plan.bytes) / kept);
  }
  out += fmt::format("\nbudget {:.3f} MiB", mib(plan.budget_bytes));
  if (!plan.predicted.empty()) {
    double loss = 0;
    for (const double x : plan.predicted) loss += x;
    out += fmt::format(", predicted {} {:.4g} in all",
                       plan.metric.empty() ? "loss" : Printable(plan.metric, 8), loss);
  }
  return out + "\n";
}

}  // namespace

std::string DescribeProfile(const Profile& profile, const TextStyle& style) {
  std::string out = fmt::format("profile of {}", ModelLines(profile.model));
  out += fmt::format("scorer {}; {} protected\n", ScorerText(profile.scorer), GuardText(profile.guard));
  out += fmt::format("{} of {} chunks of {} tokens, {}\n\n", profile.chunks, profile.chunks_wanted,
                     profile.length,
                     profile.method == ProfileMethod::kReconstruction
                         ? "each measured by what its repetition looks at"
                         : fmt::format("the last {} of each measured", profile.evaluated));
  if (profile.chunks == 0 || profile.experts.empty()) return out + "no chunk is finished yet\n";
  out += HeatMap(profile, &ProfileCell::kl, "kl: KL divergence of the logits in nats a token", style) + "\n";
  out += HeatMap(profile, &ProfileCell::l2, "l2: relative error of the layer's attention output", style);
  return out + Spreads(profile, style);
}

std::string DescribePlan(const Plan& plan, const TextStyle& style) {
  std::string out = fmt::format("plan for {}", ModelLines(plan.model));
  out += fmt::format("{} tokens of context; {} protected\n", plan.context_length, GuardText(plan.guard));
  out += fmt::format("variant {}; scorer {}", Printable(plan.variant, 20), ScorerText(plan.scorer));
  if (!plan.solver.empty()) out += fmt::format("; solver {}", Printable(plan.solver, 16));
  out += fmt::format("\n\n{:>5}  {:>8}  {:>9}  {:>6}  {:>6}  {:>10}", plan.heads.empty() ? "layer" : "head",
                     "keep", "tokens", "K bits", "V bits", "MiB");
  if (!plan.predicted.empty())
    out += fmt::format("  {:>10}", plan.metric.empty() ? "predicted" : "pred. " + Printable(plan.metric, 4));
  out += "\n";
  double most = 0;
  for (const double x : plan.predicted) most = std::max(most, x);
  const int bar = std::clamp(std::max(style.width, kMinTextWidth) - 70, 0, 30);
  const int64_t score_bytes = ScoreBytes(plan);
  const int64_t heads = plan.heads.empty() ? 0 : plan.model.shape.n_kv_heads;
  for (int64_t l = 0; l < std::ssize(plan.layers); ++l) {
    if (plan.model.window(l) > 0) {
      out += FixedRow(plan, l);
      continue;
    }
    // A layer whose heads are routed one by one is its heads' rows.
    for (int64_t h = 0; h < heads; ++h) {
      const double loss =
          h + 1 == heads && !plan.predicted.empty() ? plan.predicted[static_cast<std::size_t>(l)] : NAN;
      out += Row(plan, fmt::format("{}.{}", l, h), plan.expert(l, h), 1, loss, score_bytes, most, bar,
                 style.color);
    }
    if (heads) continue;
    const double loss = plan.predicted.empty() ? NAN : plan.predicted[static_cast<std::size_t>(l)];
    out += Row(plan, fmt::format("{}", l), plan.expert(l, 0), plan.model.shape.n_kv_heads, loss, score_bytes,
               most, bar, style.color);
  }
  return out + "\n" + Totals(plan);
}

}  // namespace moend
