#include "moend/solve/knapsack.h"

#include <algorithm>
#include <cmath>
#include <queue>

namespace moend {
namespace {

// Far beyond every real table, and small enough that sums of losses and byte counts stay exact enough.
constexpr double kMaxLoss = 1e30;
constexpr int64_t kMaxTotalBytes = int64_t{1} << 61;

const Item& At(const Items& items, int index) {
  return items[static_cast<std::size_t>(index)];
}

struct Upgrade {
  int to = -1;
  int64_t bytes = 0;
  double score = 0;
};

// The best upgrade of a layer from item `from` within `room` bytes; per byte or in all.
Upgrade BestUpgrade(const Items& items, int from, int64_t room, bool per_byte) {
  Upgrade best;
  for (int to = from + 1; to < static_cast<int>(items.size()); ++to) {
    const int64_t bytes = At(items, to).bytes - At(items, from).bytes;
    if (bytes > room) break;
    const double gain = At(items, from).loss - At(items, to).loss;
    const double score = per_byte ? gain / static_cast<double>(bytes) : gain;
    if (score > best.score) best = {to, bytes, score};
  }
  return best;
}

// Upgrades one layer at a time, always the one with the highest score, until nothing fits. As the room only
// shrinks, so do the scores; a layer's turn is the time to find out.
void Climb(const std::vector<Items>& layers, int64_t room, bool per_byte, std::vector<int>& chosen) {
  struct Candidate {
    Upgrade upgrade;
    std::size_t layer;
    bool operator<(const Candidate& o) const {
      return upgrade.score != o.upgrade.score ? upgrade.score < o.upgrade.score : layer > o.layer;
    }
  };
  std::priority_queue<Candidate> queue;
  const auto offer = [&](std::size_t l) {
    const Upgrade best = BestUpgrade(layers[l], chosen[l], room, per_byte);
    if (best.to >= 0) queue.push({best, l});
  };
  for (std::size_t l = 0; l < layers.size(); ++l) offer(l);
  while (!queue.empty()) {
    const auto [upgrade, l] = queue.top();
    queue.pop();
    if (upgrade.bytes <= room) {
      chosen[l] = upgrade.to;
      room -= upgrade.bytes;
    }
    offer(l);
  }
}

// Index of a hull corner among the items it was made from.
int IndexOf(const Items& items, const Item& corner) {
  const auto it = std::lower_bound(items.begin(), items.end(), corner.bytes,
                                   [](const Item& item, int64_t bytes) { return item.bytes < bytes; });
  return static_cast<int>(it - items.begin());
}

std::vector<Items> Hulls(const std::vector<Items>& layers) {
  std::vector<Items> hulls;
  for (const Items& items : layers) hulls.push_back(LowerHull(items));
  return hulls;
}

Expected<void> Check(const std::vector<std::vector<Choice>>& items) {
  int64_t total = 0;
  for (std::size_t l = 0; l < items.size(); ++l) {
    if (items[l].empty()) return Fail(ErrorCode::kInvalidArgument, "layer {} has nothing to choose from", l);
    int64_t largest = 0;
    for (std::size_t c = 0; c < items[l].size(); ++c) {
      const Choice& choice = items[l][c];
      if (choice.bytes < 0 || choice.bytes > kMaxTotalBytes)
        return Fail(ErrorCode::kInvalidArgument, "choice {} of layer {} has {} bytes", c, l, choice.bytes);
      if (!(std::abs(choice.loss) <= kMaxLoss))
        return Fail(ErrorCode::kInvalidArgument, "choice {} of layer {} has the loss {}", c, l, choice.loss);
      largest = std::max(largest, choice.bytes);
    }
    total += largest;
    if (total > kMaxTotalBytes)
      return Fail(ErrorCode::kInvalidArgument, "the layers up to {} have more than {} bytes", l,
                  kMaxTotalBytes);
  }
  return {};
}

}  // namespace

int64_t TotalBytes(const std::vector<Items>& layers, const std::vector<int>& chosen) {
  int64_t bytes = 0;
  for (std::size_t l = 0; l < layers.size(); ++l) bytes += At(layers[l], chosen[l]).bytes;
  return bytes;
}

double TotalLoss(const std::vector<Items>& layers, const std::vector<int>& chosen) {
  double loss = 0;
  for (std::size_t l = 0; l < layers.size(); ++l) loss += At(layers[l], chosen[l]).loss;
  return loss;
}

void FillUp(const std::vector<Items>& layers, int64_t budget, std::vector<int>& chosen) {
  Climb(layers, budget - TotalBytes(layers, chosen), false, chosen);
}

std::vector<int> SolveGreedy(const std::vector<Items>& layers, int64_t budget) {
  std::vector<int> chosen(layers.size(), 0);
  Climb(layers, budget - TotalBytes(layers, chosen), true, chosen);
  return chosen;
}

std::vector<int> SolveHull(const std::vector<Items>& layers, int64_t budget) {
  const std::vector<Items> hulls = Hulls(layers);
  std::vector<int> corner(layers.size(), 0);
  std::vector<int> chosen(layers.size(), 0);
  int64_t room = budget - TotalBytes(layers, chosen);
  for (const Step& step : SortedSteps(hulls)) {
    const auto l = static_cast<std::size_t>(step.layer);
    // A layer whose step did not fit stays where it is; the cheaper steps of others may still fit.
    if (corner[l] + 1 != step.to || step.bytes > room) continue;
    corner[l] = step.to;
    room -= step.bytes;
  }
  for (std::size_t l = 0; l < layers.size(); ++l) chosen[l] = IndexOf(layers[l], At(hulls[l], corner[l]));
  FillUp(layers, budget, chosen);
  return chosen;
}

Expected<std::vector<int>> SolveKnapsack(const std::vector<std::vector<Choice>>& items, int64_t budget,
                                         Solver solver, double* lower_bound) {
  MOEND_TRY(Check(items));
  std::vector<Items> layers;
  int64_t least = 0;
  for (const auto& choices : items) {
    layers.push_back(Undominated(choices));
    least += layers.back().front().bytes;
  }
  if (budget < least) {
    return Fail(ErrorCode::kBudget, "a budget of {} bytes is below the smallest possible {} bytes", budget,
                least);
  }
  std::vector<int> chosen;
  double bound = 0;
  if (solver == Solver::kExact) {
    chosen = SolveExact(layers, budget, &bound);
  } else {
    chosen = solver == Solver::kHull ? SolveHull(layers, budget) : SolveGreedy(layers, budget);
    const std::vector<Items> hulls = Hulls(layers);
    const Relaxation relaxation = Relax(hulls, SortedSteps(hulls));
    // Rounding of the prefix sums must not put the bound above a solution that meets it.
    bound = std::min(relaxation.Bound(budget, relaxation.WholeSteps(budget)), TotalLoss(layers, chosen));
  }
  if (lower_bound) *lower_bound = bound;
  for (std::size_t l = 0; l < layers.size(); ++l) chosen[l] = At(layers[l], chosen[l]).choice;
  return chosen;
}

}  // namespace moend
