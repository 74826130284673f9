// Exact multiple-choice knapsack. Layers are decided one after the other; a state is what the layers decided
// so far cost and lose. Of these, only the Pareto optimal ones whose relaxed completion still promises less
// than the best known solution go on. Bytes are never rounded to a grid. What makes it fast:
//   - the greedy solutions are nearly optimal, so the promise leaves little room;
//   - an item that alone wastes more than this room is in no better solution and is dropped beforehand;
//   - every state is also completed greedily, which improves the best known solution on the way.
#include <algorithm>
#include <cmath>
#include <limits>

#include "moend/solve/knapsack.h"

namespace moend {
namespace {

// Bounds the time of hopeless cases (tens of milliseconds): about so many states are made in all. The states
// that a stage may hand on follow from it.
constexpr int64_t kMaxStates = 2'000'000;
constexpr int64_t kMinWidth = 64;

struct State {
  int64_t bytes = 0;
  double loss = 0;
  double promise = 0;  // relaxed optimum of what can still become of it
  int32_t parent = 0;  // index among the states of the stage before
  int32_t item = 0;    // index in the layer's remaining items
};

struct Origin {
  int32_t parent, item;
};

// Where the best known solution was found: a state's completion by the first steps of the rest.
struct Find {
  int stage = -1;
  int32_t parent = 0, item = 0;
  int64_t whole = 0;
};

// Both ascend in bytes and descend in loss; so does the result, without the dominated states.
void MergePareto(const std::vector<State>& a, const std::vector<State>& b, std::vector<State>& out) {
  out.clear();
  double least = std::numeric_limits<double>::infinity();
  std::size_t i = 0, j = 0;
  while (i < a.size() || j < b.size()) {
    const bool from_a =
        j == b.size() ||
        (i < a.size() && (a[i].bytes < b[j].bytes || (a[i].bytes == b[j].bytes && a[i].loss <= b[j].loss)));
    const State& s = from_a ? a[i++] : b[j++];
    if (s.loss < least) {
      least = s.loss;
      out.push_back(s);
    }
  }
}

class Exact {
 public:
  Exact(const std::vector<Items>& layers, int64_t budget)
      : layers_(layers), budget_(budget), best_(SolveHull(layers, budget)) {
    if (auto greedy = SolveGreedy(layers, budget); TotalLoss(layers_, greedy) < TotalLoss(layers_, best_))
      best_ = std::move(greedy);
    best_loss_ = TotalLoss(layers_, best_);
    double scale = 0;
    for (const Items& items : layers_)
      scale += std::max(std::abs(items.front().loss), std::abs(items.back().loss));
    rounding_ = 1e-12 * scale;
    remaining_ = layers_;
    for (Items& items : remaining_) {
      for (std::size_t i = 0; i < items.size(); ++i) items[i].choice = static_cast<int>(i);
    }
  }

  std::vector<int> Run(double* lower_bound) {
    if (Reduce()) {
      Search();
      *lower_bound = std::min(best_loss_, forgone_);
    } else {
      *lower_bound = best_loss_;
    }
    return best_;
  }

 private:
  // Drops the items that are in no better solution. False if that proves the best known one optimal.
  bool Reduce() {
    for (;;) {
      int64_t least = 0;
      for (Items& items : remaining_) {
        if (items.empty()) return false;
        least += items.front().bytes;
      }
      if (least > budget_) return false;
      hulls_.clear();
      for (const Items& items : remaining_) hulls_.push_back(LowerHull(items));
      steps_ = SortedSteps(hulls_);
      const Relaxation relaxation = Relax(hulls_, steps_);
      const int64_t whole = relaxation.WholeSteps(budget_);
      bound_ = std::max(bound_, relaxation.Bound(budget_, whole));
      if (bound_ >= best_loss_ - rounding_) return false;
      if (!DropWasteful(relaxation.RateAfter(whole))) return true;
    }
  }

  // Bytes have a price: that of the relaxed optimum. Whoever takes an item other than a layer's best at this
  // price loses at least the difference over the relaxed bound.
  bool DropWasteful(double price) {
    std::vector<double> cheapest;
    double bound = -price * static_cast<double>(budget_);
    const auto priced = [price](const Item& item) {
      return item.loss + price * static_cast<double>(item.bytes);
    };
    for (const Items& items : remaining_) {
      double least = std::numeric_limits<double>::infinity();
      for (const Item& item : items) least = std::min(least, priced(item));
      cheapest.push_back(least);
      bound += least;
    }
    const double room = best_loss_ - rounding_ - bound;
    std::size_t dropped = 0;
    for (std::size_t l = 0; l < remaining_.size(); ++l) {
      dropped +=
          std::erase_if(remaining_[l], [&](const Item& item) { return priced(item) - cheapest[l] >= room; });
    }
    return dropped > 0;
  }

  // Decides the layers with a choice left one by one.
  void Search() {
    State root;
    int64_t extensions = 0;
    for (std::size_t l = 0; l < remaining_.size(); ++l) {
      if (remaining_[l].size() > 1) {
        order_.push_back(static_cast<int>(l));
        extensions += static_cast<int64_t>(remaining_[l].size());
      } else {
        root.bytes += remaining_[l].front().bytes;
        root.loss += remaining_[l].front().loss;
      }
    }
    const auto width = static_cast<std::size_t>(std::max(kMinWidth, kMaxStates / extensions));
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int a, int b) { return Remaining(a).size() > Remaining(b).size(); });
    rank_.assign(remaining_.size(), -1);
    for (std::size_t s = 0; s < order_.size(); ++s)
      rank_[static_cast<std::size_t>(order_[s])] = static_cast<int>(s);

    std::vector<State> states{root}, next, shifted, merged;
    for (int stage = 0; stage < static_cast<int>(order_.size()) && !states.empty(); ++stage) {
      const Relaxation rest = RestAfter(stage);
      next.clear();
      const Items& items = Remaining(order_[static_cast<std::size_t>(stage)]);
      for (std::size_t i = 0; i < items.size() && best_loss_ > bound_ + rounding_; ++i) {
        Extend(states, items[i], static_cast<int32_t>(i), stage, rest, shifted);
        MergePareto(next, shifted, merged);
        next.swap(merged);
        if (next.size() > 4 * width) Thin(next, width);
      }
      if (next.size() > width) Thin(next, width);
      auto& origins = history_.emplace_back();
      origins.reserve(next.size());
      for (const State& s : next) origins.push_back({s.parent, s.item});
      states.swap(next);
    }
    Adopt();
  }

  // Keeps the `width` states of the best promise and remembers what the others promised. Among equal promises
  // it keeps evenly spread ones.
  void Thin(std::vector<State>& states, std::size_t width) {
    std::vector<double> promises;
    promises.reserve(states.size());
    for (const State& s : states) promises.push_back(s.promise);
    std::nth_element(promises.begin(), promises.begin() + static_cast<std::ptrdiff_t>(width), promises.end());
    const double limit = promises[width];
    forgone_ = std::min(forgone_, limit);
    const auto below = static_cast<std::size_t>(
        std::count_if(states.begin(), states.end(), [&](const State& s) { return s.promise < limit; }));
    const auto equal = static_cast<std::size_t>(
        std::count_if(states.begin(), states.end(), [&](const State& s) { return s.promise == limit; }));
    const std::size_t room = width - below;
    std::size_t seen = 0;
    std::erase_if(states, [&](const State& s) {
      if (s.promise != limit) return s.promise > limit;
      const std::size_t before = seen * room / equal;
      return ++seen * room / equal == before;
    });
  }

  // The states with `item` added that may still lead to something better.
  void Extend(const std::vector<State>& states, const Item& item, int32_t index, int stage,
              const Relaxation& rest, std::vector<State>& out) {
    out.clear();
    int64_t whole = rest.steps();
    for (std::size_t p = 0; p < states.size(); ++p) {
      const int64_t bytes = states[p].bytes + item.bytes;
      const int64_t room = budget_ - bytes;
      if (room < rest.base_bytes()) break;
      while (rest.BytesAfter(whole) > room) --whole;
      const double loss = states[p].loss + item.loss;
      const auto parent = static_cast<int32_t>(p);
      if (loss + rest.LossAfter(whole) < best_loss_ - rounding_) {
        best_loss_ = loss + rest.LossAfter(whole);
        find_ = {stage, parent, index, whole};
      }
      const double promise = loss + rest.Bound(room, whole);
      if (promise >= best_loss_ - rounding_) continue;
      out.push_back({bytes, loss, promise, parent, index});
    }
  }

  // The relaxation of the layers that are undecided after `stage`.
  Relaxation RestAfter(int stage) const {
    int64_t bytes = 0;
    double loss = 0;
    for (std::size_t s = static_cast<std::size_t>(stage) + 1; s < order_.size(); ++s) {
      bytes += Remaining(order_[s]).front().bytes;
      loss += Remaining(order_[s]).front().loss;
    }
    Relaxation rest;
    rest.Clear(bytes, loss);
    for (const Step& step : steps_) {
      if (rank_[static_cast<std::size_t>(step.layer)] > stage) rest.Add(step);
    }
    return rest;
  }

  // Writes the solution that find_ points to into best_.
  void Adopt() {
    if (find_.stage < 0) return;
    for (std::size_t l = 0; l < remaining_.size(); ++l) best_[l] = remaining_[l].front().choice;
    int64_t whole = find_.whole;
    for (const Step& step : steps_) {
      const auto l = static_cast<std::size_t>(step.layer);
      if (rank_[l] <= find_.stage) continue;
      if (whole-- == 0) break;
      best_[l] = hulls_[l][static_cast<std::size_t>(step.to)].choice;
    }
    int32_t item = find_.item, parent = find_.parent;
    for (int stage = find_.stage; stage >= 0; --stage) {
      const int l = order_[static_cast<std::size_t>(stage)];
      best_[static_cast<std::size_t>(l)] = Remaining(l)[static_cast<std::size_t>(item)].choice;
      if (stage == 0) break;
      const Origin& origin = history_[static_cast<std::size_t>(stage) - 1][static_cast<std::size_t>(parent)];
      item = origin.item;
      parent = origin.parent;
    }
    best_loss_ = TotalLoss(layers_, best_);
  }

  const Items& Remaining(int layer) const { return remaining_[static_cast<std::size_t>(layer)]; }

  const std::vector<Items>& layers_;
  const int64_t budget_;
  std::vector<int> best_;
  double best_loss_ = 0;
  double rounding_ = 0;                                      // what sums of losses may be wrong by
  double bound_ = -std::numeric_limits<double>::infinity();  // of the relaxed problem
  std::vector<Items> remaining_;                             // `choice` is the index in layers_
  std::vector<Items> hulls_;                                 // of remaining_
  std::vector<Step> steps_;                                  // of hulls_
  std::vector<int> order_, rank_;                            // layers with a choice; -1: none
  std::vector<std::vector<Origin>> history_;                 // [stage][state]
  Find find_;
  // The best promise that was given up for time; no solution that was not looked at is better.
  double forgone_ = std::numeric_limits<double>::infinity();
};

}  // namespace

std::vector<int> SolveExact(const std::vector<Items>& layers, int64_t budget, double* lower_bound) {
  return Exact(layers, budget).Run(lower_bound);
}

}  // namespace moend
