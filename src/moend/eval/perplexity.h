// How much the model's predictions change: perplexity of a text, and the KL divergence of every predicted
// token's distribution from the one that the full cache gives. In llama.cpp's terms (tools/perplexity): the
// text is cut into chunks of n_ctx tokens; the first half of a chunk is read, and the second half is
// predicted one token after the other. Here the first half is compressed before, and eviction goes on while
// reading.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "moend/base/error.h"
#include "moend/engine/engine.h"
#include "moend/eval/distance.h"
#include "moend/eval/methods.h"
#include "moend/plan/plan.h"

namespace moend::eval {

// Of one cache: the full one, one compressed by a method, or one of libllama's.
struct PerplexityResult {
  std::string label;               // "full", "2d_heads/keydiff 14x", "llama.cpp q4_0"
  int64_t chunks = 0, tokens = 0;  // predicted tokens
  MeanError nll, ppl;              // nats a token, and exp of it
  // Against the full cache, all zero where this is the full cache. libllama's caches are compared with its
  // own full one, so that differences of the two programs' kernels do not count.
  MeanError nll_base, ppl_base;
  MeanError ln_ratio;  // ln(PPL / PPL of the full cache), token by token
  MeanError kld;       // KL(full || compressed), nats a token
  double kld_max = 0;
  Quantile kld_999, kld_99, kld_95, kld_median;
  MeanError same_top;                       // share of tokens whose likeliest prediction is the same, 0 to 1
  int64_t kv_bytes = 0, kv_bytes_full = 0;  // after the first half, mean over the chunks
};

struct PerplexityOptions {
  int64_t n_ctx = 512;  // tokens of a chunk, at least 8
  int64_t chunks = 0;   // at most so many; 0: all that the text gives
  // Types of libllama's K/V cache to run beside, as "q8_0" (llama_cache.h).
  std::vector<std::string> llama_caches = {};
};

struct PerplexityProgress {
  double share = 0;
  int64_t chunk = 0, chunks = 0;
  double ppl = 0;  // of the full cache so far; 0 before the first token
};

// The full cache first, then every method that compresses, then libllama's caches. The first half of a chunk
// is read once; the second half goes through all of them in one step a token, as generation would, because
// eviction goes on in between; logits come out in blocks of rows. The full cache alone reads a chunk as one
// prompt. kInvalidArgument when the text has less than one chunk. Returning false from `progress` stops with
// kCancelled.
Expected<std::vector<PerplexityResult>> Perplexity(
    std::shared_ptr<Engine> engine, std::span<const int32_t> tokens, std::span<const Method> methods,
    const PerplexityOptions& options, const std::function<bool(const PerplexityProgress&)>& progress = {});

// The long form, in llama.cpp's layout, of one cache.
std::string FormatPerplexity(const PerplexityResult& result);
// A Markdown table, a row a cache.
std::string FormatPerplexities(std::span<const PerplexityResult> results);
// {"moend": "perplexity", "model", "n_ctx", "text", "results": [{"label", "ppl", "kld", ...}]}
std::string PerplexitiesToJson(std::span<const PerplexityResult> results, const Fingerprint& model,
                               int64_t n_ctx, const std::string& text);

}  // namespace moend::eval
