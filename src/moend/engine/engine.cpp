#include "moend/engine/engine.h"

#include <algorithm>
#include <optional>

#include "moend/base/caught.h"
#include "moend/base/dot.h"
#include "moend/base/machine.h"
#include "moend/engine/engine_impl.h"

namespace moend {

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::~Engine() = default;

Expected<std::shared_ptr<Engine>> Engine::Create(std::shared_ptr<const Model> model,
                                                 const EngineOptions& options) {
  const MachineLimits limits = ReadMachineLimits();
  const int threads = options.n_threads > 0 ? std::min(options.n_threads, limits.cpus) : limits.threads();
  return Caught("making an engine", [&]() -> Expected<std::shared_ptr<Engine>> {
    auto impl = std::make_unique<Impl>();
    impl->model = model;
    MOEND_ASSIGN(impl->compute, Compute::Create(model, threads, options.block_tokens));
    MOEND_ASSIGN(impl->prefill,
                 PrefillHook::Create(model, impl->compute->n_threads(), impl->compute->block_tokens()));
    MOEND_ASSIGN(impl->decode, DecodeHook::Create(model, impl->compute->n_threads()));
    return std::shared_ptr<Engine>(new Engine(std::move(impl)));
  });
}

const Model& Engine::model() const {
  return *impl_->model;
}
bool Engine::device_attends() const {
  return impl_->compute->device_attends();
}
int Engine::n_threads() const {
  return impl_->compute->n_threads();
}

Expected<void> Engine::Logits(std::span<const float> hidden, std::span<float> logits) {
  const HyperParams& hp = model().hparams();
  const auto n = static_cast<int64_t>(hidden.size()) / hp.n_embd;
  if (static_cast<int64_t>(hidden.size()) != n * hp.n_embd ||
      static_cast<int64_t>(logits.size()) != n * hp.n_vocab)
    return Fail(ErrorCode::kInvalidArgument,
                "{} numbers are no rows of {} hidden states with {} logits each in {} numbers", hidden.size(),
                hp.n_embd, hp.n_vocab, logits.size());
  const std::lock_guard lock(impl_->busy);
  return Caught("computing logits", [&] { return impl_->compute->Head(hidden.data(), n, logits.data()); });
}

Expected<void> Engine::ParallelFor(int64_t n, const std::function<void(int64_t, int)>& fn) {
  const std::lock_guard lock(impl_->busy);
  return Caught({}, [&] { return impl_->compute->ParallelFor(n, fn); });
}

Expected<void> AppendFloats(std::vector<float>& to, const float* from, int64_t n) {
  try {
    to.insert(to.end(), from, from + n);
  } catch (const std::exception&) {  // bad_alloc, or more than a vector can hold
    return Fail(ErrorCode::kOutOfMemory, "no memory for {} hidden states more", n);
  }
  return {};
}

Fingerprint Engine::fingerprint() const {
  const HyperParams& hp = model().hparams();
  Fingerprint model_is{
      hp.architecture_name, hp.name, hp.n_layers, {hp.n_kv_heads, hp.head_size}, model().hash()};
  if (!std::ranges::all_of(hp.layers, &LayerParams::compresses))
    for (const LayerParams& l : hp.layers)
      model_is.windows.push_back(l.holds_state() ? Fingerprint::kHoldsState : l.window);
  model_is.state_bytes =
      RoundUp(hp.state_floats() * static_cast<int64_t>(sizeof(float)), kCacheLine * hp.n_kv_heads);
  return model_is;
}

Expected<std::span<const std::shared_ptr<const KeyRotations>>> Engine::Impl::Rotations(int64_t layer) {
  const HyperParams& hp = model->hparams();
  const auto n = static_cast<std::size_t>(hp.n_kv_heads);
  const std::lock_guard lock(turning);
  if (rotations.empty()) rotations.resize(static_cast<std::size_t>(hp.n_layers) * n);
  const auto of_layer = std::span(rotations).subspan(static_cast<std::size_t>(layer) * n, n);
  if (!of_layer[0]) {
    const std::vector<float> balance = model->KeyBalance(layer);
    // All of them or none: the first one stands for the layer.
    std::vector<std::shared_ptr<const KeyRotations>> made(n);
    for (std::size_t h = 0; h < n; ++h) {
      const auto first = balance.begin() + static_cast<std::ptrdiff_t>(h) * hp.head_size;
      MOEND_ASSIGN(made[h],
                   KeyRotations::Create({1, hp.head_size}, std::vector<float>(first, first + hp.head_size)));
    }
    std::move(made.begin(), made.end(), of_layer.begin());
  }
  return of_layer;
}

std::span<const float> Engine::Impl::ValueGrams(int64_t layer) {
  const HyperParams& hp = model->hparams();
  const int64_t group = hp.n_heads / hp.n_kv_heads, square = hp.head_size * hp.head_size;
  if (value_grams.empty()) value_grams.resize(static_cast<std::size_t>(hp.n_layers));
  std::vector<float>& grams = value_grams[static_cast<std::size_t>(layer)];
  if (grams.empty()) {
    const std::vector<float> all = model->OutputGrams(layer);
    grams.assign(static_cast<std::size_t>(hp.n_kv_heads * square), 0.0f);
    for (int64_t h = 0; h < hp.n_heads; ++h)
      for (int64_t i = 0; i < square; ++i)
        grams[static_cast<std::size_t>(h / group * square + i)] +=
            all[static_cast<std::size_t>(h * square + i)] / static_cast<float>(group);
  }
  return grams;
}

namespace {

// scratch.expected() of the tokens [at, at + n), whose hidden states are given.
Expected<void> Expect(Compute& compute, const LearnedScores& learned, int64_t layer, int64_t at, int64_t n,
                      const float* hidden, LayerScratch& scratch) {
  constexpr int64_t kTokens = 16;  // to a thread at a time
  const int64_t width = learned.n_embd;
  n = std::min(n, scratch.score_tokens() - at);
  if (n <= 0) return {};
  return compute.ParallelFor((n + kTokens - 1) / kTokens, [&](int64_t i, int) {
    for (int64_t t = i * kTokens; t < std::min(n, (i + 1) * kTokens); ++t) {
      const float* state = hidden + t * width;
      const float scale = InverseRms(state, width);
      for (int64_t h = 0; h < learned.n_kv_heads; ++h)
        scratch.expected(h)[at + t] = scale * Dot(learned.head(layer, h), state, width);
    }
  });
}

}  // namespace

Expected<void> Engine::Impl::ReadLayerByLayer(std::span<const int32_t> tokens, int64_t first,
                                              const LayerHooks& hooks, std::vector<float>& logits,
                                              const Progress& progress, std::vector<float>* hidden_out) {
  const HyperParams& hp = model->hparams();
  const auto n = static_cast<int64_t>(tokens.size());
  const int64_t block = compute->block_tokens();
  MOEND_ASSIGN(auto hidden, Buffer<float>::Create(hooks.ledger, n * hp.n_embd));
  const std::unique_ptr<PrefillHook, void (*)(PrefillHook*)> sums(prefill.get(),
                                                                  [](PrefillHook* p) { p->DropSums(); });
  MOEND_TRY(compute->Embed(tokens, hidden.data()));
  const std::span<float> states(hidden.data(), static_cast<std::size_t>(n * hp.n_embd));
  const Compute::OnDevice on_device(*compute, states);
  std::optional<Repetition> repetition;
  int64_t blocks = 0;
  const auto go_on = [&]() -> bool {
    if (!progress) return true;
    const int64_t again = repetition ? repetition->tokens() : 0;
    const double all = static_cast<double>(hp.n_layers * (n + again)) / static_cast<double>(block);
    return progress(std::min(1.0, static_cast<double>(++blocks) / all));
  };
  for (int64_t l = 0; l < hp.n_layers; ++l) {
    std::span<const LayerCache> past;
    LayerScratch* scratch = nullptr;
    MOEND_TRY(hooks.begin(l, &past, &scratch));
    if (l == 0 && scratch->needed(0)) {
      MOEND_ASSIGN(repetition, Repetition::Create(*compute, hooks.ledger, tokens));
    }
    MOEND_TRY(prefill->Begin(past, scratch));
    for (int64_t done = 0; done < n; done += block) {
      const int64_t m = std::min(block, n - done);
      const float* entering = hidden.data() + done * hp.n_embd;
      const bool expects =
          hooks.learned && scratch->expected(0) && hp.layers[static_cast<std::size_t>(l)].compresses();
      if (hooks.watch || expects)
        MOEND_TRY(compute->Fetch({entering, static_cast<std::size_t>(m * hp.n_embd)}));
      if (hooks.watch) hooks.watch(l, done, m, entering);
      if (expects) MOEND_TRY(Expect(*compute, *hooks.learned, l, done, m, entering, *scratch));
      MOEND_TRY(compute->Layer(l, hidden.data() + done * hp.n_embd, m, first + done,
                               hooks.listener ? *hooks.listener : *prefill));
      if (!go_on()) return Fail(ErrorCode::kCancelled, "reading the prompt was stopped");
    }
    MOEND_TRY(compute->Settle());
    prefill->EndAccumulation();
    if (repetition) {
      const bool full = hp.layers[static_cast<std::size_t>(l)].compresses();
      const auto grams = full ? ValueGrams(l) : std::span<const float>();
      MOEND_TRY(repetition->Layer(l, *scratch, grams, *prefill, go_on));
    }
    MOEND_TRY(hooks.end(l, *scratch));
  }
  if (repetition && hooks.copy_loss) {
    MOEND_ASSIGN(*hooks.copy_loss, repetition->CopyLoss());
  }
  MOEND_TRY(compute->Fetch(hidden_out ? states : states.last(static_cast<std::size_t>(hp.n_embd))));
  if (hidden_out) MOEND_TRY(AppendFloats(*hidden_out, hidden.data(), n * hp.n_embd));
  logits.resize(static_cast<std::size_t>(hp.n_vocab));
  return compute->Head(hidden.data() + (n - 1) * hp.n_embd, 1, logits.data());
}

}  // namespace moend
