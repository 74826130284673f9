#include "moend/calibrate/paper.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>

#include "moend/cache/codec.h"
#include "moend/engine/engine_impl.h"
#include "moend/score/scorer.h"

namespace moend {
namespace {

// Copies what attention gets, and lets it go on.
class Recorder : public AttentionHook {
 public:
  Recorder(const HyperParams& hp, AttentionHook& inner) : hp_(hp), inner_(inner) {}
  void Store(int64_t layer, const float* q, const float* k, const float* v, int64_t n) override {
    q_.assign(q, q + n * hp_.n_heads * hp_.head_size);
    k_.assign(k, k + n * hp_.n_kv_heads * hp_.head_size);
    v_.assign(v, v + n * hp_.n_kv_heads * hp_.head_size);
    inner_.Store(layer, q, k, v, n);
  }
  void Attend(int64_t layer, const float* q, int64_t n, int thread, int n_threads) override {
    inner_.Attend(layer, q, n, thread, n_threads);
  }
  void Combine(int64_t layer, float* out, int64_t n, int thread, int n_threads) override {
    inner_.Combine(layer, out, n, thread, n_threads);
  }
  const std::vector<float>& q() const { return q_; }  // [n][n_heads][head_size]
  const std::vector<float>& k() const { return k_; }  // [n][n_kv_heads][head_size]
  const std::vector<float>& v() const { return v_; }

 private:
  const HyperParams& hp_;
  AttentionHook& inner_;
  std::vector<float> q_, k_, v_;
};

// One KV head: K and V, token major, of 64 slots.
struct Slots {
  std::vector<float> k, v;
};

// Causal attention of every query head of a KV head; a token that is not in `kept` is seen by itself only.
void Attend(const HyperParams& hp, const std::vector<float>& q, int64_t kv_head, const Slots& slots,
            uint64_t kept, int64_t n, std::vector<double>& out) {
  const int64_t d = hp.head_size, group = hp.n_heads / hp.n_kv_heads;
  out.assign(static_cast<std::size_t>(n * group * d), 0.0);
  std::vector<double> p(static_cast<std::size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t g = 0; g < group; ++g) {
      const float* query = q.data() + (i * hp.n_heads + kv_head * group + g) * d;
      const auto sees = [&](int64_t t) { return t == i || (kept >> t & 1); };
      double most = -INFINITY, sum = 0;
      for (int64_t t = 0; t <= i; ++t) {
        if (!sees(t)) continue;
        double dot = 0;
        for (int64_t c = 0; c < d; ++c)
          dot += double{query[c]} * slots.k[static_cast<std::size_t>(t * d + c)];
        p[static_cast<std::size_t>(t)] = dot * hp.softmax_scale;
        most = std::max(most, p[static_cast<std::size_t>(t)]);
      }
      for (int64_t t = 0; t <= i; ++t)
        if (sees(t)) sum += p[static_cast<std::size_t>(t)] = std::exp(p[static_cast<std::size_t>(t)] - most);
      double* to = out.data() + (i * group + g) * d;
      for (int64_t t = 0; t <= i; ++t) {
        if (!sees(t)) continue;
        for (int64_t c = 0; c < d; ++c)
          to[c] += p[static_cast<std::size_t>(t)] / sum * slots.v[static_cast<std::size_t>(t * d + c)];
      }
    }
  }
}

Expected<std::vector<ProfileCell>> MeasureLayer(const HyperParams& hp, const Recorder& layer, int64_t n,
                                                const std::vector<Expert>& experts,
                                                std::span<const float> order) {
  const int64_t d = hp.head_size;
  const uint64_t all = n >= kPageTokens ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
  std::vector<double> errors(experts.size(), 0.0), full, changed;
  double norm = 0;
  for (int64_t h = 0; h < hp.n_kv_heads; ++h) {
    Slots slots{std::vector<float>(static_cast<std::size_t>(kPageTokens * d)),
                std::vector<float>(static_cast<std::size_t>(kPageTokens * d))};
    for (int64_t t = 0; t < n; ++t) {
      const std::size_t from = static_cast<std::size_t>((t * hp.n_kv_heads + h) * d);
      std::copy_n(layer.k().begin() + static_cast<std::ptrdiff_t>(from), d, slots.k.begin() + t * d);
      std::copy_n(layer.v().begin() + static_cast<std::ptrdiff_t>(from), d, slots.v.begin() + t * d);
    }
    Attend(hp, layer.q(), h, slots, all, n, full);
    for (const double x : full) norm += x * x;
    for (std::size_t e = 0; e < experts.size(); ++e) {
      const Expert& expert = experts[e];
      uint64_t kept = 0;
      for (const uint32_t t : SelectKept(order, {0, 0}, std::max<int64_t>(1, ShareOf(expert.keep, n))))
        kept |= uint64_t{1} << t;
      MOEND_ASSIGN(const PageLayout layout, MakePageLayout(d, expert.k_bits, expert.v_bits));
      MOEND_ASSIGN(auto page, Buffer<uint8_t>::Create(nullptr, layout.bytes));
      PackPage(layout, slots.k.data(), slots.v.data(), all, page.data());
      Slots packed = slots;
      UnpackPage(layout, page.data(), packed.k.data(), packed.v.data());
      Attend(hp, layer.q(), h, packed, kept, n, changed);
      for (std::size_t i = 0; i < full.size(); ++i)
        errors[e] += (changed[i] - full[i]) * (changed[i] - full[i]);
    }
  }
  std::vector<ProfileCell> cells;
  for (std::size_t e = 0; e < experts.size(); ++e)
    cells.push_back({experts[e] == Expert{} || norm == 0 ? 0 : std::sqrt(errors[e] / norm), 0});
  return cells;
}

}  // namespace

std::vector<Expert> PaperExperts() {
  std::vector<Expert> experts;
  for (const double keep : {0.1, 0.25, 0.5, 0.75, 0.9, 1.0})
    for (const int k : {4, 8, 16})
      for (const int v : {4, 8, 16}) experts.push_back({keep, k, v});
  return experts;
}

Expected<Profile> CalibrateLikePaper(Engine& engine, std::span<const int32_t> tokens) {
  const auto n = static_cast<int64_t>(tokens.size());
  if (n < 2 || n > kPageTokens)
    return Fail(ErrorCode::kInvalidArgument,
                "a prompt of {} tokens; the paper's has {}, possible are 2 to {}", n, kPaperTokens,
                kPageTokens);
  Profile profile;
  profile.model = engine.fingerprint();
  profile.length = n;
  profile.evaluated = n;
  profile.chunks = profile.chunks_wanted = 1;
  profile.experts = PaperExperts();
  Engine::Impl& machine = engine.impl();
  const std::scoped_lock lock(machine.reading, machine.busy);
  const HyperParams& hp = machine.model->hparams();
  if (std::ranges::any_of(hp.layers,
                          [](const LayerParams& l) { return !l.compresses() || l.soft_cap > 0 || l.sinks; }))
    return Fail(
        ErrorCode::kUnsupported,
        "the paper's calibration knows plain attention only; the architecture {} has sliding layers, layers "
        "with a state, soft caps or sinks",
        hp.architecture_name);
  MOEND_ASSIGN(const auto random, MakeScorer("random"));
  std::vector<float> order(static_cast<std::size_t>(n));
  random->ScorePrefill({}, order);
  MOEND_ASSIGN(auto hidden, Buffer<float>::Create(nullptr, n * hp.n_embd));
  MOEND_TRY(machine.compute->Embed(tokens, hidden.data()));
  MOEND_ASSIGN(auto scratch,
               LayerScratch::Create(nullptr, {hp.n_kv_heads, hp.head_size}, hp.n_heads, n, 0, {}, 0));
  for (int64_t l = 0; l < hp.n_layers; ++l) {
    scratch.Clear();
    MOEND_TRY(machine.prefill->Begin({}, &scratch));
    Recorder recorder(hp, *machine.prefill);
    MOEND_TRY(machine.compute->Layer(l, hidden.data(), n, 0, recorder));
    MOEND_ASSIGN(auto cells, MeasureLayer(hp, recorder, n, profile.experts, order));
    profile.cells.push_back(std::move(cells));
  }
  return profile;
}

}  // namespace moend
