#include "moend/engine/engine.h"

#include <algorithm>

#include "moend/base/caught.h"
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
    const HyperParams& hp = model->hparams();
    MOEND_ASSIGN(impl->prefill,
                 PrefillHook::Create(hp, impl->compute->n_threads(), impl->compute->block_tokens()));
    MOEND_ASSIGN(impl->decode, DecodeHook::Create(hp, impl->compute->n_threads()));
    return std::shared_ptr<Engine>(new Engine(std::move(impl)));
  });
}

const Model& Engine::model() const {
  return *impl_->model;
}
int Engine::n_threads() const {
  return impl_->compute->n_threads();
}

Fingerprint Engine::fingerprint() const {
  const HyperParams& hp = model().hparams();
  return {hp.architecture_name, hp.name, hp.n_layers, {hp.n_kv_heads, hp.head_size}, model().hash()};
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

Expected<void> Engine::Impl::ReadLayerByLayer(std::span<const int32_t> tokens, int64_t first,
                                              const LayerHooks& hooks, std::vector<float>& logits,
                                              const Progress& progress) {
  const HyperParams& hp = model->hparams();
  const auto n = static_cast<int64_t>(tokens.size());
  const int64_t block = compute->block_tokens();
  MOEND_ASSIGN(auto hidden, Buffer<float>::Create(hooks.ledger, n * hp.n_embd));
  const std::unique_ptr<PrefillHook, void (*)(PrefillHook*)> sums(prefill.get(),
                                                                  [](PrefillHook* p) { p->DropSums(); });
  MOEND_TRY(compute->Embed(tokens, hidden.data()));
  for (int64_t l = 0; l < hp.n_layers; ++l) {
    std::span<const LayerCache> past;
    LayerScratch* scratch = nullptr;
    MOEND_TRY(hooks.begin(l, &past, &scratch));
    MOEND_TRY(prefill->Begin(past, scratch));
    for (int64_t done = 0; done < n; done += block) {
      const int64_t m = std::min(block, n - done);
      MOEND_TRY(compute->Layer(l, hidden.data() + done * hp.n_embd, m, first + done, *prefill));
      if (progress &&
          !progress((static_cast<double>(l) + static_cast<double>(done + m) / static_cast<double>(n)) /
                    static_cast<double>(hp.n_layers)))
        return Fail(ErrorCode::kCancelled, "reading the prompt was stopped");
    }
    prefill->EndAccumulation();
    MOEND_TRY(hooks.end(l, *scratch));
  }
  logits.resize(static_cast<std::size_t>(hp.n_vocab));
  return compute->Head(hidden.data() + (n - 1) * hp.n_embd, 1, logits.data());
}

}  // namespace moend
