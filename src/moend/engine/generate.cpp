#include "moend/engine/generate.h"

#include <chrono>
#include <limits>
#include <optional>

#include "moend/engine/engine_impl.h"
#include "moend/engine/text_stream.h"

namespace moend {
namespace {

std::vector<std::size_t> EndTokens(const Tokenizer& tokenizer, int64_t n_vocab) {
  std::vector<std::size_t> ends;
  for (int64_t t = 0; t < n_vocab; ++t)
    if (tokenizer.IsEndOfGeneration(static_cast<int32_t>(t))) ends.push_back(static_cast<std::size_t>(t));
  return ends;
}

}  // namespace

Expected<Generated> Generate(Session& session, const GenerateOptions& options,
                             const std::function<bool(std::string_view)>& emit) {
  const auto start = std::chrono::steady_clock::now();
  const Tokenizer& tokenizer = session.impl().machine().model->tokenizer();
  Sampler sampler(options.sampler);
  TextStream stream(options.stop);
  Generated result;
  std::vector<float> masked;
  const std::vector<std::size_t> ends =
      options.ignore_end ? EndTokens(tokenizer, static_cast<int64_t>(session.logits().size()))
                         : std::vector<std::size_t>();
  std::unique_ptr<Grammar> grammar;
  if (!options.grammar.text.empty()) {
    MOEND_ASSIGN(grammar, tokenizer.MakeGrammar(options.grammar));
  }
  bool wanted = true;
  const auto show = [&](const std::string& text) {
    result.text += text;
    if (emit && wanted && !text.empty()) wanted = emit(text);
  };

  while (true) {
    if (options.max_tokens >= 0 && static_cast<int64_t>(result.tokens.size()) >= options.max_tokens) {
      result.reason = StopReason::kMaxTokens;
      break;
    }
    if (static_cast<int64_t>(session.tokens().size()) >= session.n_ctx()) {
      result.reason = StopReason::kContextFull;
      break;
    }
    std::span<const float> logits = session.logits();
    if (!ends.empty()) {
      masked.assign(logits.begin(), logits.end());
      for (const std::size_t t : ends) masked[t] = -std::numeric_limits<float>::infinity();
      logits = masked;
    }
    std::optional<int32_t> picked;
    if (grammar) {
      MOEND_ASSIGN(picked, SampleAllowed(sampler, *grammar, logits));
    } else {
      picked = sampler.Sample(logits);
    }
    // With a grammar that is at its end nothing may follow, the end wanted or not.
    if (!picked || (!options.ignore_end && tokenizer.IsEndOfGeneration(*picked))) {
      result.reason = StopReason::kEndOfText;
      break;
    }
    const int32_t token = *picked;
    if (grammar) grammar->Accept(token);
    result.tokens.push_back(token);
    show(stream.Push(tokenizer.Piece(token, options.special)));
    MOEND_TRY(session.Decode(token));
    if (stream.stopped()) {
      result.reason = StopReason::kStopString;
      break;
    }
    if (!wanted) {
      result.reason = StopReason::kCancelled;
      break;
    }
  }
  show(stream.Finish());
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

}  // namespace moend
