#include <algorithm>

#include "moend/base/caught.h"
#include "moend/engine/capture.h"
#include "moend/engine/compress.h"
#include "moend/engine/engine.h"
#include "moend/engine/engine_impl.h"
#include "moend/engine/queries.h"
#include "moend/engine/session_state.h"

namespace moend {
namespace {

Expected<void> CheckPlan(const Plan& plan, const Engine& engine) {
  const Fingerprint model = engine.fingerprint();
  MOEND_TRY(CheckSameModel(plan.model, model, "the plan"));
  if (static_cast<int64_t>(plan.layers.size()) != model.n_layers)
    return Fail(ErrorCode::kMismatch, "the plan has {} layers, the model {}", plan.layers.size(),
                model.n_layers);
  if (!plan.heads.empty() &&
      static_cast<int64_t>(plan.heads.size()) != model.n_layers * model.shape.n_kv_heads)
    return Fail(ErrorCode::kMismatch, "the plan has {} KV heads in all, the model {}", plan.heads.size(),
                model.n_layers * model.shape.n_kv_heads);
  return CheckFixedLayers(plan, "the plan");
}

}  // namespace

Session::Session(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;
Session::~Session() = default;

Expected<Session> Session::Create(std::shared_ptr<Engine> engine, const Plan& plan,
                                  const SessionOptions& options) {
  return Caught("making a context", [&]() -> Expected<Session> {
    MOEND_TRY(CheckPlan(plan, *engine));
    auto impl = std::make_unique<Impl>();
    const HyperParams& hp = engine->model().hparams();
    if (options.n_ctx < 0 || options.n_ctx > kMostContextTokens)
      return Fail(ErrorCode::kInvalidArgument, "a context of {} tokens is not possible; 0 to {} are",
                  options.n_ctx, kMostContextTokens);
    impl->n_ctx = options.n_ctx ? options.n_ctx : hp.n_ctx_train;
    MOEND_ASSIGN(impl->scorer, MakeScorer(options.scorer.empty() ? plan.scorer : options.scorer));
    if (const int64_t made_for = impl->scorer->layers(); made_for > 0 && made_for != hp.n_layers)
      return Fail(ErrorCode::kMismatch, "the plan names a scorer for each of {} layers; the model has {}",
                  made_for, hp.n_layers);
    if (impl->scorer->needs().query_stats && Evicts(plan)) {
      MOEND_ASSIGN(impl->queries, MakeQueryModel(engine->model(), plan.queries));
    }
    if (impl->scorer->needs().learned && Evicts(plan))
      MOEND_TRY(CheckLearned(engine->model(), plan.learned.get()));
    impl->ledger = options.ledger ? options.ledger : std::make_shared<Ledger>();
    impl->plan = plan;
    impl->engine = std::move(engine);
    if (plan.model.state_layers() > 0) impl->states.resize(static_cast<std::size_t>(hp.n_layers));
    for (int64_t l = 0; l < hp.n_layers; ++l) {
      int64_t window = plan.model.window(l);
      if (plan.model.holds_state(l)) {
        Buffer<float>& state = impl->states[static_cast<std::size_t>(l)];
        MOEND_ASSIGN(state, Buffer<float>::Create(impl->ledger, plan.model.state_bytes / 4));
        std::fill_n(state.data(), state.size(), 0.0f);
        window = 1;  // stay empty
      }
      for (int64_t h = 0; h < hp.n_kv_heads && window > 0; ++h) {
        MOEND_ASSIGN(auto sliding, LayerCache::CreateSliding(impl->ledger, {1, hp.head_size}, window));
        impl->caches.push_back(std::move(sliding));
      }
      if (window > 0) continue;
      MOEND_ASSIGN(const auto rotations, impl->machine().Rotations(l));
      const std::vector<Expert> experts = impl->experts(l);
      for (std::size_t h = 0; h < experts.size(); ++h) {
        const bool keep_scores = impl->scorer->of_layer(l).needs().accumulated && experts[h].keep < 1;
        MOEND_ASSIGN(auto cache, LayerCache::Create(impl->ledger, {1, hp.head_size}, experts[h], plan.guard,
                                                    keep_scores, rotations[h]));
        impl->caches.push_back(std::move(cache));
      }
    }
    return Session(std::move(impl));
  });
}

Expected<void> Session::Impl::CheckUsable() const {
  if (!failed) return {};
  return Fail(ErrorCode::kInternal,
              "something failed half way in this context before; it cannot be used further");
}

Expected<void> Session::Prefill(std::span<const int32_t> tokens, const Progress& progress,
                                std::vector<float>* hidden) {
  return Caught("reading a prompt",
                [&]() -> Expected<void> { return impl_->Read(tokens, progress, hidden); });
}

Expected<void> Session::Impl::Read(std::span<const int32_t> tokens, const Progress& progress,
                                   std::vector<float>* hidden) {
  Impl& s = *this;
  MOEND_TRY(CheckUsable());
  const auto n = static_cast<int64_t>(tokens.size()), first = static_cast<int64_t>(s.tokens.size());
  if (n == 0) return Fail(ErrorCode::kInvalidArgument, "there are no tokens to read");
  if (first + n > s.n_ctx)
    return Fail(ErrorCode::kTooLong, "{} tokens do not fit in a context of {} tokens{}", n, s.n_ctx,
                first ? fmt::format(" of which {} are taken", first) : "");
  s.failed = true;
  s.tokens.reserve(static_cast<std::size_t>(first + n));
  Engine::Impl& machine = s.machine();
  const std::lock_guard reading(machine.reading);
  std::unique_lock busy(machine.busy);
  const HyperParams& hp = machine.model->hparams();
  // A first prompt is scored by the scratch; a further turn is appended and evicted like generated tokens.
  const bool fresh = first == 0;
  ScorerNeeds needs = fresh ? s.scorer->needs() : ScorerNeeds{s.observed_window(), false};
  if (!Evicts(s.plan))
    needs.repetition = needs.learned = false;  // nothing is chosen, so nothing need be known
  if (s.plan.refit) needs.reference_tokens = LayerScratch::ReferenceTokens(n);
  MOEND_ASSIGN(auto scratch, LayerScratch::Create(s.ledger, {hp.n_kv_heads, hp.head_size}, hp.n_heads, n, n,
                                                  needs, hp.state_floats()));
  const bool evict = !fresh && s.since_eviction + n >= kEvictInterval;
  Engine::Impl::LayerHooks hooks;
  hooks.ledger = s.ledger;
  hooks.learned = s.plan.learned.get();
  hooks.begin = [&](int64_t l, std::span<const LayerCache>* past, LayerScratch** out) -> Expected<void> {
    scratch.Clear();
    if (needs.repetition) scratch.AskFor(s.Chooses(l, n));
    if (s.plan.model.holds_state(l))
      std::copy_n(s.states[static_cast<std::size_t>(l)].data(), std::ssize(scratch.state()),
                  scratch.state().data());
    *past = s.heads(l);
    *out = &scratch;
    return {};
  };
  hooks.end = [&](int64_t l, LayerScratch& done) -> Expected<void> {
    const std::span<LayerCache> heads = s.heads(l);
    if (s.plan.model.holds_state(l)) {
      s.TakeState(l, done);
      return {};
    }
    if (fresh) {
      MOEND_ASSIGN(auto packed, s.Compressed(l, done, n));
      std::move(packed.begin(), packed.end(), heads.begin());
      DecodeContext context;
      context.caches = s.caches;
      context.mirror = &s.mirror;
      return machine.compute->Mirror(context, l);
    }
    MOEND_TRY(AppendScratch(*machine.compute, heads, done));
    for (int64_t h = 0; evict && h < hp.n_kv_heads; ++h)
      MOEND_TRY(EvictExcess(heads[static_cast<std::size_t>(h)], s.scorer->of_layer(l), s.prompt_tokens,
                            done.observed(h), s.scorer_of(l).head(h)));
    return {};
  };
  // Between two blocks others may decode.
  const auto between = [&](double done) {
    busy.unlock();
    const bool go_on = progress(done);
    busy.lock();
    return go_on;
  };
  MOEND_TRY(machine.ReadLayerByLayer(tokens, first, hooks, s.logits,
                                     progress ? Progress(between) : Progress(), hidden));
  s.tokens.insert(s.tokens.end(), tokens.begin(), tokens.end());
  if (fresh) s.NoteHeads();
  if (fresh) s.prompt_tokens = n;
  if (!fresh) s.since_eviction = evict ? 0 : s.since_eviction + n;
  s.failed = false;
  return {};
}

Expected<std::vector<LayerCache>> Session::Impl::Compressed(int64_t layer, const LayerScratch& scratch,
                                                            int64_t n_tokens) {
  Engine::Impl& machine = this->machine();
  if (const int64_t window = plan.model.window(layer); window > 0)
    return WindowCaches(*machine.compute, ledger, scratch, n_tokens, window);
  MOEND_ASSIGN(const auto rotations, machine.Rotations(layer));
  return CompressScratch(*machine.compute, ledger, scratch, n_tokens, experts(layer), plan.guard, rotations,
                         scorer_of(layer), nullptr);
}

void Session::Impl::TakeState(int64_t layer, const LayerScratch& scratch) {
  std::ranges::copy(scratch.state(), states[static_cast<std::size_t>(layer)].data());
}

std::vector<Expert> Session::Impl::experts(int64_t layer) const {
  std::vector<Expert> experts;
  for (int64_t h = 0; h < plan.model.shape.n_kv_heads; ++h) experts.push_back(plan.expert(layer, h));
  return experts;
}

std::vector<bool> Session::Impl::Chooses(int64_t layer, int64_t n) const {
  const bool goes_by_it = scorer->of_layer(layer).needs().repetition;
  std::vector<bool> chooses;
  for (const Expert& e : experts(layer))
    chooses.push_back(goes_by_it && KeptTokens(e.keep, plan.guard, n) < n &&
                      (plan.adaptive_heads || KeptPages(e.keep, plan.guard, n) > 0));
  return chooses;
}

void Session::Impl::NoteHeads() {
  if (!plan.adaptive_heads) return;
  plan.heads.clear();
  for (const LayerCache& cache : caches) plan.heads.push_back(cache.expert());
}

int64_t Session::Impl::observed_window() const {
  const bool evicts =
      std::any_of(caches.begin(), caches.end(), [](const LayerCache& c) { return c.expert().keep < 1; });
  return evicts ? std::min(kDecodeObserved, scorer->needs().observed_queries) : 0;
}

Expected<void> Session::Impl::PrepareStep(DecodeContext* context) {
  context->caches = caches;
  context->states = states;
  context->mirror = &mirror;
  context->ring = nullptr;
  const int64_t window = observed_window();
  if (window == 0 || since_eviction < kEvictInterval - window) return {};
  if (ring.queries.size() == 0) {
    const HyperParams& hp = engine->model().hparams();
    MOEND_ASSIGN(ring.queries,
                 Buffer<float>::Create(ledger, hp.n_layers * window * hp.n_heads * hp.head_size));
    ring.window = window;
    ring.filled = 0;
  }
  context->ring = &ring;
  return {};
}

Expected<void> Session::Impl::FinishStep() {
  if (++since_eviction < kEvictInterval) return {};
  since_eviction = 0;
  return EvictAll();
}

Expected<void> Session::Impl::EvictAll() {
  const HyperParams& hp = engine->model().hparams();
  const int64_t group = hp.n_heads / hp.n_kv_heads;
  // A ring that was filled for fewer than `window` tokens (a turn's prefill counted too) is dense from its
  // start.
  const int64_t rows = std::min(ring.filled, ring.window) * group;
  std::vector<Expected<void>> results(caches.size());
  MOEND_TRY(machine().compute->ParallelFor(static_cast<int64_t>(caches.size()), [&](int64_t i, int) {
    QueryRows observed{nullptr, 0, group};
    if (rows > 0)
      observed = machine()
                     .model->Style(i / hp.n_kv_heads)
                     .Rows(ring.queries.data() + i * ring.window * group * hp.head_size, rows, group,
                           i % hp.n_kv_heads);
    results[static_cast<std::size_t>(i)] =
        EvictExcess(caches[static_cast<std::size_t>(i)], scorer->of_layer(i / hp.n_kv_heads), prompt_tokens,
                    observed, queries_of(i));
  }));
  ring = {};
  for (auto& r : results)
    if (!r) return Forward(r);
  return {};
}

Expected<void> Session::Decode(int32_t token) {
  Session* self = this;
  return DecodeBatch({&self, 1}, {&token, 1});
}

namespace {

// Room for more, growing as push_back does.
template <class T>
void ReserveMore(std::vector<T>& v, std::size_t more) {
  if (v.capacity() - v.size() < more) v.reserve(std::max({std::size_t{64}, 2 * v.size(), v.size() + more}));
}

}  // namespace

Expected<void> Session::DecodeBatch(std::span<Session* const> sessions, std::span<const int32_t> tokens,
                                    std::vector<float>* hidden) {
  if (sessions.empty() || sessions.size() != tokens.size())
    return Fail(ErrorCode::kInvalidArgument, "{} tokens for {} sessions", tokens.size(), sessions.size());
  return Caught("generating", [&]() -> Expected<void> {
    Engine::Impl& machine = sessions[0]->impl_->machine();
    const std::lock_guard lock(machine.busy);
    const HyperParams& hp = machine.model->hparams();
    std::vector<DecodeContext>& contexts = machine.contexts;
    std::vector<int32_t>& positions = machine.positions;
    contexts.assign(sessions.size(), {});
    positions.resize(sessions.size());
    // Whatever the step's end needs is there before it, so that only an eviction can fail then.
    if (hidden) ReserveMore(*hidden, sessions.size() * static_cast<std::size_t>(hp.n_embd));
    for (std::size_t b = 0; b < sessions.size(); ++b) {
      Impl& s = *sessions[b]->impl_;
      MOEND_TRY(s.CheckUsable());
      if (&s.machine() != &machine)
        return Fail(ErrorCode::kInvalidArgument, "sessions of different engines in one step");
      if (s.tokens.empty())
        return Fail(ErrorCode::kInvalidArgument, "a session must read a prompt before it decodes");
      if (static_cast<int64_t>(s.tokens.size()) >= s.n_ctx)
        return Fail(ErrorCode::kTooLong, "the context of {} tokens is full", s.n_ctx);
      ReserveMore(s.tokens, 1);
      if (!hidden) s.logits.reserve(static_cast<std::size_t>(hp.n_vocab));
      MOEND_TRY(s.PrepareStep(&contexts[b]));
      positions[b] = static_cast<int32_t>(s.tokens.size());
    }
    machine.decode->Begin(contexts);
    for (Session* session : sessions)
      session->impl_->failed = true;  // their caches are ahead of their tokens
    MOEND_ASSIGN(const float* rows, hidden ? machine.compute->StepHidden(tokens, positions, *machine.decode)
                                           : machine.compute->Step(tokens, positions, *machine.decode));
    if (hidden) MOEND_TRY(AppendFloats(*hidden, rows, std::ssize(tokens) * hp.n_embd));
    Expected<void> result;
    for (std::size_t b = 0; b < sessions.size(); ++b) {
      Impl& s = *sessions[b]->impl_;
      s.logits.clear();
      if (!hidden)
        s.logits.assign(rows + static_cast<int64_t>(b) * hp.n_vocab,
                        rows + static_cast<int64_t>(b + 1) * hp.n_vocab);
      s.tokens.push_back(tokens[b]);
      auto finished = machine.compute->CheckFinite(s.logits);
      if (finished) finished = Caught("evicting tokens", [&] { return s.FinishStep(); });
      s.failed = !finished;
      if (!finished && result) result = std::move(finished);
    }
    return result;
  });
}

bool Session::usable() const {
  return !impl_->failed;
}
std::span<const float> Session::logits() const {
  return impl_->logits;
}
const std::vector<int32_t>& Session::tokens() const {
  return impl_->tokens;
}
int64_t Session::n_ctx() const {
  return impl_->n_ctx;
}
const Plan& Session::plan() const {
  return impl_->plan;
}

Expected<Session> Session::Fork() const {
  MOEND_TRY(impl_->CheckUsable());
  return Caught("copying a context", [&]() -> Expected<Session> {
    auto copy = std::make_unique<Impl>();
    copy->engine = impl_->engine;
    copy->ledger = impl_->ledger;
    copy->scorer = impl_->scorer;
    copy->queries = impl_->queries;
    copy->plan = impl_->plan;
    copy->n_ctx = impl_->n_ctx;
    copy->prompt_tokens = impl_->prompt_tokens;
    copy->tokens = impl_->tokens;
    copy->logits = impl_->logits;
    copy->since_eviction = impl_->since_eviction;
    for (const LayerCache& cache : impl_->caches) {
      MOEND_ASSIGN(auto forked, cache.Fork());
      copy->caches.push_back(std::move(forked));
    }
    for (const Buffer<float>& state : impl_->states) {
      MOEND_ASSIGN(auto own, Buffer<float>::Create(copy->ledger, state.size()));
      std::copy_n(state.data(), state.size(), own.data());
      copy->states.push_back(std::move(own));
    }
    if (impl_->ring.queries.size()) {
      MOEND_ASSIGN(copy->ring.queries, Buffer<float>::Create(copy->ledger, impl_->ring.queries.size()));
      std::copy_n(impl_->ring.queries.data(), impl_->ring.queries.size(), copy->ring.queries.data());
      copy->ring.window = impl_->ring.window;
      copy->ring.filled = impl_->ring.filled;
    }
    return Session(std::move(copy));
  });
}

KvStats Session::stats() const {
  const Impl& s = *impl_;
  KvStats stats;
  const auto n = static_cast<int64_t>(s.tokens.size());
  stats.bytes_full = FullBytes(s.plan.model, n);
  stats.peak_bytes = s.ledger->peak();
  stats.device_bytes = s.mirror ? s.mirror->bytes() : 0;
  stats.bytes = s.ring.queries.size() ? RoundUp(s.ring.queries.size() * 4, kCacheLine) : 0;
  const int64_t heads = s.plan.model.shape.n_kv_heads;
  for (std::size_t l = 0; l < s.plan.layers.size(); ++l) {
    LayerKvStats layer{s.plan.layers[l], 0, 0};
    for (int64_t h = 0; h < heads; ++h) {
      const LayerCache& cache = s.caches[l * static_cast<std::size_t>(heads) + static_cast<std::size_t>(h)];
      layer.tokens += cache.tokens(0);
      layer.bytes += cache.bytes();
    }
    layer.tokens /= heads;
    if (s.plan.model.holds_state(static_cast<int64_t>(l))) layer.bytes = s.plan.model.state_bytes;
    stats.bytes += layer.bytes;
    stats.layers.push_back(layer);
  }
  return stats;
}

void Session::ResetPeak() {
  impl_->ledger->ResetPeak();
}

Expected<KvCapture> KvCapture::Create(std::shared_ptr<Engine> engine, std::span<const int32_t> tokens,
                                      std::span<const std::string> scorers, const Progress& progress,
                                      std::shared_ptr<Ledger> ledger,
                                      std::shared_ptr<const LearnedScores> learned) {
  if (tokens.empty()) return Fail(ErrorCode::kInvalidArgument, "there are no tokens to read");
  return Caught("reading a text", [&]() -> Expected<KvCapture> {
    ScorerNeeds needs;
    for (const std::string& name : scorers) {
      MOEND_ASSIGN(auto scorer, MakeScorer(name));
      needs = Union(needs, scorer->needs());
    }
    needs.reference_tokens = LayerScratch::ReferenceTokens(std::ssize(tokens));  // any plan may want to refit
    Engine::Impl& machine = engine->impl();
    if (needs.learned) MOEND_TRY(CheckLearned(*machine.model, learned.get()));
    const std::scoped_lock lock(machine.reading, machine.busy);
    const HyperParams& hp = machine.model->hparams();
    KvCapture capture;
    capture.ledger_ = ledger ? std::move(ledger) : std::make_shared<Ledger>();
    capture.tokens_.assign(tokens.begin(), tokens.end());
    const auto n = static_cast<int64_t>(tokens.size());
    Engine::Impl::LayerHooks hooks;
    hooks.learned = learned.get();
    hooks.begin = [&](int64_t, std::span<const LayerCache>*, LayerScratch** out) -> Expected<void> {
      MOEND_ASSIGN(auto scratch, LayerScratch::Create(capture.ledger_, {hp.n_kv_heads, hp.head_size},
                                                      hp.n_heads, n, n, needs, hp.state_floats()));
      capture.layers_.push_back(std::move(scratch));
      *out = &capture.layers_.back();
      return {};
    };
    hooks.end = [](int64_t, LayerScratch&) -> Expected<void> { return {}; };
    MOEND_TRY(machine.ReadLayerByLayer(tokens, 0, hooks, capture.logits_, progress));
    return capture;
  });
}

Expected<Session> SessionFromCapture(std::shared_ptr<Engine> engine, const Plan& plan,
                                     const KvCapture& capture, const SessionOptions& options) {
  return Caught("compressing a text", [&]() -> Expected<Session> {
    MOEND_ASSIGN(auto session, Session::Create(engine, plan, options));
    Session::Impl& s = session.impl();
    const auto n = static_cast<int64_t>(capture.tokens().size());
    if (n > s.n_ctx)
      return Fail(ErrorCode::kTooLong, "{} tokens do not fit in a context of {} tokens", n, s.n_ctx);
    const std::lock_guard lock(s.machine().busy);
    for (int64_t l = 0; l < plan.model.n_layers; ++l) {
      if (plan.model.holds_state(l)) {
        s.TakeState(l, capture.layer(l));
        continue;
      }
      MOEND_ASSIGN(auto packed, s.Compressed(l, capture.layer(l), n));
      std::move(packed.begin(), packed.end(), s.heads(l).begin());
    }
    s.NoteHeads();
    s.tokens = capture.tokens();
    s.prompt_tokens = n;
    s.logits = capture.logits();
    return session;
  });
}

}  // namespace moend
