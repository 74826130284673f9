#include "moend/engine/prefill_hook.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "moend/engine/repetition.h"
#include "moend/model/rope.h"

namespace moend {
namespace {

// Tokens of one work item: enough rows to amortize the unpacking of a K/V page, few enough to balance
// threads.
constexpr int64_t kItemTokens = 32;

// About as many tokens ask for a repetition.
constexpr int64_t kAskTokens = 16;

// A query of a repetition attends to those pages of the context where a token gets more than this part of
// what it would get if all got the same; at most as much of its attention is lost in all, and hardly ever a
// tenth of that.
constexpr float kSeldom = 0.25f;

}  // namespace

PrefillHook::PrefillHook(std::shared_ptr<const Model> model)
    : model_(std::move(model)),
      shape_{model_->hparams().n_kv_heads, model_->hparams().head_size},
      n_heads_(model_->hparams().n_heads),
      group_(n_heads_ / shape_.n_kv_heads) {}

Expected<std::unique_ptr<PrefillHook>> PrefillHook::Create(std::shared_ptr<const Model> model, int n_threads,
                                                           int64_t block_tokens) {
  const HyperParams& hp = model->hparams();
  std::unique_ptr<PrefillHook> hook(new PrefillHook(model));
  hook->out_.resize(static_cast<std::size_t>(block_tokens * hp.n_heads * hp.head_size));
  hook->workers_.resize(static_cast<std::size_t>(n_threads));
  const int64_t rows = kItemTokens * hook->group_;
  for (Worker& w : hook->workers_) {
    w.q.resize(static_cast<std::size_t>(rows * hp.head_size));
    w.state.resize(static_cast<std::size_t>(rows * (hp.head_size + 2)));
    w.weight.resize(static_cast<std::size_t>(rows));
    w.least.resize(static_cast<std::size_t>(rows));
    MOEND_ASSIGN(w.workspace, Buffer<float>::Create(nullptr, WorkspaceFloats(hp.head_size, rows)));
  }
  return hook;
}

Expected<void> PrefillHook::Begin(std::span<const LayerCache> past, LayerScratch* scratch) {
  past_ = past;
  if (!past.empty() && past[0].tokens_seen() == 0) past_ = {};
  scratch_ = scratch;
  context_ = nullptr;
  DropSums();
  if (!scratch->accumulated(0)) return {};
  const int64_t sums = shape_.n_kv_heads * scratch->score_tokens();
  for (Worker& w : workers_) {
    MOEND_ASSIGN(w.accumulated, Buffer<float>::Create(scratch->ledger(), sums));
    std::fill_n(w.accumulated.data(), sums, 0.0f);
  }
  return {};
}

Expected<void> PrefillHook::BeginRepetition(LayerScratch* context, LayerScratch* part, int64_t index,
                                            std::span<const float> weights) {
  MOEND_TRY(Begin({}, part));
  const int64_t n = shape_.n_kv_heads * context->n_tokens();
  for (Worker& w : workers_) {
    MOEND_ASSIGN(w.squares, Buffer<float>::Create(context->ledger(), n));
    MOEND_ASSIGN(w.page_maxima,
                 Buffer<float>::Create(context->ledger(), PageMaximaFloats(group_, context->n_tokens())));
    std::fill_n(w.squares.data(), n, 0.0f);
  }
  std::ranges::copy(context->state(), part->state().begin());
  context_ = context;
  index_ = index;
  weights_ = weights;
  return {};
}

int64_t PrefillHook::PageMaximaFloats(int64_t group, int64_t tokens) {
  return (tokens + kPageTokens - 1) / kPageTokens * kItemTokens * group;
}

void PrefillHook::DropSums() {
  for (Worker& w : workers_) w.accumulated = {}, w.squares = {}, w.page_maxima = {};
}

void PrefillHook::EndRepetition() {
  const int64_t n = context_->n_tokens();
  for (int64_t h = 0; h < shape_.n_kv_heads; ++h) {
    float* needed = context_->needed(h);
    for (const Worker& w : workers_)
      for (int64_t t = 0; t < n; ++t) needed[t] += w.squares[h * n + t];
  }
  DropSums();
}

void PrefillHook::EndAccumulation() {
  for (int64_t h = 0; h < shape_.n_kv_heads; ++h) {
    float* sums = scratch_->accumulated(h);
    if (!sums) return;
    const int64_t n = scratch_->score_tokens();
    for (const Worker& w : workers_)
      for (int64_t t = 0; t < n; ++t) sums[t] += w.accumulated[h * n + t];
  }
  DropSums();
}

void PrefillHook::Store(int64_t layer, const float* q, const float* k, const float* v, int64_t n) {
  StoreApart(layer, q, k, v, n, {});
}

void PrefillHook::StoreApart(int64_t layer, const float* q, const float* k, const float* v, int64_t n,
                             const Each& each) {
  style_ = model_->Style(layer);
  first_ = scratch_->n_tokens();
  scratch_->Append(q, k, v, n, style_, each);
  if (context_ && style_.window == 0)
    context_->Refer(q, weights_.data() + index_ + first_, index_ + first_, n, std::ssize(weights_));
  else if (!context_ && style_.window == 0)
    ReferOwn(layer, q, n);
  next_.store(0, std::memory_order_relaxed);
}

std::optional<AttentionHook::OwnTokens> PrefillHook::SeesOnlyOwn(int64_t n) const {
  if (!past_.empty() || context_ || workers_[0].accumulated.size() > 0) return std::nullopt;
  return OwnTokens{scratch_->n_tokens(), scratch_->capacity(), scratch_->WantsQueries(n)};
}

void PrefillHook::LoadStates(int64_t layer, float* states, int64_t) {
  const int64_t n = model_->hparams().layers[static_cast<std::size_t>(layer)].delta_net.state_floats();
  std::copy_n(scratch_->state().data(), n, states);
}

void PrefillHook::StoreStates(int64_t layer, const float* states, int64_t) {
  const int64_t n = model_->hparams().layers[static_cast<std::size_t>(layer)].delta_net.state_floats();
  std::copy_n(states, n, scratch_->state().data());
}

void PrefillHook::ReferOwn(int64_t layer, const float* q, int64_t n) {
  const int64_t d = shape_.head_size, total = scratch_->score_tokens();
  std::vector<float> turned(static_cast<std::size_t>(n_heads_ * d));
  std::vector<RopePair> turns;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t t = first_ + i;
    if (!scratch_->RefersTo(t)) continue;
    if (turns.empty()) turns = RopePairs(*model_, layer);
    const float* from = q + i * n_heads_ * d;
    std::copy_n(from, n_heads_ * d, turned.begin());
    for (const RopePair& turn : turns) {
      const double angle = turn.rate * static_cast<double>(total + kAskTokens + t % kRepeatedTokens - t);
      const double cosine = std::cos(angle), sine = std::sin(angle);
      for (int64_t h = 0; h < n_heads_; ++h) {
        const double x = from[h * d + turn.first], y = from[h * d + turn.second];
        turned[static_cast<std::size_t>(h * d + turn.first)] = static_cast<float>(x * cosine - y * sine);
        turned[static_cast<std::size_t>(h * d + turn.second)] = static_cast<float>(x * sine + y * cosine);
      }
    }
    scratch_->ReferOwn(turned.data(), style_);
  }
}

void PrefillHook::Attend(int64_t, const float* q, int64_t n, int thread, int) {
  const int64_t d = shape_.head_size;
  const int64_t chunks = (n + kItemTokens - 1) / kItemTokens;
  Worker& w = workers_[static_cast<std::size_t>(thread)];
  for (int64_t item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < chunks * shape_.n_kv_heads;) {
    // The last chunks see most tokens: they go first so that no thread starts a long item at the end.
    const int64_t head = item % shape_.n_kv_heads;
    const int64_t begin = (chunks - 1 - item / shape_.n_kv_heads) * kItemTokens;
    const int64_t tokens = std::min(kItemTokens, n - begin), rows = tokens * group_;
    for (int64_t i = 0; i < tokens; ++i) {
      const float* from = q + ((begin + i) * n_heads_ + head * group_) * d;
      float* to = w.q.data() + i * group_ * d;
      for (int64_t c = 0; c < group_ * d; ++c) to[c] = from[c] * style_.scale;
    }
    const QueryRows query = style_.Rows(w.q.data(), rows, group_, head);
    const SoftmaxState state{w.state.data() + 2 * rows, w.state.data(), w.state.data() + rows};
    InitState(state, query, d);
    const int64_t first = first_ + begin;
    if (!past_.empty()) {
      const StreamView past = past_[static_cast<std::size_t>(head)].view(0);
      QueryRows behind = query;
      behind.behind = first + 1;
      simd::AttendStream(past, 0, past.n_pages, true, behind, state, w.workspace.data());
    }
    if (context_ && style_.window > 0)  // right behind whose tokens the part's are
      simd::AttendCausal(context_->view(head, context_->n_tokens()), context_->n_tokens() + first, query,
                         state, w.workspace.data());
    const DenseView kv = scratch_->view(head, first + tokens);
    simd::AttendCausal(kv, first, query, state, w.workspace.data());
    // What a sliding layer's tokens receive nobody asks: it keeps its window, whatever that is.
    if (style_.window == 0) {
      if (w.accumulated.size() > 0) Accumulate(w, head, first, query, state.max, state.sum);
      if (context_) AttendContext(w, head, first, query, state);
    }
    simd::Finish(state, rows, d);
    for (int64_t i = 0; i < tokens; ++i)
      std::memcpy(out_.data() + ((begin + i) * n_heads_ + head * group_) * d, state.out + i * group_ * d,
                  static_cast<std::size_t>(group_ * d) * sizeof(float));
  }
}

void PrefillHook::Accumulate(Worker& w, int64_t head, int64_t first, const QueryRows& q, const float* max,
                             const float* sum) {
  const int64_t scored = scratch_->score_tokens();
  if (first >= scored) return;
  const int64_t tokens = std::min(q.rows / q.group, scored - first);
  QueryRows counted = q;
  counted.rows = tokens * q.group;
  simd::ColumnSumsCausal(scratch_->view(head, first + tokens), first, 0, first + tokens, counted, max, sum,
                         w.accumulated.data() + head * scored, w.workspace.data());
}

void PrefillHook::AttendContext(Worker& w, int64_t head, int64_t part_token, const QueryRows& q,
                                SoftmaxState state) {
  const int64_t n = context_->n_tokens();
  const DenseView kv = context_->view(head, n);
  float *most = w.page_maxima.data(), *least = w.least.data(), *workspace = w.workspace.data();
  simd::PageMaxima(kv, q, most, workspace);
  const float part = kSeldom / static_cast<float>(n);
  simd::ChoosePages(most, (n + kPageTokens - 1) / kPageTokens, q.rows, state, part, least);
  const ChosenPages chosen{most, least};
  simd::AttendChosen(kv, q, chosen, state, workspace);
  if (!context_->asks_for(head)) return;
  for (int64_t r = 0; r < q.rows; ++r) {
    w.weight[static_cast<std::size_t>(r)] =
        weights_[static_cast<std::size_t>(index_ + part_token + r / group_)];
    // As before, but now that the sum is known.
    least[r] = std::max(least[r], state.max[r] + std::log(state.sum[r] * part));
  }
  simd::ColumnSquaresChosen(kv, q, chosen, state.max, state.sum, w.weight.data(), w.squares.data() + head * n,
                            workspace);
}

void PrefillHook::Combine(int64_t, float* out, int64_t n, int thread, int n_threads) {
  const int64_t row = n_heads_ * shape_.head_size;
  const int64_t begin = n * thread / n_threads, end = n * (thread + 1) / n_threads;
  std::memcpy(out + begin * row, out_.data() + begin * row,
              static_cast<std::size_t>((end - begin) * row) * sizeof(float));
}

}  // namespace moend
