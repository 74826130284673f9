#include "moend/serve/picker.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <unordered_set>

namespace moend::serve {

Picker::Picker(const PickOptions& options, std::span<const int32_t> ends, std::span<const int32_t> prompt)
    : options_(options), ends_(ends), sampler_(options.sampler) {
  if (options_.repeat_penalty != 1) history_.assign(prompt.begin(), prompt.end());
}

bool Picker::Ends(int32_t token) const {
  return std::ranges::find(ends_, token) != ends_.end() ||
         std::ranges::find(options_.stop_tokens, token) != options_.stop_tokens.end();
}

void Picker::Adjust(std::span<const float> logits) {
  adjusted_.assign(logits.begin(), logits.end());
  const auto at = [&](int32_t token) -> float& { return adjusted_[static_cast<std::size_t>(token)]; };
  for (const auto& [token, bias] : options_.logit_bias) at(token) += bias;
  if (options_.repeat_penalty != 1) {
    const auto n =
        options_.repeat_last_n < 0 ? history_.size() : static_cast<std::size_t>(options_.repeat_last_n);
    const auto recent = std::span(history_).last(std::min(n, history_.size()));
    for (const int32_t token : std::unordered_set<int32_t>(recent.begin(), recent.end()))
      at(token) *= static_cast<float>(at(token) > 0 ? 1 / options_.repeat_penalty : options_.repeat_penalty);
  }
  for (const auto& [token, count] : counts_)
    at(token) -= static_cast<float>(options_.frequency_penalty * static_cast<double>(count) +
                                    options_.presence_penalty);
  const bool early = picked_ < options_.min_tokens;
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  if (options_.ignore_eos || early)
    for (const int32_t token : ends_) at(token) = kNever;
  if (early)
    for (const int32_t token : options_.stop_tokens) at(token) = kNever;
}

std::span<const float> Picker::View(std::span<const float> logits) {
  const bool penalties = options_.frequency_penalty != 0 || options_.presence_penalty != 0;
  if (!penalties && options_.logit_bias.empty() && options_.repeat_penalty == 1 && !options_.ignore_eos &&
      picked_ >= options_.min_tokens)
    return logits;
  Adjust(logits);
  return adjusted_;
}

Picked Picker::Pick(std::span<const float> logits) {
  const auto view = View(logits);
  return Report(view, sampler_.Sample(view));
}

Expected<Picked> Picker::Pick(std::span<const float> logits, Grammar& grammar) {
  const auto view = View(logits);
  MOEND_ASSIGN(std::optional<int32_t> token, SampleAllowed(sampler_, grammar, view));
  if (!token) {
    // Perhaps only the end is left, and was held back (ignore_eos, min_tokens).
    MOEND_ASSIGN(const auto allowed, grammar.Allows(ends_));
    const auto end = std::ranges::find(allowed, true);
    if (end == allowed.end())
      return Fail(ErrorCode::kInvalidArgument, "the grammar allows no token that this request allows");
    token = ends_[static_cast<std::size_t>(end - allowed.begin())];
  }
  if (!Ends(*token)) grammar.Accept(*token);
  return Report(view, *token);
}

Picked Picker::Report(std::span<const float> view, int32_t token) {
  Picked picked;
  picked.token = token;
  ++picked_;
  if (options_.frequency_penalty != 0 || options_.presence_penalty != 0) ++counts_[token];
  if (options_.repeat_penalty != 1) history_.push_back(token);
  if (options_.top_logprobs < 0) return picked;

  const float max = *std::ranges::max_element(view);
  double sum = 0;
  for (const float x : view) sum += std::exp(static_cast<double>(x - max));
  const double log_sum = static_cast<double>(max) + std::log(sum);
  const auto logprob = [&](int32_t t) {
    // As OpenAI writes what cannot be: JSON has no infinity.
    constexpr double kLowest = -9999;
    return static_cast<float>(
        std::max(kLowest, static_cast<double>(view[static_cast<std::size_t>(t)]) - log_sum));
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
