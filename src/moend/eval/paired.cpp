#include "moend/eval/paired.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <set>

#include "moend/eval/distance.h"

namespace moend::eval {
namespace {

constexpr int kResamples = 2000;

// Clusters by context, in order of appearance.
class ByContext {
 public:
  explicit ByContext(const Run& run) {
    for (const FinishedContext& c : run.contexts) contexts_.insert(c.id);
  }
  void Add(const Answer& answer, double sum, int64_t n) {
    const auto [it, fresh] = index_.try_emplace(ContextOf(answer.id), clusters_.size());
    if (fresh) clusters_.emplace_back();
    clusters_[it->second].sum += sum;
    clusters_[it->second].n += n;
  }
  std::span<const Cluster> clusters() const { return clusters_; }

 private:
  // A question is named as its context, or "context#3" (MakeIdsUnique in suite.cpp).
  std::string ContextOf(const std::string& question) const {
    if (contexts_.contains(question)) return question;
    return question.substr(0, question.rfind('#'));
  }
  std::set<std::string> contexts_;
  std::map<std::string, std::size_t> index_;
  std::vector<Cluster> clusters_;
};

int64_t Agreement(const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
  return std::ranges::mismatch(a, b).in1 - a.begin();
}

}  // namespace

ClusterMean Bootstrap(std::span<const Cluster> clusters) {
  ClusterMean out;
  double sum = 0;
  for (const Cluster& c : clusters) {
    sum += c.sum;
    out.n += c.n;
    out.clusters += c.n > 0;
  }
  if (out.n == 0) return out;
  out.mean = out.low = out.high = sum / static_cast<double>(out.n);
  if (!out.has_interval()) return out;
  std::mt19937_64 random(0x6d6f656e64);  // the same interval for the same answers
  std::vector<double> means;
  for (int r = 0; r < kResamples; ++r) {
    double resum = 0;
    int64_t n = 0;
    for (std::size_t i = 0; i < clusters.size(); ++i) {
      const Cluster& c = clusters[static_cast<std::size_t>(random() % clusters.size())];
      resum += c.sum;
      n += c.n;
    }
    if (n > 0) means.push_back(resum / static_cast<double>(n));
  }
  std::ranges::sort(means);
  const double k = static_cast<double>(out.clusters), spread = std::sqrt(k / (k - 1));
  out.low = out.mean + spread * (std::min(out.mean, QuantileOf(means, 0.025).value) - out.mean);
  out.high = out.mean + spread * (std::max(out.mean, QuantileOf(means, 0.975).value) - out.mean);
  return out;
}

Paired ComparePaired(const Run& run, const Run* full, const std::string& dataset) {
  std::map<std::string, const Answer*> reference;
  if (full)
    for (const Answer& a : full->answers) reference[a.id] = &a;
  ByContext differences(run), divergences(run);
  Paired out;
  std::vector<double> kld;
  int64_t same_top = 0, n_nll = 0, n_nll_full = 0;
  for (const Answer& answer : run.answers) {
    if (!dataset.empty() && answer.dataset != dataset) continue;
    if (!answer.kld.empty()) {
      double sum = 0;
      for (const float d : answer.kld) sum += d, kld.push_back(d);
      divergences.Add(answer, sum, std::ssize(answer.kld));
      same_top += answer.same_top;
    }
    out.nll += answer.nll;
    n_nll += answer.gold_tokens;
    const auto it = reference.find(answer.id);
    if (it == reference.end()) continue;
    const Answer& base = *it->second;
    differences.Add(answer, answer.score - base.score, 1);
    out.nll_full += base.nll;
    n_nll_full += base.gold_tokens;
    if (base.ids.empty()) continue;
    out.agreed += static_cast<double>(Agreement(answer.ids, base.ids));
    out.answer_tokens += static_cast<double>(base.ids.size());
    ++out.n_agreed;
  }
  out.difference = Bootstrap(differences.clusters());
  out.kld = Bootstrap(divergences.clusters());
  std::ranges::sort(kld);
  out.kld_99 = QuantileOf(kld, 0.99).value;
  const auto mean = [](double sum, int64_t n) { return n > 0 ? sum / static_cast<double>(n) : 0; };
  out.same_top = mean(static_cast<double>(same_top), std::ssize(kld));
  out.nll = mean(out.nll, n_nll);
  out.nll_full = mean(out.nll_full, n_nll_full);
  out.agreed = mean(out.agreed, out.n_agreed);
  out.answer_tokens = mean(out.answer_tokens, out.n_agreed);
  return out;
}

const Run* FullRun(const Results& results) {
  const auto it = std::ranges::find_if(results.runs, [](const Run& r) { return r.variant == "full"; });
  return it == results.runs.end() ? nullptr : &*it;
}

}  // namespace moend::eval
