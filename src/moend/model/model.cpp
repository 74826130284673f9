#include "moend/model/model.h"

#include <algorithm>

#include <ggml-cpu.h>

#include <utility>

#include "moend/base/caught.h"
#include "moend/model/device.h"
#include "moend/model/device_weights.h"
#include "moend/model/fingerprint.h"
#include "moend/model/gguf.h"
#include "moend/model/hparams.h"
#include "moend/model/key_balance.h"
#include "moend/model/output_gram.h"
#include "moend/model/tokenizer.h"
#include "moend/model/weights.h"

namespace moend {

bool HyperParams::recurrent() const {
  return std::ranges::any_of(layers, &LayerParams::holds_state);
}

int64_t HyperParams::state_floats() const {
  int64_t most = 0;
  for (const LayerParams& l : layers)
    if (l.holds_state()) most = std::max(most, l.delta_net.state_floats());
  return most;
}

namespace {

class LoadedModel final : public Model {
 public:
  LoadedModel(GgufFile file, HyperParams hparams, BoundWeights bound,
              std::unique_ptr<DeviceWeights> on_device, std::unique_ptr<Tokenizer> tokenizer,
              std::string hash)
      : file_(std::move(file)),
        hparams_(std::move(hparams)),
        bound_(std::move(bound)),
        on_device_(std::move(on_device)),
        tokenizer_(std::move(tokenizer)),
        hash_(std::move(hash)) {}

  const std::string& path() const override { return file_.path(); }
  const HyperParams& hparams() const override { return hparams_; }
  const Weights& weights() const override { return bound_.weights; }
  bool has_tokenizer() const override { return tokenizer_ != nullptr; }
  const Tokenizer& tokenizer() const override { return *tokenizer_; }
  const std::string& hash() const override { return hash_; }
  std::vector<float> KeyBalance(int64_t layer) const override {
    return moend::KeyBalance(file_, *this, layer);
  }
  std::vector<float> OutputGrams(int64_t layer) const override {
    return moend::OutputGrams(file_, *this, layer);
  }
  int64_t file_bytes() const override { return file_.total_bytes(); }
  int64_t repacked_bytes() const override { return bound_.repacked.bytes; }
  const DeviceWeights* device() const override { return on_device_.get(); }

 private:
  GgufFile file_;  // before what points into it
  HyperParams hparams_;
  BoundWeights bound_;
  std::unique_ptr<DeviceWeights> on_device_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::string hash_;
};

}  // namespace

Expected<std::shared_ptr<const Model>> Model::Load(const std::string& path, const LoadOptions& options) {
  return Caught("loading a model", [&]() -> Expected<std::shared_ptr<const Model>> {
    StartLibllama();  // before ggml repacks weights, which it would print
    ggml_cpu_init();  // tables of the half float conversions; safe to repeat
    MOEND_ASSIGN(GgufFile file, GgufFile::Open(path, options.map));
    MOEND_ASSIGN(HyperParams hparams, ReadHyperParams(file));
    MOEND_ASSIGN(const ggml_backend_dev_t device, FindDevice(options.device.name));
    MOEND_ASSIGN(const int64_t first, FirstDeviceLayer(file, hparams, options.device, device));
    MOEND_ASSIGN(BoundWeights bound, BindWeights(file, hparams, options.repack, first));
    std::unique_ptr<DeviceWeights> on_device;
    if (first <= hparams.n_layers) {
      MOEND_ASSIGN(on_device, CopyToDevice(bound.weights, hparams, device, first));
    }
    std::unique_ptr<Tokenizer> tokenizer;
    if (options.vocabulary) {
      MOEND_ASSIGN(tokenizer, LoadTokenizer(file, hparams.n_vocab));
    }
    std::string hash = ModelHash(file, hparams);
    // libllama read the file by its name; and what was checked must be what stays.
    MOEND_TRY(file.CheckUnchanged());
    return std::make_shared<const LoadedModel>(std::move(file), std::move(hparams), std::move(bound),
                                               std::move(on_device), std::move(tokenizer), std::move(hash));
  });
}

}  // namespace moend
