#include "moend/calibrate/trials.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <numeric>
#include <random>

#include "moend/calibrate/probe.h"
#include "moend/engine/engine_impl.h"
#include "moend/engine/queries.h"

namespace moend {

struct Trials::Impl {
  std::shared_ptr<Engine> engine;
  std::unique_ptr<Scorer> scorer;
  std::vector<std::unique_ptr<Probe>> probes;
};

Trials::Trials(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Trials::Trials(Trials&&) noexcept = default;
Trials::~Trials() = default;

Expected<Trials> Trials::Create(std::shared_ptr<Engine> engine, std::span<const std::vector<int32_t>> chunks,
                                const Profile& profile, int64_t evaluated, const Progress& progress) {
  MOEND_TRY(CheckSameModel(profile.model, engine->fingerprint(), "the profile"));
  auto impl = std::make_unique<Impl>();
  MOEND_ASSIGN(impl->scorer, MakeScorer(profile.scorer));
  if (impl->scorer->needs().learned)
    return Fail(ErrorCode::kUnsupported,
                "plans are not measured with the scorer learned; measure them with {}, which it stands for",
                kReconstructScorer);
  std::shared_ptr<const QueryModel> queries;
  if (impl->scorer->needs().query_stats) {
    MOEND_ASSIGN(queries, MakeQueryModel(engine->model(), profile.queries));
  }
  Engine::Impl& machine = engine->impl();
  const std::scoped_lock lock(machine.reading, machine.busy);
  for (const std::vector<int32_t>& chunk : chunks) {
    const double first = static_cast<double>(impl->probes.size());
    impl->probes.push_back(std::make_unique<Probe>(machine, *impl->scorer, profile.guard));
    const auto tick = [&](double done) {
      return !progress || progress((first + done) / static_cast<double>(chunks.size()));
    };
    MOEND_TRY(impl->probes.back()->Read(chunk, evaluated, tick));
    impl->probes.back()->Expect(queries);
  }
  impl->engine = std::move(engine);
  return Trials(std::move(impl));
}

Expected<std::vector<double>> Trials::Kl(std::span<const Expert> experts) {
  const HyperParams& hp = impl_->engine->model().hparams();
  std::vector<Expert> heads(experts.begin(), experts.end());
  if (std::ssize(experts) == hp.n_layers) {
    heads.clear();
    for (const Expert& e : experts) heads.insert(heads.end(), static_cast<std::size_t>(hp.n_kv_heads), e);
  }
  Engine::Impl& machine = impl_->engine->impl();
  const std::scoped_lock lock(machine.reading, machine.busy);
  std::vector<double> all;
  for (const auto& probe : impl_->probes) {
    MOEND_ASSIGN(const auto kl, probe->MeasurePlan(heads));
    all.insert(all.end(), kl.begin(), kl.end());
  }
  return all;
}

namespace {

constexpr int64_t kBudgets = 5;
constexpr int kBootstraps = 2000;

double Average(std::span<const double> x) {
  return x.empty() ? 0 : std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
}

// Below n, the same on every platform (std::uniform_int_distribution is not).
std::size_t Below(std::mt19937_64& random, std::size_t n) {
  return static_cast<std::size_t>(random() % n);
}

std::vector<double> Ranks(std::span<const double> x) {
  std::vector<std::size_t> order(x.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return x[a] < x[b]; });
  std::vector<double> ranks(x.size());
  for (std::size_t i = 0; i < order.size();) {
    std::size_t end = i;
    while (end < order.size() && x[order[end]] == x[order[i]]) ++end;
    for (std::size_t j = i; j < end; ++j) ranks[order[j]] = 0.5 * static_cast<double>(i + end - 1);
    i = end;
  }
  return ranks;
}

Expected<std::vector<int64_t>> RowBytes(const Profile& profile, Rows rows, int64_t context_length,
                                        int64_t score_bytes) {
  const KvShape shape{rows == Rows::kHeads ? 1 : profile.model.shape.n_kv_heads,
                      profile.model.shape.head_size};
  std::vector<int64_t> bytes;
  for (const Expert& e : profile.experts) {
    MOEND_ASSIGN(const int64_t b, LayerBytes(shape, e, profile.guard, context_length, score_bytes));
    bytes.push_back(b);
  }
  return bytes;
}

// An index into `order` (experts by bytes) for each row, the bytes at most `budget` and close to it.
std::vector<std::size_t> RandomPlan(const std::vector<int64_t>& bytes, const std::vector<std::size_t>& order,
                                    std::size_t rows, int64_t budget, std::mt19937_64& random) {
  std::vector<std::size_t> chosen(rows);
  int64_t total = 0;
  for (std::size_t& c : chosen) {
    c = Below(random, order.size());
    total += bytes[order[c]];
  }
  while (total > budget) {
    std::size_t& c = chosen[Below(random, rows)];
    if (c == 0) {
      if (std::all_of(chosen.begin(), chosen.end(), [](std::size_t x) { return x == 0; })) break;
      continue;
    }
    total += bytes[order[c - 1]] - bytes[order[c]];
    --c;
  }
  for (std::size_t refused = 0; refused < 4 * rows;) {
    std::size_t& c = chosen[Below(random, rows)];
    const int64_t more = c + 1 < order.size() ? bytes[order[c + 1]] - bytes[order[c]] : budget;
    if (total + more > budget) {
      ++refused;
      continue;
    }
    total += more;
    ++c;
  }
  return chosen;
}

}  // namespace

double Spearman(std::span<const double> x, std::span<const double> y) {
  const std::vector<double> a = Ranks(x), b = Ranks(y);
  const double ma = Average(a), mb = Average(b);
  double ab = 0, aa = 0, bb = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    ab += (a[i] - ma) * (b[i] - mb);
    aa += (a[i] - ma) * (a[i] - ma);
    bb += (b[i] - mb) * (b[i] - mb);
  }
  return aa > 0 && bb > 0 ? ab / std::sqrt(aa * bb) : 0;
}

Correlation SpearmanInterval(std::span<const double> x, std::span<const double> y, uint64_t seed) {
  Correlation correlation;
  correlation.value = correlation.low = correlation.high = Spearman(x, y);
  if (x.size() < 3) return correlation;
  std::mt19937_64 random(seed);
  std::vector<double> values, a(x.size()), b(x.size());
  for (int i = 0; i < kBootstraps; ++i) {
    for (std::size_t j = 0; j < x.size(); ++j) {
      const std::size_t from = Below(random, x.size());
      a[j] = x[from];
      b[j] = y[from];
    }
    values.push_back(Spearman(a, b));
  }
  std::sort(values.begin(), values.end());
  correlation.low = values[kBootstraps / 40];
  correlation.high = values[kBootstraps - 1 - kBootstraps / 40];
  return correlation;
}

Expected<Validation> Validate(Trials& trials, const Profile& profile, const ValidateOptions& options,
                              const Progress& progress) {
  MOEND_ASSIGN(const auto losses, CleanLosses(profile, options.metric, options.rows));
  MOEND_ASSIGN(const auto bytes,
               RowBytes(profile, options.rows, options.context_length, options.score_bytes));
  std::vector<std::size_t> order(bytes.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return bytes[a] < bytes[b]; });
  const double full = static_cast<double>(FullBytes(profile.model, options.context_length));
  // Sliding layers are the same in every plan.
  const int64_t row_heads = options.rows == Rows::kHeads ? 1 : profile.model.shape.n_kv_heads;
  std::vector<std::size_t> full_rows;
  int64_t fixed = 0;
  for (std::size_t row = 0; row < losses.size(); ++row) {
    const int64_t window = WindowOfRow(profile.model, options.rows, row);
    if (window == 0) full_rows.push_back(row);
    if (window == 0) continue;
    MOEND_ASSIGN(const int64_t b, FixedBytes(profile.model, window, row_heads, options.context_length));
    fixed += b;
  }
  std::mt19937_64 random(options.seed);
  Validation result;
  for (int64_t i = 0; i < options.plans; ++i) {
    if (progress && !progress(static_cast<double>(i) / static_cast<double>(options.plans)))
      return Fail(ErrorCode::kCancelled, "the validation was stopped");
    const double step = static_cast<double>(i % kBudgets) / static_cast<double>(kBudgets - 1);
    ValidatedPlan plan;
    plan.compression = options.least * std::pow(options.most / options.least, step);
    const auto chosen = RandomPlan(bytes, order, full_rows.size(),
                                   static_cast<int64_t>(full / plan.compression) - fixed, random);
    plan.experts.assign(losses.size(), Expert{});
    for (std::size_t i = 0; i < full_rows.size(); ++i) {
      plan.experts[full_rows[i]] = profile.experts[order[chosen[i]]];
      plan.predicted += losses[full_rows[i]][order[chosen[i]]];
    }
    MOEND_ASSIGN(const auto kl, trials.Kl(plan.experts));
    plan.measured = Average(kl);
    result.plans.push_back(std::move(plan));
  }
  std::vector<double> x, y, parts;
  for (const ValidatedPlan& plan : result.plans) {
    x.push_back(plan.predicted);
    y.push_back(plan.measured);
  }
  result.spearman = SpearmanInterval(x, y, options.seed);
  for (std::size_t b = 0; b < static_cast<std::size_t>(kBudgets); ++b) {
    std::vector<double> px, py;
    for (std::size_t i = b; i < x.size(); i += kBudgets) {
      px.push_back(x[i]);
      py.push_back(y[i]);
    }
    if (px.size() > 2) parts.push_back(Spearman(px, py));
  }
  result.within = Average(parts);
  return result;
}

}  // namespace moend
