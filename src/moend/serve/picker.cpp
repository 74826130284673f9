#include "moend/serve/picker.h"

#include <algorithm>
#include <cmath>

namespace moend::serve {

Picked Picker::Pick(std::span<const float> logits) {
  const bool penalties = options_.frequency_penalty != 0 || options_.presence_penalty != 0;
  std::span<const float> view = logits;
  if (penalties || !options_.logit_bias.empty()) {
    adjusted_.assign(logits.begin(), logits.end());
    for (const auto& [token, bias] : options_.logit_bias) adjusted_[static_cast<std::size_t>(token)] += bias;
    for (const auto& [token, count] : counts_)
      adjusted_[static_cast<std::size_t>(token)] -= static_cast<float>(
          options_.frequency_penalty * static_cast<double>(count) + options_.presence_penalty);
    view = adjusted_;
  }
  Picked picked;
  picked.token = sampler_.Sample(view);
  if (penalties) ++counts_[picked.token];
  if (options_.top_logprobs < 0) return picked;

  const float max = *std::ranges::max_element(view);
  double sum = 0;
  for (const float x : view) sum += std::exp(static_cast<double>(x - max));
  const double log_sum = static_cast<double>(max) + std::log(sum);
  const auto logprob = [&](int32_t token) {
    return static_cast<float>(static_cast<double>(view[static_cast<std::size_t>(token)]) - log_sum);
  };
  picked.logprob = logprob(picked.token);
  if (options_.top_logprobs == 0) return picked;
  std::vector<int32_t> order(view.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  const auto n = std::min<std::ptrdiff_t>(options_.top_logprobs, std::ssize(order));
  std::partial_sort(order.begin(), order.begin() + n, order.end(), [&](int32_t a, int32_t b) {
    const float x = view[static_cast<std::size_t>(a)], y = view[static_cast<std::size_t>(b)];
    return x > y || (x == y && a < b);
  });
  for (std::ptrdiff_t i = 0; i < n; ++i)
    picked.top.emplace_back(order[static_cast<std::size_t>(i)], logprob(order[static_cast<std::size_t>(i)]));
  return picked;
}

}  // namespace moend::serve
