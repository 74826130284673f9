#include "moend/solve/relaxation.h"

#include <algorithm>

namespace moend {

Items Undominated(const std::vector<Choice>& choices) {
  Items sorted;
  sorted.reserve(choices.size());
  for (std::size_t c = 0; c < choices.size(); ++c)
    sorted.push_back({choices[c].bytes, choices[c].loss, static_cast<int>(c)});
  std::sort(sorted.begin(), sorted.end(), [](const Item& a, const Item& b) {
    if (a.bytes != b.bytes) return a.bytes < b.bytes;
    return a.loss != b.loss ? a.loss < b.loss : a.choice < b.choice;
  });
  Items kept;
  for (const Item& item : sorted) {
    if (kept.empty() || item.loss < kept.back().loss) kept.push_back(item);
  }
  return kept;
}

Items LowerHull(const Items& undominated) {
  Items hull;
  for (const Item& item : undominated) {
    while (hull.size() >= 2) {
      const Item &a = hull[hull.size() - 2], &b = hull.back();
      // b is a corner if the rate falls there: (a -> b) > (b -> item).
      const double before = (a.loss - b.loss) * static_cast<double>(item.bytes - b.bytes);
      const double after = (b.loss - item.loss) * static_cast<double>(b.bytes - a.bytes);
      if (before > after) break;
      hull.pop_back();
    }
    hull.push_back(item);
  }
  return hull;
}

std::vector<Step> SortedSteps(const std::vector<Items>& hulls) {
  std::vector<Step> steps;
  for (std::size_t l = 0; l < hulls.size(); ++l) {
    for (std::size_t i = 1; i < hulls[l].size(); ++i) {
      const Item &a = hulls[l][i - 1], &b = hulls[l][i];
      steps.push_back({b.bytes - a.bytes, a.loss - b.loss, static_cast<int>(l), static_cast<int>(i)});
    }
  }
  // Stable: rates of one layer that rounding made equal keep their order.
  std::stable_sort(steps.begin(), steps.end(),
                   [](const Step& a, const Step& b) { return a.rate() > b.rate(); });
  return steps;
}

void Relaxation::Clear(int64_t base_bytes, double base_loss) {
  base_bytes_ = base_bytes;
  bytes_.assign(1, base_bytes);
  loss_.assign(1, base_loss);
  rate_.clear();
}

void Relaxation::Add(const Step& step) {
  bytes_.push_back(bytes_.back() + step.bytes);
  loss_.push_back(loss_.back() - step.gain);
  rate_.push_back(step.rate());
}

double Relaxation::RateAfter(int64_t whole) const {
  return whole < steps() ? rate_[static_cast<std::size_t>(whole)] : 0.0;
}

int64_t Relaxation::WholeSteps(int64_t budget) const {
  return std::upper_bound(bytes_.begin() + 1, bytes_.end(), budget) - bytes_.begin() - 1;
}

Relaxation Relax(const std::vector<Items>& hulls, const std::vector<Step>& steps) {
  int64_t bytes = 0;
  double loss = 0;
  for (const Items& hull : hulls) {
    bytes += hull.front().bytes;
    loss += hull.front().loss;
  }
  Relaxation relaxation;
  relaxation.Clear(bytes, loss);
  for (const Step& step : steps) relaxation.Add(step);
  return relaxation;
}

}  // namespace moend
