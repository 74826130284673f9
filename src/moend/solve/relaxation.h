// The continuous relaxation of the multiple-choice knapsack: what remains when a layer may take any mixture
// of two experts. Its optimum is found greedily on the layers' lower convex hulls, and it bounds the optimum
// of the real problem from below (Kellerer, Pferschy, Pisinger 2004, section 11.2).
#pragma once

#include <cstdint>
#include <vector>

#include "moend/solve/solve.h"

namespace moend {

struct Item {
  int64_t bytes = 0;
  double loss = 0;
  int choice = 0;  // index in the caller's list
};
using Items = std::vector<Item>;  // of one layer

// Without the choices that another one equals or beats in both bytes and loss: bytes ascend strictly, losses
// descend strictly.
Items Undominated(const std::vector<Choice>& choices);

// The corners of the lower convex hull of undominated items: the loss saved per byte falls strictly.
Items LowerHull(const Items& undominated);

// From one corner of a layer's hull to the next.
struct Step {
  int64_t bytes = 0;  // more
  double gain = 0;    // less loss
  int layer = 0;
  int to = 0;  // index in the layer's hull
  double rate() const { return gain / static_cast<double>(bytes); }
};

// All steps, the largest gain per byte first; the steps of one layer stay in their order.
std::vector<Step> SortedSteps(const std::vector<Items>& hulls);

// Prefix sums over sorted steps: the relaxed optimum for any number of bytes.
class Relaxation {
 public:
  void Clear(int64_t base_bytes, double base_loss);  // the cheapest corner of every layer
  void Add(const Step& step);                        // in the order of SortedSteps

  int64_t base_bytes() const { return base_bytes_; }
  int64_t steps() const { return static_cast<int64_t>(bytes_.size()) - 1; }

  // Loss when the first `whole` steps are taken, and their bytes.
  double LossAfter(int64_t whole) const { return loss_[static_cast<std::size_t>(whole)]; }
  int64_t BytesAfter(int64_t whole) const { return bytes_[static_cast<std::size_t>(whole)]; }
  // Loss saved per byte by the step after the first `whole` ones; 0 behind the last.
  double RateAfter(int64_t whole) const;

  // How many steps fit into `budget` >= base_bytes() one after the other.
  int64_t WholeSteps(int64_t budget) const;
  // The relaxed optimum, where whole = WholeSteps(budget).
  double Bound(int64_t budget, int64_t whole) const {
    return LossAfter(whole) - static_cast<double>(budget - BytesAfter(whole)) * RateAfter(whole);
  }

 private:
  int64_t base_bytes_ = 0;
  std::vector<int64_t> bytes_{0};
  std::vector<double> loss_{0}, rate_;
};

// The relaxation of the whole problem.
Relaxation Relax(const std::vector<Items>& hulls, const std::vector<Step>& steps);

}  // namespace moend
