// How sure a score is.
#pragma once

#include <cstdint>
#include <span>

namespace moend::eval {

// A mean in [0, 1] with its 95% interval.
struct Estimate {
  double score = 0;
  double low = 0, high = 1;
  int64_t n = 0;  // answers it is the mean of
};

// Wilson's score interval (Wilson 1927) of a mean of n scores in [0, 1]. Scores between 0 and 1 (F1, shares
// of words) enter by their mean alone: their variance is at most mean * (1 - mean), that of right-or-wrong
// scores, so the interval is never too narrow for them. n = 0 gives [0, 1].
Estimate Wilson(double mean, int64_t n);

// Each data set weighs the same, whatever its size. The interval recovers the variances of the parts from
// their own (asymmetric) intervals: low = mean - sqrt(sum((score_i - low_i)^2)) / k, high likewise (MOVER,
// Zou and Donner 2008). Data sets without answers are left out.
Estimate MeanOver(std::span<const Estimate> datasets);

}  // namespace moend::eval
