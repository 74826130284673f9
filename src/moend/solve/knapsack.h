// The three solvers behind SolveKnapsack. Every layer's items are undominated, cheapest first, and the
// cheapest ones together fit the budget. A solution is an index into each layer's items.
#pragma once

#include <cstdint>
#include <vector>

#include "moend/solve/relaxation.h"

namespace moend {

std::vector<int> SolveGreedy(const std::vector<Items>& layers, int64_t budget);
std::vector<int> SolveHull(const std::vector<Items>& layers, int64_t budget);

// Sets *lower_bound to the loss of the solution when that is proven to be the smallest (up to a relative
// rounding of 1e-12), else to the best bound that was proven.
std::vector<int> SolveExact(const std::vector<Items>& layers, int64_t budget, double* lower_bound);

// Spends what is left of the budget: again and again the one upgrade that saves most loss and fits.
void FillUp(const std::vector<Items>& layers, int64_t budget, std::vector<int>& chosen);

int64_t TotalBytes(const std::vector<Items>& layers, const std::vector<int>& chosen);
double TotalLoss(const std::vector<Items>& layers, const std::vector<int>& chosen);

}  // namespace moend
