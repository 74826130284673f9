#include "moend/eval/perplexity.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "moend/engine/capture.h"
#include "moend/eval/llama_cache.h"

namespace moend::eval {
namespace {

constexpr int64_t kLeastContext = 8;
// Predicted tokens between two looks at the logits.
constexpr int64_t kBlock = 64;

struct Samples {
  std::vector<double> nll, nll_base, ln_ratio, kld, same_top;
  double nll_sum = 0;  // so that the progress costs nothing
  double kv_bytes = 0, kv_bytes_full = 0;

  void Add(const TokenDistance& d) {
    nll.push_back(d.nll);
    nll_sum += d.nll;
    nll_base.push_back(d.nll_base);
    ln_ratio.push_back(d.nll - d.nll_base);
    kld.push_back(d.kld);
    same_top.push_back(d.same_top ? 1 : 0);
  }
};

using Tick = std::function<bool(double)>;

std::unexpected<Error> Stopped() {
  return Fail(ErrorCode::kCancelled, "stopped");
}

// The second half of one chunk, predicted over the full first half and over it as each method compresses it.
class ChunkReader {
 public:
  ChunkReader(std::shared_ptr<Engine> engine, std::span<const Method> methods, int64_t n_ctx)
      : engine_(std::move(engine)), methods_(methods), full_(FullPlan(engine_->fingerprint(), n_ctx)) {
    for (const Method& m : methods_) {
      const std::string& scorer = m.scorer.empty() ? m.plan.scorer : m.scorer;
      if (std::ranges::find(scorers_, scorer) == scorers_.end()) scorers_.push_back(scorer);
    }
  }

  // samples: of the full cache, then of each method.
  Expected<void> Read(std::span<const int32_t> chunk, std::span<Samples> samples, const Tick& tick) {
    chunk_ = chunk;
    first_ = std::ssize(chunk) / 2;  // the last token of the first half
    if (methods_.empty()) return ReadFull(samples[0], tick);
    const auto n_ctx = std::ssize(chunk);
    const auto head = chunk.first(static_cast<std::size_t>(first_ + 1));
    MOEND_ASSIGN(
        const KvCapture capture,
        KvCapture::Create(
            engine_, head, scorers_, [&](double p) { return tick(0.3 * p); }, {}, LearnedOf(methods_)));
    // The full cache goes along token by token, too: on quantized weights another order of sums alone moves
    // the predictions by as much as 8 bits for K and V do.
    std::vector<Session> sessions;
    MOEND_ASSIGN(Session full, SessionFromCapture(engine_, full_, capture, {n_ctx, ""}));
    Count(full, samples[0]);
    sessions.push_back(std::move(full));
    for (const Method& m : methods_) {
      MOEND_ASSIGN(Session session, SessionFromCapture(engine_, m.plan, capture, {n_ctx, m.scorer}));
      Count(session, samples[sessions.size()]);
      sessions.push_back(std::move(session));
    }
    // The first half was read uncompressed, and so its last token predicts the same for all.
    const TokenDistance same = DistanceOf(capture.logits(), capture.logits(), chunk[head.size()]);
    for (Samples& of : samples) of.Add(same);
    return Follow(sessions, samples, tick);
  }

 private:
  // Nothing to compare: the whole chunk is one prompt.
  Expected<void> ReadFull(Samples& samples, const Tick& tick) {
    MOEND_ASSIGN(Session session, Session::Create(engine_, full_, {std::ssize(chunk_), ""}));
    std::vector<float> hidden;
    MOEND_TRY(session.Prefill(
        chunk_.first(chunk_.size() - 1), [&](double p) { return tick(0.8 * p); }, &hidden));
    MOEND_ASSIGN(const int64_t bytes, PlanBytes(full_, first_ + 1, 0));
    samples.kv_bytes += static_cast<double>(bytes);
    samples.kv_bytes_full += static_cast<double>(FullBytes(full_.model, first_ + 1));
    const int64_t n_embd = engine_->model().hparams().n_embd, n_vocab = engine_->model().hparams().n_vocab;
    std::vector<float> logits(static_cast<std::size_t>(kBlock * n_vocab));
    for (int64_t i = first_; i + 1 < std::ssize(chunk_);) {
      const int64_t n = std::min(kBlock, std::ssize(chunk_) - 1 - i);
      const auto rows = std::span(logits).first(static_cast<std::size_t>(n * n_vocab));
      MOEND_TRY(engine_->Logits(std::span(hidden).subspan(static_cast<std::size_t>(i * n_embd),
                                                          static_cast<std::size_t>(n * n_embd)),
                                rows));
      std::vector<double> nll(static_cast<std::size_t>(n));
      MOEND_TRY(engine_->ParallelFor(n, [&](int64_t r, int) {
        const auto row =
            rows.subspan(static_cast<std::size_t>(r * n_vocab), static_cast<std::size_t>(n_vocab));
        nll[static_cast<std::size_t>(r)] = LossOf(row, chunk_[static_cast<std::size_t>(i + r + 1)]).nll;
      }));
      for (const double value : nll) {
        if (!std::isfinite(value))
          return Fail(ErrorCode::kInternal, "the model's predictions are not numbers");
        samples.Add({value, value, 0, true});
      }
      i += n;
      if (!tick(0.8 +
                0.2 * static_cast<double>(i - first_) / static_cast<double>(std::ssize(chunk_) - first_)))
        return Stopped();
    }
    return {};
  }

  static void Count(const Session& session, Samples& samples) {
    const KvStats stats = session.stats();
    samples.kv_bytes += static_cast<double>(stats.bytes);
    samples.kv_bytes_full += static_cast<double>(stats.bytes_full);
  }

  // All sessions, the full cache's first, take the second half's tokens in one step each.
  Expected<void> Follow(std::vector<Session>& sessions, std::span<Samples> samples, const Tick& tick) {
    const auto n_embd = static_cast<std::size_t>(engine_->model().hparams().n_embd);
    std::vector<Session*> all;
    for (Session& s : sessions) all.push_back(&s);
    const auto begin = static_cast<std::size_t>(first_ + 1), end = chunk_.size() - 1;
    for (std::size_t i = begin; i < end;) {
      const std::size_t n = std::min(static_cast<std::size_t>(kBlock), end - i);
      std::vector<float> hidden;  // [n][sessions][n_embd]
      for (std::size_t k = 0; k < n; ++k) {
        if (!tick(0.3 + 0.7 * static_cast<double>(i + k - begin) / static_cast<double>(end - begin)))
          return Stopped();
        MOEND_TRY(Session::DecodeBatch(all, std::vector<int32_t>(all.size(), chunk_[i + k]), &hidden));
      }
      const auto next = chunk_.subspan(i + 1, n);
      const auto rows_of = [&](std::size_t session) {
        std::vector<float> rows(n * n_embd);
        for (std::size_t k = 0; k < n; ++k)
          std::copy_n(hidden.begin() + static_cast<std::ptrdiff_t>((k * all.size() + session) * n_embd),
                      n_embd, rows.begin() + static_cast<std::ptrdiff_t>(k * n_embd));
        return rows;
      };
      const std::vector<float> base = rows_of(0);
      for (std::size_t s = 1; s < all.size(); ++s) {
        MOEND_ASSIGN(const auto distances, Distances(*engine_, base, rows_of(s), next));
        for (const TokenDistance& d : distances) {
          samples[s].Add(d);
          if (s == 1) samples[0].Add({d.nll_base, d.nll_base, 0, true});
        }
      }
      i += n;
    }
    return {};
  }

  std::shared_ptr<Engine> engine_;
  std::span<const Method> methods_;
  std::vector<std::string> scorers_;
  Plan full_;
  std::span<const int32_t> chunk_;
  int64_t first_ = 0;
};

// The same chunk by libllama, with each of the cache types and with its full cache.
class LlamaReader {
 public:
  static Expected<LlamaReader> Create(std::shared_ptr<Engine> engine, const PerplexityOptions& options) {
    LlamaReader reader;
    reader.engine_ = std::move(engine);
    MOEND_ASSIGN(reader.model_, LlamaModel::Load(reader.engine_->model().path()));
    std::vector<std::string> types = {"f16"};
    types.insert(types.end(), options.llama_caches.begin(), options.llama_caches.end());
    for (const std::string& type : types) {
      MOEND_ASSIGN(auto cache, LlamaCache::Create(reader.model_, reader.engine_->fingerprint(), type,
                                                  options.n_ctx, reader.engine_->n_threads()));
      reader.caches_.push_back(std::move(cache));
    }
    return reader;
  }

  // samples: of each type, without f16.
  Expected<void> Read(std::span<const int32_t> chunk, std::span<Samples> samples, const Tick& tick) {
    const auto n_caches = static_cast<double>(caches_.size());
    const std::size_t first = chunk.size() / 2, end = chunk.size() - 1;
    for (std::size_t c = 0; c < caches_.size(); ++c) {
      if (!tick(0.4 * static_cast<double>(c) / n_caches)) return Stopped();
      caches_[c]->Clear();
      MOEND_TRY(caches_[c]->Read(chunk.first(first)));
      if (c == 0) continue;
      const auto cells = static_cast<int64_t>(first + 1);
      samples[c - 1].kv_bytes += static_cast<double>(caches_[c]->bytes(cells));
      samples[c - 1].kv_bytes_full += static_cast<double>(caches_[0]->bytes(cells));
    }
    for (std::size_t i = first; i < end;) {
      if (!tick(0.4 + 0.6 * static_cast<double>(i - first) / static_cast<double>(end - first)))
        return Stopped();
      const std::size_t n = std::min(static_cast<std::size_t>(kBlock), end - i);
      std::vector<float> base;
      for (std::size_t c = 0; c < caches_.size(); ++c) {
        MOEND_ASSIGN(auto logits, caches_[c]->Predict(chunk.subspan(i, n)));
        if (c == 0) {
          base = std::move(logits);
          continue;
        }
        MOEND_ASSIGN(const auto distances,
                     DistancesOfLogits(*engine_, base, logits, chunk.subspan(i + 1, n)));
        for (const TokenDistance& d : distances) samples[c - 1].Add(d);
      }
      i += n;
    }
    return {};
  }

 private:
  std::shared_ptr<Engine> engine_;
  std::shared_ptr<LlamaModel> model_;
  std::vector<std::unique_ptr<LlamaCache>> caches_;  // f16 first
};

MeanError Exponential(const MeanError& nll) {
  const double ppl = std::exp(nll.mean);
  return {ppl, ppl * nll.error};
}

PerplexityResult Summarize(Samples& samples, std::string label, int64_t chunks, bool compared) {
  PerplexityResult r;
  r.label = std::move(label);
  r.chunks = chunks;
  r.tokens = static_cast<int64_t>(samples.nll.size());
  r.nll = MeanOf(samples.nll);
  r.ppl = Exponential(r.nll);
  r.kv_bytes = std::llround(samples.kv_bytes / static_cast<double>(chunks));
  r.kv_bytes_full = std::llround(samples.kv_bytes_full / static_cast<double>(chunks));
  if (!compared || samples.kld.empty()) return r;
  r.nll_base = MeanOf(samples.nll_base);
  r.ppl_base = Exponential(r.nll_base);
  r.ln_ratio = MeanOf(samples.ln_ratio);
  r.kld = MeanOf(samples.kld);
  r.same_top = MeanOf(samples.same_top);
  std::ranges::sort(samples.kld);
  r.kld_max = samples.kld.back();
  r.kld_999 = QuantileOf(samples.kld, 0.999);
  r.kld_99 = QuantileOf(samples.kld, 0.99);
  r.kld_95 = QuantileOf(samples.kld, 0.95);
  r.kld_median = QuantileOf(samples.kld, 0.5);
  return r;
}

}  // namespace

Expected<std::vector<PerplexityResult>> Perplexity(
    std::shared_ptr<Engine> engine, std::span<const int32_t> tokens, std::span<const Method> methods,
    const PerplexityOptions& options, const std::function<bool(const PerplexityProgress&)>& progress) {
  if (options.n_ctx < kLeastContext)
    return Fail(ErrorCode::kInvalidArgument, "chunks of {} tokens are too short; at least {} are needed",
                options.n_ctx, kLeastContext);
  int64_t chunks = static_cast<int64_t>(tokens.size()) / options.n_ctx;
  if (chunks == 0)
    return Fail(ErrorCode::kInvalidArgument, "the text has {} tokens, less than one chunk of {}",
                tokens.size(), options.n_ctx);
  if (options.chunks > 0) chunks = std::min(chunks, options.chunks);
  const Tokenizer& tokenizer = engine->model().tokenizer();
  const int32_t bos = tokenizer.adds_bos() ? tokenizer.bos() : -1;
  std::vector<Method> compressing;
  for (const Method& m : methods)
    if (Compresses(m.plan)) compressing.push_back(m);
  ChunkReader reader(engine, compressing, options.n_ctx);
  std::optional<LlamaReader> llama;
  if (!options.llama_caches.empty()) {
    MOEND_ASSIGN(llama, LlamaReader::Create(engine, options));
  }
  const double of_ours =
      static_cast<double>(compressing.size() + 1) /
      static_cast<double>(compressing.size() + 1 + (llama ? options.llama_caches.size() + 1 : 0));
  std::vector<Samples> ours(compressing.size() + 1), theirs(options.llama_caches.size());
  for (int64_t c = 0; c < chunks; ++c) {
    const auto part =
        tokens.subspan(static_cast<std::size_t>(c * options.n_ctx), static_cast<std::size_t>(options.n_ctx));
    std::vector<int32_t> chunk(part.begin(), part.end());
    if (bos >= 0) chunk[0] = bos;
    const auto report = [&](double of_chunk) {
      if (!progress) return true;
      const auto n = static_cast<double>(ours[0].nll.size());
      return progress({(static_cast<double>(c) + of_chunk) / static_cast<double>(chunks), c, chunks,
                       n > 0 ? std::exp(ours[0].nll_sum / n) : 0});
    };
    MOEND_TRY(reader.Read(chunk, ours, [&](double share) { return report(of_ours * share); }));
    if (llama)
      MOEND_TRY(
          llama->Read(chunk, theirs, [&](double share) { return report(of_ours + (1 - of_ours) * share); }));
  }
  std::vector<PerplexityResult> results;
  for (std::size_t m = 0; m < ours.size(); ++m)
    results.push_back(Summarize(ours[m], m == 0 ? "full" : LabelOf(compressing[m - 1]), chunks, m > 0));
  for (std::size_t t = 0; t < theirs.size(); ++t)
    results.push_back(Summarize(theirs[t], "llama.cpp " + options.llama_caches[t], chunks, true));
  return results;
}

}  // namespace moend::eval
