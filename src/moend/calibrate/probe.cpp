#include "moend/calibrate/probe.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "moend/calibrate/query_tap.h"

namespace moend {
namespace {

// Of packed caches kept for further plans; beyond it they are packed again when they are wanted.
constexpr int64_t kKeptBytes = int64_t{512} << 20;

double SquaredNorm(const std::vector<float>& x) {
  return std::transform_reduce(x.begin(), x.end(), 0.0, std::plus<>(), [](float v) { return double{v} * v; });
}

// KL(softmax(p) || softmax(q)) in nats.
double KlDivergence(const float* p, const float* q, int64_t n) {
  const float p_max = *std::max_element(p, p + n), q_max = *std::max_element(q, q + n);
  double p_sum = 0, q_sum = 0, cross = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double e = std::exp(double{p[i]} - p_max);
    p_sum += e;
    q_sum += std::exp(double{q[i]} - q_max);
    cross += e * (double{p[i]} - q[i]);
  }
  const double kl = cross / p_sum - (p_max + std::log(p_sum)) + (q_max + std::log(q_sum));
  return kl < 0 ? 0 : kl;  // rounding; what is no number stays so
}

// 16 bit and every token: the full cache itself.
bool IsFull(std::span<const Expert> heads) {
  return std::all_of(heads.begin(), heads.end(), [](const Expert& e) { return e == Expert{}; });
}

}  // namespace

Probe::Probe(Engine::Impl& machine, const Scorer& scorer, const Protected& guard)
    : machine_(machine), hp_(machine.model->hparams()), scorer_(&scorer), guard_(guard) {}

void Probe::Use(const Scorer& scorer) {
  scorer_ = &scorer;
  for (auto& scores : scores_) scores.clear();
  caches_.clear();
  last_plan_.clear();
}

Expected<void> Probe::Read(std::span<const int32_t> tokens, int64_t tail_tokens, const Progress& tick) {
  const auto n = static_cast<int64_t>(tokens.size());
  tail_ = std::min(tail_tokens, n / 2);
  context_ = n - tail_;
  layers_.clear();
  inputs_.clear();
  attention_.clear();
  caches_.clear();
  last_plan_.clear();
  tail_scratch_.reset();
  scores_.assign(static_cast<std::size_t>(hp_.n_layers), {});
  QueryTap tap(*machine_.model, *machine_.prefill);
  Compute& compute = *machine_.compute;
  MOEND_ASSIGN(auto hidden, Buffer<float>::Create(nullptr, n * hp_.n_embd));
  MOEND_TRY(compute.Embed(tokens, hidden.data()));
  float* tail = hidden.data() + context_ * hp_.n_embd;
  std::optional<Repetition> repetition;
  if (scorer_->needs().repetition) {
    MOEND_ASSIGN(repetition,
                 Repetition::Create(compute, nullptr, tokens.first(static_cast<std::size_t>(context_))));
  }
  for (int64_t l = 0; l < hp_.n_layers; ++l) {
    MOEND_ASSIGN(auto scratch, LayerScratch::Create(nullptr, {hp_.n_kv_heads, hp_.head_size}, hp_.n_heads, n,
                                                    context_, scorer_->needs(), hp_.state_floats()));
    layers_.push_back(std::move(scratch));
    MOEND_TRY(machine_.prefill->Begin({}, &layers_.back()));
    tap.BeginLayer();
    for (int64_t at = 0; at < context_; at += compute.block_tokens()) {
      const int64_t m = std::min(compute.block_tokens(), context_ - at);
      MOEND_TRY(compute.Layer(l, hidden.data() + at * hp_.n_embd, m, at, tap));
    }
    machine_.prefill->EndAccumulation();
    if (repetition) {
      const bool full = hp_.layers[static_cast<std::size_t>(l)].compresses();
      const auto grams = full ? machine_.ValueGrams(l) : std::span<const float>();
      MOEND_TRY(repetition->Layer(l, layers_.back(), grams, *machine_.prefill, {}));
    }
    MOEND_TRY(layers_.back().KeepState());
    MOEND_TRY(machine_.prefill->Begin({}, &layers_.back()));
    inputs_.emplace_back(tail, tail + tail_ * hp_.n_embd);
    MOEND_ASSIGN(auto attention, RunTail(l, tail, true, tap));
    attention_.push_back(std::move(attention));
    if (tick && !tick(static_cast<double>(l + 1) / static_cast<double>(hp_.n_layers)))
      return Fail(ErrorCode::kCancelled, "reading the text was stopped");
  }
  queries_ = tap.Take();
  logits_.resize(static_cast<std::size_t>(tail_ * hp_.n_vocab));
  return compute.Head(tail, tail_, logits_.data());
}

Expected<std::vector<float>> Probe::RunTail(int64_t layer, float* hidden, bool want_attention,
                                            AttentionHook& hook) {
  const int64_t width = hp_.n_heads * hp_.head_size;
  std::vector<float> attention(want_attention ? static_cast<std::size_t>(tail_ * width) : 0);
  const int64_t block = machine_.compute->block_tokens();
  for (int64_t at = 0; at < tail_; at += block) {
    const int64_t m = std::min(block, tail_ - at);
    MOEND_TRY(machine_.compute->Layer(layer, hidden + at * hp_.n_embd, m, context_ + at, hook,
                                      want_attention ? attention.data() + at * width : nullptr));
  }
  return attention;
}

Expected<LayerScratch*> Probe::EmptyTail() {
  if (!tail_scratch_) {
    MOEND_ASSIGN(auto scratch, LayerScratch::Create(nullptr, {hp_.n_kv_heads, hp_.head_size}, hp_.n_heads,
                                                    tail_, 0, {}, 0));
    tail_scratch_ = std::make_unique<LayerScratch>(std::move(scratch));
  }
  tail_scratch_->Clear();
  return tail_scratch_.get();
}

Expected<const std::vector<std::vector<float>>*> Probe::Scores(int64_t layer) {
  const auto li = static_cast<std::size_t>(layer);
  if (scores_[li].empty()) {
    const LayerScorer scorer(scorer_->of_layer(layer),
                             model_ ? model_->layer(layer) : std::span<const HeadQueries>());
    MOEND_ASSIGN(scores_[li], ScoreScratch(*machine_.compute, layers_[li], context_, scorer));
  }
  return &scores_[li];
}

Expected<std::vector<double>> Probe::TailKl(const std::vector<float>& hidden) {
  measured_.resize(logits_.size());
  MOEND_TRY(machine_.compute->Head(hidden.data(), tail_, measured_.data()));
  std::vector<double> kl(static_cast<std::size_t>(tail_));
  MOEND_TRY(machine_.compute->ParallelFor(tail_, [&](int64_t i, int) {
    const int64_t at = i * hp_.n_vocab;
    kl[static_cast<std::size_t>(i)] = KlDivergence(logits_.data() + at, measured_.data() + at, hp_.n_vocab);
  }));
  if (!std::all_of(kl.begin(), kl.end(), [](double x) { return std::isfinite(x); }))
    return Fail(ErrorCode::kInternal, "a KL divergence between logits is no number");
  return kl;
}

Expected<ProfileCell> Probe::MeasureLayer(int64_t layer, std::span<const Expert> heads) {
  const auto li = static_cast<std::size_t>(layer);
  ProfileCell cell;
  if (IsFull(heads)) return cell;
  if (!hp_.layers[li].compresses())
    return Fail(ErrorCode::kInvalidArgument, "layer {} slides or holds a state: it is not compressed", layer);
  MOEND_ASSIGN(const auto* scores, Scores(layer));
  MOEND_ASSIGN(const auto rotations, machine_.Rotations(layer));
  MOEND_ASSIGN(const auto caches,
               CompressScratch(*machine_.compute, std::make_shared<Ledger>(), layers_[li], context_, heads,
                               guard_, rotations, scorer_->of_layer(layer), scores));
  std::vector<float> hidden = inputs_[li];
  MOEND_ASSIGN(LayerScratch* const tail, EmptyTail());
  MOEND_TRY(machine_.prefill->Begin(caches, tail));
  MOEND_ASSIGN(const auto attention, RunTail(layer, hidden.data(), true, *machine_.prefill));
  double error = 0;
  for (std::size_t i = 0; i < attention.size(); ++i) {
    const double d = double{attention[i]} - attention_[li][i];
    error += d * d;
  }
  if (!std::isfinite(error))
    return Fail(ErrorCode::kInternal, "the attention of layer {} is no number once its cache is compressed",
                layer);
  const double norm = SquaredNorm(attention_[li]);
  cell.l2 = norm > 0 ? std::sqrt(error / norm) : 0;
  for (int64_t l = layer + 1; l < hp_.n_layers; ++l) {
    LayerScratch& scratch = layers_[static_cast<std::size_t>(l)];
    scratch.Truncate(context_);
    MOEND_TRY(machine_.prefill->Begin({}, &scratch));
    MOEND_TRY(RunTail(l, hidden.data(), false, *machine_.prefill));
  }
  MOEND_ASSIGN(const auto kl, TailKl(hidden));
  cell.kl = std::accumulate(kl.begin(), kl.end(), 0.0) / static_cast<double>(tail_);
  return cell;
}

Expected<std::vector<LayerCache>> Probe::TakeCaches(int64_t layer, std::span<const Expert> heads) {
  const auto n = static_cast<int64_t>(heads.size());
  const auto kept = [&](int64_t h) {
    return caches_.find({layer * n + h, heads[static_cast<std::size_t>(h)]});
  };
  bool all = true;
  for (int64_t h = 0; h < n; ++h) all = all && kept(h) != caches_.end();
  std::vector<LayerCache> taken;
  if (all) {
    for (int64_t h = 0; h < n; ++h) {
      auto it = kept(h);
      taken.push_back(std::move(it->second));
      caches_.erase(it);
    }
    return taken;
  }
  MOEND_ASSIGN(const auto* scores, Scores(layer));
  MOEND_ASSIGN(const auto rotations, machine_.Rotations(layer));
  return CompressScratch(*machine_.compute, ledger_, layers_[static_cast<std::size_t>(layer)], context_,
                         heads, guard_, rotations, scorer_->of_layer(layer), scores);
}

void Probe::KeepCaches(int64_t layer, std::span<const Expert> heads, std::vector<LayerCache> caches) {
  if (ledger_->live() > kKeptBytes) {
    caches_.clear();
    return;
  }
  const auto n = static_cast<int64_t>(heads.size());
  for (int64_t h = 0; h < n; ++h)
    caches_.insert_or_assign({layer * n + h, heads[static_cast<std::size_t>(h)]},
                             std::move(caches[static_cast<std::size_t>(h)]));
}

Expected<std::vector<double>> Probe::MeasurePlan(std::span<const Expert> experts) {
  const auto n_kv = static_cast<std::size_t>(hp_.n_kv_heads);
  const auto n_layers = static_cast<std::size_t>(hp_.n_layers);
  if (experts.size() != n_kv * n_layers)
    return Fail(ErrorCode::kInvalidArgument, "{} experts for {} KV heads", experts.size(), n_kv * n_layers);
  std::size_t first = 0;
  if (last_plan_.size() == experts.size()) {
    const auto differs = std::mismatch(experts.begin(), experts.end(), last_plan_.begin()).first;
    first = std::min(static_cast<std::size_t>(differs - experts.begin()) / n_kv, n_layers - 1);
  } else {
    last_inputs_.assign(n_layers, {});
    last_inputs_[0] = inputs_[0];
  }
  last_plan_.clear();  // not true any more, should this fail
  std::vector<float> hidden = last_inputs_[first];
  for (std::size_t l = first; l < n_layers; ++l) {
    last_inputs_[l] = hidden;
    const auto layer = static_cast<int64_t>(l);
    const std::span<const Expert> heads = experts.subspan(l * n_kv, n_kv);
    if (IsFull(heads)) {
      layers_[l].Truncate(context_);
      MOEND_TRY(machine_.prefill->Begin({}, &layers_[l]));
      MOEND_TRY(RunTail(layer, hidden.data(), false, *machine_.prefill));
      continue;
    }
    MOEND_ASSIGN(auto caches, TakeCaches(layer, heads));
    MOEND_ASSIGN(LayerScratch* const tail, EmptyTail());
    MOEND_TRY(machine_.prefill->Begin(caches, tail));
    MOEND_TRY(RunTail(layer, hidden.data(), false, *machine_.prefill));
    KeepCaches(layer, heads, std::move(caches));
  }
  last_plan_.assign(experts.begin(), experts.end());
  return TailKl(hidden);
}

}  // namespace moend
