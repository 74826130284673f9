#include "moend/calibrate/reconstruction.h"

#include <algorithm>
#include <cmath>

#include "moend/attention/attention.h"
#include "moend/calibrate/probe.h"
#include "moend/calibrate/query_tap.h"
#include "moend/engine/engine_impl.h"
#include "moend/engine/queries.h"
#include "moend/solve/solve.h"

namespace moend {
namespace {

constexpr int64_t kMostTokens = 512;  // of the sample that are measured
constexpr int64_t kRowTokens = 32;    // of them to a thread at a time

// The sampled queries of a layer, and what they get from the full cache.
class Sample {
 public:
  static Expected<Sample> Create(Compute& compute, const LayerScratch& scratch, int64_t n_tokens,
                                 std::vector<float> grams) {
    Sample s;
    s.compute_ = &compute;
    s.d_ = scratch.shape().head_size;
    s.heads_ = scratch.shape().n_kv_heads;
    s.grams_ = std::move(grams);
    const QueryRows all = scratch.reference(0);
    s.group_ = all.group;
    const int64_t have = all.rows / all.group;
    s.tokens_ = std::min(have, kMostTokens);
    for (int64_t h = 0; h < s.heads_; ++h) {
      const QueryRows from = scratch.reference(h);
      s.styles_.push_back(from);
      for (int64_t i = 0; i < s.tokens_; ++i) {
        const int64_t token = i * have / s.tokens_;
        const float* q = from.q + token * s.group_ * s.d_;
        s.q_.insert(s.q_.end(), q, q + s.group_ * s.d_);
        if (h == 0) s.weights_.push_back(scratch.reference_weight()[static_cast<std::size_t>(token)]);
      }
    }
    s.full_.resize(s.q_.size());
    for (int i = 0; i < compute.n_threads(); ++i) {
      MOEND_ASSIGN(auto ws, Buffer<float>::Create(nullptr, WorkspaceFloats(s.d_, kRowTokens * s.group_)));
      s.workspaces_.push_back(std::move(ws));
    }
    MOEND_TRY(s.ForRows([&](int64_t h, const QueryRows& q, std::size_t at, float* out, float* workspace) {
      const DenseView kv = scratch.view(h, n_tokens);
      const SoftmaxState state{out, out + q.rows * s.d_, out + q.rows * (s.d_ + 1)};
      simd::AttendCausal(kv, n_tokens, q, state, workspace);  // they come behind all tokens
      simd::Finish(state, q.rows, s.d_);
      std::copy_n(out, q.rows * s.d_, s.full_.begin() + static_cast<std::ptrdiff_t>(at));
    }));
    return s;
  }

  int64_t tokens() const { return tokens_; }

  // Of each KV head: the mean over the tokens of |W_O (o - o')|^2 / |x|^2, and of |o - o'|^2 over that of
  // |o|^2.
  struct Errors {
    std::vector<double> output, relative;
  };
  Expected<Errors> Measure(std::span<const LayerCache> caches) {
    std::vector<std::vector<double>> sums(static_cast<std::size_t>(compute_->n_threads()),
                                          std::vector<double>(static_cast<std::size_t>(3 * heads_), 0.0));
    MOEND_TRY(ForRows([&](int64_t h, const QueryRows& q, std::size_t at, float* out, float* workspace) {
      const StreamView kv = caches[static_cast<std::size_t>(h)].view(0);
      const SoftmaxState state{out, out + q.rows * d_, out + q.rows * (d_ + 1)};
      simd::AttendStream(kv, 0, kv.n_pages, true, q, state, workspace);
      simd::Finish(state, q.rows, d_);
      double* sum = sums[static_cast<std::size_t>(workspace_of(workspace))].data() + 3 * h;
      for (int64_t r = 0; r < q.rows; ++r) {
        const float* full = full_.data() + at + r * d_;
        float* e = out + r * d_;
        for (int64_t c = 0; c < d_; ++c) {
          e[c] -= full[c];
          sum[1] += double{e[c]} * e[c];
          sum[2] += double{full[c]} * full[c];
        }
        const auto token = (at / static_cast<std::size_t>(d_) + static_cast<std::size_t>(r)) /
                           static_cast<std::size_t>(group_) % static_cast<std::size_t>(tokens_);
        sum[0] += weights_[token] * Square(grams_.data() + (h * group_ + r % group_) * d_ * d_, e);
      }
    }));
    Errors errors;
    for (int64_t h = 0; h < heads_; ++h) {
      double total[3] = {};
      for (const auto& of_thread : sums)
        for (int i = 0; i < 3; ++i) total[i] += of_thread[static_cast<std::size_t>(3 * h + i)];
      errors.output.push_back(total[0] / static_cast<double>(tokens_));
      errors.relative.push_back(total[2] > 0 ? total[1] / total[2] : 0);
    }
    return errors;
  }

 private:
  // e' gram e
  double Square(const float* gram, const float* e) const {
    double sum = 0;
    for (int64_t i = 0; i < d_; ++i) {
      float dot = 0;
      for (int64_t j = 0; j < d_; ++j) dot += gram[i * d_ + j] * e[j];
      sum += double{dot} * e[i];
    }
    return std::max(sum, 0.0);
  }

  std::ptrdiff_t workspace_of(const float* workspace) const {
    return std::ranges::find_if(workspaces_, [&](const auto& w) { return w.data() == workspace; }) -
           workspaces_.begin();
  }

  // Some rows at a time, on all threads: their KV head, where they are in full_, and an empty state.
  template <class Body>
  Expected<void> ForRows(const Body& body) {
    const int64_t parts = (tokens_ + kRowTokens - 1) / kRowTokens;
    return compute_->ParallelFor(parts * heads_, [&](int64_t i, int thread) {
      const int64_t h = i % heads_, first = i / heads_ * kRowTokens;
      const int64_t rows = std::min(kRowTokens, tokens_ - first) * group_;
      const int64_t at = (h * tokens_ + first) * group_ * d_;
      std::vector<float> state(static_cast<std::size_t>(rows * (d_ + 2)));
      QueryRows q = styles_[static_cast<std::size_t>(h)];
      q.q = q_.data() + at;
      q.rows = rows;
      InitState({state.data(), state.data() + rows * d_, state.data() + rows * (d_ + 1)}, q, d_);
      body(h, q, static_cast<std::size_t>(at), state.data(),
           workspaces_[static_cast<std::size_t>(thread)].data());
    });
  }

  Compute* compute_ = nullptr;
  int64_t d_ = 0, heads_ = 0, group_ = 1, tokens_ = 0;
  std::vector<float> q_, full_;    // f32 [KV head][token][group][head_size]
  std::vector<QueryRows> styles_;  // [KV head]: what they have beside q and rows
  std::vector<float> weights_;     // [token] 1 / |x|^2
  std::vector<float> grams_;       // f32 [query head][head_size][head_size]
  std::vector<Buffer<float>> workspaces_;
};

// What the experts are made of: each keep ratio at 16 bit, each pair of bits with every token kept.
std::vector<Expert> Parts(const std::vector<Expert>& experts) {
  std::vector<Expert> parts;
  for (const Expert& e : experts) {
    parts.push_back({e.keep, 16, 16});
    parts.push_back({1.0, e.k_bits, e.v_bits});
  }
  std::sort(parts.begin(), parts.end());
  parts.erase(std::unique(parts.begin(), parts.end()), parts.end());
  return parts;
}

std::function<void(int64_t, int64_t, int64_t, const float*)> WatchedBy(ScoreLearner& learner) {
  return [&learner](int64_t, int64_t at, int64_t n, const float* hidden) { learner.Watch(at, n, hidden); };
}

// Every text counts alike, whether it loses much (numbers that must be copied) or little.
void Normalize(Profile& text) {
  double sum = 0;
  for (const auto& cells : text.head_cells)
    for (std::size_t e = 0; e < cells.size(); ++e)
      if (text.experts[e].k_bits == 16 && text.experts[e].v_bits == 16) sum += cells[e].kl;
  if (!(sum > 0)) return;
  for (auto* table : {&text.cells, &text.head_cells})
    for (auto& cells : *table)
      for (ProfileCell& cell : cells) cell.kl /= sum;
}

}  // namespace

std::vector<Expert> ReconstructionExperts() {
  static constexpr double kKeeps[] = {0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2,
                                      0.3,  0.4,  0.5,   0.6,  0.7,   0.8, 0.9,  1.0};
  static constexpr std::pair<int, int> kBits[] = {{2, 2}, {3, 2}, {3, 3}, {4, 2},  {4, 3},
                                                  {4, 4}, {8, 4}, {8, 8}, {16, 16}};
  std::vector<Expert> experts;
  for (const double keep : kKeeps)
    for (const auto& [k, v] : kBits) experts.push_back({keep, k, v});
  std::sort(experts.begin(), experts.end());
  return experts;
}

Expected<void> MeasureReconstruction(Engine& engine, std::span<const int32_t> tokens, double most_copy_loss,
                                     Profile& profile, ScoreLearner* learner,
                                     const std::function<bool(double)>& tick) {
  Engine::Impl& machine = engine.impl();
  const HyperParams& hp = machine.model->hparams();
  const auto n = static_cast<int64_t>(tokens.size());
  MOEND_ASSIGN(const auto scorer, MakeScorer(profile.scorer));
  if (scorer->needs().query_stats)
    return Fail(ErrorCode::kUnsupported,
                "the scorer {} needs statistics that are known only when all was read; measure it by logits",
                profile.scorer);
  const std::vector<Expert> parts = Parts(profile.experts);
  ScorerNeeds needs = scorer->needs();
  needs.repetition = true;
  needs.reference_tokens = LayerScratch::ReferenceTokens(n);
  MOEND_ASSIGN(auto scratch, LayerScratch::Create(nullptr, {hp.n_kv_heads, hp.head_size}, hp.n_heads, n, n,
                                                  needs, hp.state_floats()));

  const auto measure = [&](int64_t l) -> Expected<void> {
    const LayerScorer of(scorer->of_layer(l));
    MOEND_ASSIGN(const auto scores, ScoreScratch(*machine.compute, scratch, n, of));
    MOEND_ASSIGN(const auto rotations, machine.Rotations(l));
    MOEND_ASSIGN(auto sample, Sample::Create(*machine.compute, scratch, n, machine.model->OutputGrams(l)));
    std::vector<Sample::Errors> measured;
    for (const Expert& part : parts) {
      const std::vector<Expert> all(static_cast<std::size_t>(hp.n_kv_heads), part);
      MOEND_ASSIGN(const auto caches, CompressScratch(*machine.compute, std::make_shared<Ledger>(), scratch,
                                                      n, all, profile.guard, rotations, of, &scores));
      MOEND_ASSIGN(auto errors, sample.Measure(caches));
      for (const auto* losses : {&errors.output, &errors.relative})
        if (!std::ranges::all_of(*losses, [](double x) { return std::isfinite(x); }))
          return Fail(ErrorCode::kInternal,
                      "what a KV head of layer {} loses when it is compressed is no number", l);
      measured.push_back(std::move(errors));
    }
    const auto find = [&](const Expert& part) -> const Sample::Errors& {
      return measured[static_cast<std::size_t>(std::ranges::find(parts, part) - parts.begin())];
    };
    for (std::size_t e = 0; e < profile.experts.size(); ++e) {
      const Expert& expert = profile.experts[e];
      const Sample::Errors &evicted = find({expert.keep, 16, 16}),
                           &packed = find({1.0, expert.k_bits, expert.v_bits});
      ProfileCell& layer = profile.cells[static_cast<std::size_t>(l)][e];
      for (std::size_t h = 0; h < evicted.output.size(); ++h) {
        const double kl = evicted.output[h] + packed.output[h];
        const double l2 = std::sqrt(evicted.relative[h] + packed.relative[h]);
        ProfileCell& head = profile.head_cells[static_cast<std::size_t>(l * hp.n_kv_heads) + h][e];
        head.kl += kl;
        head.l2 += l2;
        layer.kl += kl;
        layer.l2 += l2 / static_cast<double>(hp.n_kv_heads);
      }
    }
    return {};
  };
  QueryTap tap(*machine.model, *machine.prefill);
  Engine::Impl::LayerHooks hooks;
  hooks.listener = &tap;
  hooks.begin = [&](int64_t, std::span<const LayerCache>*, LayerScratch** out) -> Expected<void> {
    tap.BeginLayer();
    scratch.Clear();
    *out = &scratch;
    return {};
  };
  if (learner) hooks.watch = WatchedBy(*learner);
  hooks.end = [&](int64_t l, LayerScratch&) -> Expected<void> {
    if (!hp.layers[static_cast<std::size_t>(l)].compresses()) return {};  // nothing of it is compressed
    if (learner) MOEND_TRY(learner->EndLayer(l, scratch));
    return measure(l);
  };
  double copy_loss = 0;
  hooks.copy_loss = &copy_loss;
  std::vector<float> logits;
  MOEND_TRY(machine.ReadLayerByLayer(tokens, 0, hooks, logits, tick));
  if (!(copy_loss < most_copy_loss))
    return Fail(
        ErrorCode::kUnsupported,
        "asked to repeat a text, the model misses it by {:.2g} nats a token; {:g} are the most for what it "
        "attends to then to mean anything: measure it by logits",
        copy_loss, most_copy_loss);
  Normalize(profile);
  profile.queries = MergeQueryStats(profile.queries, tap.Take());
  return {};
}

Expected<void> LearnReconstruction(Engine& engine, std::span<const int32_t> tokens, ScoreLearner& learner,
                                   const std::function<bool(double)>& tick) {
  Engine::Impl& machine = engine.impl();
  const HyperParams& hp = machine.model->hparams();
  const auto n = static_cast<int64_t>(tokens.size());
  ScorerNeeds needs;
  needs.repetition = true;
  MOEND_ASSIGN(auto scratch, LayerScratch::Create(nullptr, {hp.n_kv_heads, hp.head_size}, hp.n_heads, n, n,
                                                  needs, hp.state_floats()));
  Engine::Impl::LayerHooks hooks;
  hooks.watch = WatchedBy(learner);
  hooks.begin = [&](int64_t, std::span<const LayerCache>*, LayerScratch** out) -> Expected<void> {
    scratch.Clear();
    *out = &scratch;
    return {};
  };
  hooks.end = [&](int64_t l, LayerScratch&) -> Expected<void> {
    if (!hp.layers[static_cast<std::size_t>(l)].compresses()) return {};
    return learner.EndLayer(l, scratch);
  };
  std::vector<float> logits;
  return machine.ReadLayerByLayer(tokens, 0, hooks, logits, tick);
}

Expected<void> CheckPlans(Engine& engine, std::span<const int32_t> chunk, Profile& profile,
                          const std::function<bool(double)>& tick) {
  static constexpr double kCompressions[] = {4, 8, 14, 20, 40};
  static constexpr int64_t kAsked = 384;      // tokens
  static constexpr double kReadShare = 0.85;  // of the time, for the progress bar only
  Engine::Impl& machine = engine.impl();
  const auto n = static_cast<int64_t>(chunk.size());
  const int64_t asked = std::min(kAsked, n / 4);
  MOEND_ASSIGN(const auto part, AskForPart(*machine.model, chunk, n / 2 - asked / 2, asked));
  std::vector<int32_t> tokens(chunk.begin(), chunk.end());
  tokens.insert(tokens.end(), part.begin(), part.end());
  MOEND_ASSIGN(const auto scorer, MakeScorer(profile.scorer));
  Probe probe(machine, *scorer, profile.guard);
  MOEND_TRY(
      probe.Read(tokens, std::ssize(part), [&](double done) { return !tick || tick(kReadShare * done); }));
  std::vector<ProfileCheck> checks;
  for (const double compression : kCompressions) {
    SolveRequest request;
    request.variant = Variant::k2dHeads;
    request.context_length = n;
    CompressFullLayers(profile.model, compression, request);
    request.score_bytes = scorer->needs().accumulated ? 4 : 0;
    request.min_keep = kDefaultMinKeep;
    request.floor_price = kDefaultFloorPrice;
    const auto solved = Solve(profile, request);
    if (!solved) continue;  // a text too short for it
    MOEND_ASSIGN(const auto kl, probe.MeasurePlan(solved->plan.heads));
    double mean = 0;
    for (const double x : kl) mean += x / static_cast<double>(kl.size());
    const double ratio =
        static_cast<double>(FullBytes(profile.model, n)) / static_cast<double>(solved->plan.budget_bytes);
    checks.push_back({profile.model.windows.empty() ? compression : ratio, solved->loss, mean});
    if (tick && !tick(kReadShare + (1 - kReadShare) * static_cast<double>(checks.size()) /
                                       static_cast<double>(std::size(kCompressions))))
      return Fail(ErrorCode::kCancelled, "the calibration was stopped");
  }
  std::ranges::sort(checks, {}, &ProfileCheck::predicted);
  profile.checks = std::move(checks);
  return {};
}

}  // namespace moend
