#include "moend/engine/repetition.h"

#include <algorithm>
#include <cmath>
#include <string_view>

#include "moend/base/half.h"

namespace moend {
namespace {

constexpr std::string_view kAskForAll = "\n\nRepeat the previous text exactly:\n\n";
// The tokens before the part stand between the two, so that the model knows where it is to begin.
constexpr std::string_view kAskForPart = "\n\nRepeat the part of the previous text that follows \"";
constexpr std::string_view kAskEnd = "\" exactly:\n\n";
constexpr int64_t kCue = 8;  // of these tokens

// 1 / |x|^2 of each of `n` rows.
void InverseSquares(const float* rows, int64_t n, int64_t width, std::vector<float>& to) {
  to.resize(static_cast<std::size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    double square = 0;
    for (int64_t c = 0; c < width; ++c) square += double{rows[i * width + c]} * rows[i * width + c];
    to[static_cast<std::size_t>(i)] = static_cast<float>(1 / std::max(square, 1e-30));
  }
}

// A few tokens have a residual stream a thousand times as long as the others, so no mean.
float Median(std::vector<float> x) {
  const auto middle = x.begin() + std::ssize(x) / 2;
  std::nth_element(x.begin(), middle, x.end());
  return *middle;
}

// v' gram v of each token of kv.
void ScaleByValues(const DenseView& kv, const float* gram, float scale, float* needed) {
  const int64_t d = kv.head_size;
  std::vector<float> v(static_cast<std::size_t>(d)), product(v.size());
  for (int64_t t = 0; t < kv.n_tokens; ++t) {
    for (int64_t c = 0; c < d; ++c) v[static_cast<std::size_t>(c)] = HalfToFloat(kv.v[t * d + c]);
    std::ranges::fill(product, 0.0f);
    // Row by row, so that the compiler makes vectors of it.
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < d; ++j)
        product[static_cast<std::size_t>(j)] += v[static_cast<std::size_t>(i)] * gram[i * d + j];
    float square = 0;
    for (std::size_t c = 0; c < v.size(); ++c) square += product[c] * v[c];
    needed[t] *= scale * std::max(square, 0.0f);
  }
}

}  // namespace

Expected<std::vector<int32_t>> AskForPart(const Model& model, std::span<const int32_t> context, int64_t begin,
                                          int64_t n) {
  std::vector<int32_t> tokens;
  const auto add = [&](std::span<const int32_t> more) {
    tokens.insert(tokens.end(), more.begin(), more.end());
  };
  if (model.has_tokenizer()) {
    const auto text = [&](std::string_view said) { return model.tokenizer().Tokenize(said, false, false); };
    const int64_t cue = std::min(kCue, begin);
    MOEND_ASSIGN(const auto ask, text(begin == 0 ? kAskForAll : kAskForPart));
    add(ask);
    add(context.subspan(static_cast<std::size_t>(begin - cue), static_cast<std::size_t>(cue)));
    if (begin > 0) {
      MOEND_ASSIGN(const auto end, text(kAskEnd));
      add(end);
    }
  }
  add(context.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(n)));
  return tokens;
}

int64_t Repetition::MostBytes(const HyperParams& hp, int n_threads, int64_t n) {
  // No token is shorter than a byte, but for a space that a tokenizer may put in front of a text.
  constexpr int64_t kAsk =
      std::max(std::ssize(kAskForAll) + 1, std::ssize(kAskForPart) + kCue + std::ssize(kAskEnd) + 2);
  constexpr int64_t kFloat = sizeof(float);
  const int64_t parts = (n + kRepeatedTokens - 1) / kRepeatedTokens;
  return RoundUp((n + parts * kAsk) * hp.n_embd * kFloat, kCacheLine) +
         LayerScratch::Bytes({hp.n_kv_heads, hp.head_size}, hp.n_heads, std::min(n, kRepeatedTokens) + kAsk,
                             0, ScorerNeeds(), hp.state_floats()) +
         n_threads *
             (RoundUp(hp.n_kv_heads * n * kFloat, kCacheLine) +
              RoundUp(PrefillHook::PageMaximaFloats(hp.n_heads / hp.n_kv_heads, n) * kFloat, kCacheLine));
}

Expected<Repetition> Repetition::Create(Compute& compute, std::shared_ptr<Ledger> ledger,
                                        std::span<const int32_t> context) {
  const HyperParams& hp = compute.model().hparams();
  Repetition r;
  r.compute_ = &compute;
  r.n_context_ = static_cast<int64_t>(context.size());
  std::vector<int32_t> tokens;
  int64_t longest = 0;
  for (int64_t begin = 0; begin < r.n_context_; begin += kRepeatedTokens) {
    MOEND_ASSIGN(const auto part, AskForPart(compute.model(), context, begin,
                                             std::min(kRepeatedTokens, r.n_context_ - begin)));
    r.parts_.push_back({std::ssize(tokens), std::ssize(part)});
    tokens.insert(tokens.end(), part.begin(), part.end());
    longest = std::max<int64_t>(longest, std::ssize(part));
  }
  r.tokens_ = static_cast<int64_t>(tokens.size());
  r.ids_ = tokens;
  MOEND_ASSIGN(r.hidden_, Buffer<float>::Create(ledger, r.tokens_ * hp.n_embd));
  MOEND_ASSIGN(r.scratch_, LayerScratch::Create(ledger, {hp.n_kv_heads, hp.head_size}, hp.n_heads, longest, 0,
                                                ScorerNeeds(), hp.state_floats()));
  MOEND_TRY(compute.Embed(tokens, r.hidden_.data()));
  r.on_device_ = Compute::OnDevice(compute, r.states());
  return r;
}

Expected<void> Repetition::Layer(int64_t layer, LayerScratch& context, std::span<const float> grams,
                                 PrefillHook& hook, const std::function<bool()>& go_on) {
  const int64_t n_embd = compute_->model().hparams().n_embd;
  MOEND_TRY(compute_->Fetch(states()));
  InverseSquares(hidden_.data(), tokens_, n_embd, weights_);
  const float before = Median(weights_);
  for (const Part& part : parts_) {
    scratch_.Clear();
    MOEND_TRY(hook.BeginRepetition(&context, &scratch_, part.begin, weights_));
    for (int64_t done = 0; done < part.tokens; done += compute_->block_tokens()) {
      const int64_t m = std::min(compute_->block_tokens(), part.tokens - done);
      MOEND_TRY(
          compute_->Layer(layer, hidden_.data() + (part.begin + done) * n_embd, m, n_context_ + done, hook));
      if (go_on && !go_on()) return Fail(ErrorCode::kCancelled, "reading the prompt was stopped");
    }
    hook.EndRepetition();
  }
  // Tokens are weighed by what enters the layer, since their attention comes first; layers by what leaves
  // them: what enters the first one is small, and what it makes of it large.
  if (grams.empty()) return {};
  MOEND_TRY(compute_->Fetch(states()));
  InverseSquares(hidden_.data(), tokens_, n_embd, weights_);
  const float scale = Median(weights_) / before;
  context.ScaleReference(scale);
  const KvShape& shape = context.shape();
  return compute_->ParallelFor(shape.n_kv_heads, [&](int64_t h, int) {
    ScaleByValues(context.view(h, n_context_), grams.data() + h * shape.head_size * shape.head_size, scale,
                  context.needed(h));
  });
}

Expected<double> Repetition::CopyLoss() {
  constexpr int64_t kRows = 32;  // of a part
  const HyperParams& hp = compute_->model().hparams();
  std::vector<float> rows, logits(static_cast<std::size_t>(kRows * hp.n_vocab));
  MOEND_TRY(compute_->Fetch(states()));
  double sum = 0;
  int64_t n = 0;
  for (const Part& part : parts_) {
    const int64_t half = part.tokens / 2, count = std::min(kRows, half - 1);
    if (count < 1) continue;
    rows.clear();
    std::vector<int32_t> next;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = part.begin + half + i * (half - 1) / count;
      rows.insert(rows.end(), hidden_.data() + at * hp.n_embd, hidden_.data() + (at + 1) * hp.n_embd);
      next.push_back(ids_[static_cast<std::size_t>(at + 1)]);
    }
    MOEND_TRY(compute_->Head(rows.data(), count, logits.data()));
    for (int64_t i = 0; i < count; ++i) {
      const float* row = logits.data() + i * hp.n_vocab;
      const double most = *std::max_element(row, row + hp.n_vocab);
      double total = 0;
      for (int64_t v = 0; v < hp.n_vocab; ++v) total += std::exp(row[v] - most);
      sum += most + std::log(total) - row[next[static_cast<std::size_t>(i)]];
    }
    n += count;
  }
  return n > 0 ? sum / static_cast<double>(n) : 0;
}

}  // namespace moend
