// A context read once with nothing compressed, so that many plans can be tried on it without reading it
// again.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "moend/engine/engine.h"
#include "moend/engine/layer_scratch.h"
#include "moend/score/scorer.h"

namespace moend {

class KvCapture {
 public:
  // Reads `tokens`; keeps every layer's K/V (at 16 bit) and what the scorers named need to score them.
  // `learned`: for the scorer of this name.
  // `ledger` provides the memory (SpillLedger: files); null: one of its own.
  static Expected<KvCapture> Create(std::shared_ptr<Engine> engine, std::span<const int32_t> tokens,
                                    std::span<const std::string> scorers, const Progress& progress = {},
                                    std::shared_ptr<Ledger> ledger = {},
                                    std::shared_ptr<const LearnedScores> learned = {});

  const std::vector<int32_t>& tokens() const { return tokens_; }
  const std::vector<float>& logits() const { return logits_; }  // of the last token
  const LayerScratch& layer(int64_t l) const { return layers_[static_cast<std::size_t>(l)]; }
  int64_t bytes() const { return ledger_->live(); }

 private:
  std::shared_ptr<Ledger> ledger_;
  std::vector<int32_t> tokens_;
  std::vector<float> logits_;
  std::vector<LayerScratch> layers_;
};

// As if a new session had just prefilled the capture's tokens.
Expected<Session> SessionFromCapture(std::shared_ptr<Engine> engine, const Plan& plan,
                                     const KvCapture& capture, const SessionOptions& options = {});

}  // namespace moend
