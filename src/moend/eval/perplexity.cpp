#include "moend/eval/perplexity.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>

#include "moend/engine/capture.h"

namespace moend::eval {
namespace {

constexpr int64_t kLeastContext = 8;

// ln(sum(exp(x))) without overflow.
double LogSumExp(std::span<const float> x) {
  const double top = *std::ranges::max_element(x);
  double sum = 0;
  for (const float v : x) sum += std::exp(double{v} - top);
  return top + std::log(sum);
}

// A plan that is routed by KV head says nothing with its layers.
bool Compresses(const Plan& plan) {
  return std::ranges::any_of(plan.heads.empty() ? plan.layers : plan.heads,
                             [](const Expert& e) { return e != Expert{}; });
}

struct Samples {
  std::vector<double> nll, nll_base, ln_ratio, kld, same_top;
  double nll_sum = 0;  // so that the progress costs nothing
  double kv_bytes = 0, kv_bytes_full = 0;
};

// The second half of one chunk, predicted over the compressed first half and, if wanted, over the full one.
class ChunkReader {
 public:
  ChunkReader(std::shared_ptr<Engine> engine, const Plan& plan, const std::string& scorer)
      : engine_(std::move(engine)), plan_(plan), scorer_(scorer), compare_(Compresses(plan)) {
    full_ = FullPlan(engine_->fingerprint(), plan.context_length);
  }

  // tick() gets the predicted tokens of the chunk so far and may stop.
  Expected<void> Read(std::span<const int32_t> chunk, Samples& samples,
                      const std::function<bool(int64_t)>& tick) {
    const std::size_t first = chunk.size() / 2;
    const auto n_ctx = static_cast<int64_t>(chunk.size());
    const auto head = chunk.first(first + 1);
    const std::vector<std::string> scorers = {scorer_.empty() ? plan_.scorer : scorer_};
    MOEND_ASSIGN(const KvCapture capture,
                 KvCapture::Create(engine_, head, scorers, [&](double) { return tick(0); }));
    MOEND_ASSIGN(Session session, SessionFromCapture(engine_, plan_, capture, {n_ctx, scorer_}));
    std::optional<Session> base;
    if (compare_) {
      MOEND_ASSIGN(base, SessionFromCapture(engine_, full_, capture, {n_ctx, ""}));
    }
    const KvStats stats = session.stats();
    samples.kv_bytes += static_cast<double>(stats.bytes);
    samples.kv_bytes_full += static_cast<double>(stats.bytes_full);
    for (std::size_t i = first + 1; i < chunk.size(); ++i) {
      MOEND_TRY(Score(session, base, chunk[i], samples));
      if (i + 1 == chunk.size()) break;
      if (!tick(static_cast<int64_t>(i - first))) return Fail(ErrorCode::kCancelled, "stopped");
      if (base) {
        const std::array<Session*, 2> both = {&session, &*base};
        const std::array<int32_t, 2> token = {chunk[i], chunk[i]};
        MOEND_TRY(Session::DecodeBatch(both, token));
      } else {
        MOEND_TRY(session.Decode(chunk[i]));
      }
    }
    return {};
  }

 private:
  static Expected<void> Score(const Session& session, const std::optional<Session>& base, int32_t next,
                              Samples& samples) {
    const TokenLoss loss = LossOf(session.logits(), next);
    samples.nll.push_back(loss.nll);
    samples.nll_sum += loss.nll;
    if (!std::isfinite(loss.nll)) return NoNumber("log likelihood");
    if (!base) return {};
    const TokenLoss loss_base = LossOf(base->logits(), next);
    samples.nll_base.push_back(loss_base.nll);
    samples.ln_ratio.push_back(loss.nll - loss_base.nll);
    samples.kld.push_back(KlDivergence(base->logits(), session.logits()));
    samples.same_top.push_back(loss.top == loss_base.top ? 1 : 0);
    if (!std::isfinite(loss_base.nll) || !std::isfinite(samples.kld.back())) return NoNumber("KL divergence");
    return {};
  }
  static std::unexpected<Error> NoNumber(std::string_view what) {
    return Fail(ErrorCode::kInternal, "the {} of a predicted token is no number", what);
  }

  std::shared_ptr<Engine> engine_;
  const Plan& plan_;
  Plan full_;
  std::string scorer_;
  bool compare_;
};

MeanError Exponential(const MeanError& nll) {
  const double ppl = std::exp(nll.mean);
  return {ppl, ppl * nll.error};
}

PerplexityResult Summarize(Samples& samples, int64_t chunks) {
  PerplexityResult r;
  r.chunks = chunks;
  r.tokens = static_cast<int64_t>(samples.nll.size());
  r.nll = MeanOf(samples.nll);
  r.ppl = Exponential(r.nll);
  r.kv_bytes = std::llround(samples.kv_bytes / static_cast<double>(chunks));
  r.kv_bytes_full = std::llround(samples.kv_bytes_full / static_cast<double>(chunks));
  if (samples.kld.empty()) return r;
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

TokenLoss LossOf(std::span<const float> logits, int32_t next) {
  const auto top = std::ranges::max_element(logits) - logits.begin();
  return {LogSumExp(logits) - double{logits[static_cast<std::size_t>(next)]}, static_cast<int32_t>(top)};
}

double KlDivergence(std::span<const float> base, std::span<const float> logits) {
  const double z_base = LogSumExp(base), z = LogSumExp(logits);
  double sum = 0;
  for (std::size_t i = 0; i < base.size(); ++i) {
    const double ln_p = double{base[i]} - z_base;
    sum += std::exp(ln_p) * (ln_p - (double{logits[i]} - z));
  }
  return sum < 0 ? 0 : sum;  // rounding; what is no number stays so
}

MeanError MeanOf(std::span<const double> values) {
  if (values.empty()) return {};
  const double n = static_cast<double>(values.size());
  double sum = 0, squares = 0;
  for (const double v : values) sum += v;
  const double mean = sum / n;
  for (const double v : values) squares += (v - mean) * (v - mean);
  return {mean, n > 1 ? std::sqrt(squares / (n - 1) / n) : 0};
}

Quantile QuantileOf(std::span<const double> sorted, double share) {
  if (sorted.empty()) return {};
  const double last = static_cast<double>(sorted.size() - 1);
  const auto at = [&](double index) {  // between order statistics, linear
    index = std::clamp(index, 0.0, last);
    const auto below = static_cast<std::size_t>(index);
    const double part = index - std::floor(index);
    return part == 0 ? sorted[below] : sorted[below] + part * (sorted[below + 1] - sorted[below]);
  };
  const double half = 1.96 * std::sqrt(static_cast<double>(sorted.size()) * share * (1 - share));
  return {at(share * last), at(std::floor(share * last - half)), at(std::ceil(share * last + half))};
}

Expected<PerplexityResult> Perplexity(std::shared_ptr<Engine> engine, std::span<const int32_t> tokens,
                                      const Plan& plan, const PerplexityOptions& options,
                                      const std::function<bool(const PerplexityProgress&)>& progress) {
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
  ChunkReader reader(engine, plan, options.scorer);
  Samples samples;
  for (int64_t c = 0; c < chunks; ++c) {
    const auto part =
        tokens.subspan(static_cast<std::size_t>(c * options.n_ctx), static_cast<std::size_t>(options.n_ctx));
    std::vector<int32_t> chunk(part.begin(), part.end());
    if (bos >= 0) chunk[0] = bos;
    const double per_chunk = static_cast<double>(options.n_ctx - 1 - options.n_ctx / 2);
    const auto tick = [&](int64_t done) {
      if (!progress) return true;
      const double share =
          (static_cast<double>(c) + static_cast<double>(done) / per_chunk) / static_cast<double>(chunks);
      const auto n = static_cast<double>(samples.nll.size());
      return progress({share, c, chunks, n > 0 ? std::exp(samples.nll_sum / n) : 0});
    };
    MOEND_TRY(reader.Read(chunk, samples, tick));
  }
  return Summarize(samples, chunks);
}

std::string FormatPerplexity(const PerplexityResult& r) {
  std::string out;
  const auto line = [&](std::string_view name, std::string value) {
    out += fmt::format("{:<28}: {}\n", name, value);
  };
  const auto mean = [](const MeanError& m) { return fmt::format("{:10.6f} ± {:9.6f}", m.mean, m.error); };
  const auto quantile = [](const Quantile& q) {
    return fmt::format("{:10.6f} [{:.6f}, {:.6f}]", q.value, q.low, q.high);
  };
  const bool compared = r.ppl_base.mean > 0;
  out += "====== Perplexity statistics ======\n";
  line(compared ? "Mean PPL(Q)" : "Mean PPL", mean(r.ppl));
  if (compared) {
    line("Mean PPL(base)", mean(r.ppl_base));
    line("Mean ln(PPL(Q)/PPL(base))", mean(r.ln_ratio));
    out += "\n====== KL divergence statistics ======\n";
    line("Mean    KLD", mean(r.kld));
    line("Maximum KLD", fmt::format("{:10.6f}", r.kld_max));
    line("99.9%   KLD", quantile(r.kld_999));
    line("99.0%   KLD", quantile(r.kld_99));
    line("95.0%   KLD", quantile(r.kld_95));
    line("Median  KLD", quantile(r.kld_median));
    out += "\n====== Token probability statistics ======\n";
    line("Same top p", fmt::format("{:6.3f} ± {:5.3f} %", 100 * r.same_top.mean, 100 * r.same_top.error));
  }
  out += "\n";
  line("Tokens", fmt::format("{} in {} chunks", r.tokens, r.chunks));
  const double mib = 1024.0 * 1024.0;
  line("K/V cache",
       fmt::format(
           "{:.2f} MiB, {:.2f}x smaller than 16 bit", static_cast<double>(r.kv_bytes) / mib,
           r.kv_bytes > 0 ? static_cast<double>(r.kv_bytes_full) / static_cast<double>(r.kv_bytes) : 0));
  return out;
}

}  // namespace moend::eval
