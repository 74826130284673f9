#include "moend/cache/value_refit.h"

#include <algorithm>
#include <cmath>

#include "moend/attention/attention.h"
#include "moend/base/half.h"
#include "moend/base/ledger.h"

namespace moend {
namespace {

constexpr int64_t kHeldOut = 4;       // every so many reference tokens one is held out
constexpr int64_t kRowsPerToken = 2;  // reference rows that a kept token needs
constexpr int64_t kMostSteps = 8;
constexpr double kRidge = 1e-3;       // of the mean of what a kept token receives
constexpr double kWorthwhile = 0.98;  // of the error before, at most

// Kept tokens as the kernels read them; the values change from call to call.
class Kept {
 public:
  static Expected<Kept> Create(int64_t head_size, std::span<const float> keys) {
    Kept kept;
    kept.d_ = head_size;
    kept.n_ = static_cast<int64_t>(keys.size()) / head_size;
    const int64_t pages = (kept.n_ + kPageTokens - 1) / kPageTokens;
    MOEND_ASSIGN(kept.k_, Buffer<uint16_t>::Create(nullptr, pages * kPageTokens * head_size));
    MOEND_ASSIGN(kept.v_, Buffer<uint16_t>::Create(nullptr, pages * kPageTokens * head_size));
    std::fill_n(kept.k_.data(), kept.k_.size(), uint16_t{0});
    for (int64_t t = 0; t < kept.n_; ++t)
      for (int64_t c = 0; c < head_size; ++c)
        kept.k_[t / kPageTokens * head_size * kPageTokens + c * kPageTokens + t % kPageTokens] =
            FloatToHalf(keys[static_cast<std::size_t>(t * head_size + c)]);
    return kept;
  }
  DenseView With(std::span<const float> values) {
    for (int64_t i = 0; i < n_ * d_; ++i) v_[i] = FloatToHalf(values[static_cast<std::size_t>(i)]);
    return view();
  }
  DenseView view() const { return {d_, k_.data(), v_.data(), n_}; }
  int64_t n() const { return n_; }

 private:
  int64_t d_ = 0, n_ = 0;
  Buffer<uint16_t> k_, v_;
};

constexpr int64_t kRowsAtOnce = 192;  // of queries, to a thread at a time
constexpr int64_t kPagesAtOnce = 4;   // of kept tokens, likewise

// Some of the reference queries, and what the kernels need beside them.
class Queries {
 public:
  static Expected<Queries> Create(const QueryRows& all, int64_t head_size, bool held_out,
                                  const Parallel& parallel) {
    Queries q(parallel);
    q.d_ = head_size;
    q.style_ = all;
    for (int64_t token = 0; token < all.rows / all.group; ++token) {
      if ((token % kHeldOut == kHeldOut - 1) != held_out) continue;
      const float* from = all.q + token * all.group * head_size;
      q.q_.insert(q.q_.end(), from, from + all.group * head_size);
    }
    q.rows_ = static_cast<int64_t>(q.q_.size()) / head_size;
    q.state_.resize(static_cast<std::size_t>(q.rows_ * 2));
    for (int i = 0; i < parallel.n_threads; ++i) {
      MOEND_ASSIGN(auto workspace, Buffer<float>::Create(nullptr, WorkspaceFloats(head_size, q.rows_)));
      q.workspaces_.push_back(std::move(workspace));
    }
    return q;
  }
  int64_t rows() const { return rows_; }

  // f32 [rows][head_size]: attention to all of kv. The softmax of the last call is what Transposed() uses.
  Expected<std::vector<float>> Attend(const DenseView& kv) {
    std::vector<float> out(static_cast<std::size_t>(rows_ * d_));
    InitState({out.data(), state_.data(), state_.data() + rows_}, Some(0, rows_), d_);
    MOEND_TRY(parallel_.run((rows_ + kRowsAtOnce - 1) / kRowsAtOnce, [&](int64_t i, int thread) {
      const int64_t first = i * kRowsAtOnce, rows = std::min(kRowsAtOnce, rows_ - first);
      const SoftmaxState state{out.data() + first * d_, state_.data() + first, state_.data() + rows_ + first};
      simd::AttendCausal(kv, kv.n_tokens, Some(first, rows), state, workspace(thread));
      simd::Finish(state, rows, d_);
    }));
    return out;
  }
  // f32 [tokens of kv][head_size]: the sum of `rows` by what each gave to a token.
  Expected<std::vector<float>> Transposed(const DenseView& kv, std::span<const float> rows) {
    std::vector<float> out(static_cast<std::size_t>(kv.n_tokens * d_), 0.0f);
    MOEND_TRY(ForTokens(kv, [&](const DenseView& part, int64_t first, int thread) {
      simd::ColumnOutputsCausal(part, part.n_tokens, Some(0, rows_), state_.data(), state_.data() + rows_,
                                rows.data(), out.data() + first * d_, workspace(thread));
    }));
    return out;
  }
  // What each token of kv received.
  Expected<std::vector<float>> Received(const DenseView& kv) {
    std::vector<float> out(static_cast<std::size_t>(kv.n_tokens), 0.0f);
    MOEND_TRY(ForTokens(kv, [&](const DenseView& part, int64_t first, int thread) {
      simd::ColumnSumsCausal(part, part.n_tokens, 0, part.n_tokens, Some(0, rows_), state_.data(),
                             state_.data() + rows_, out.data() + first, workspace(thread));
    }));
    return out;
  }

 private:
  explicit Queries(const Parallel& parallel) : parallel_(parallel) {}
  // They come behind all tokens, and see them, whichever token a row is of.
  QueryRows Some(int64_t first, int64_t rows) const {
    QueryRows some = style_;
    some.q = q_.data() + first * d_;
    some.rows = rows;
    return some;
  }
  float* workspace(int thread) { return workspaces_[static_cast<std::size_t>(thread)].data(); }
  template <class Body>
  Expected<void> ForTokens(const DenseView& kv, const Body& body) {
    constexpr int64_t kTokens = kPagesAtOnce * kPageTokens;
    return parallel_.run((kv.n_tokens + kTokens - 1) / kTokens, [&](int64_t i, int thread) {
      const int64_t first = i * kTokens;
      const DenseView part{d_, kv.k + first * d_, kv.v + first * d_, std::min(kTokens, kv.n_tokens - first)};
      body(part, first, thread);
    });
  }

  const Parallel& parallel_;
  int64_t d_ = 0, rows_ = 0;
  QueryRows style_;               // what they have beside q and rows
  std::vector<float> q_, state_;  // [rows][head_size]; max [rows], sum [rows]
  std::vector<Buffer<float>> workspaces_;
};

double Squares(std::span<const float> x) {
  double sum = 0;
  for (const float v : x) sum += double{v} * v;
  return sum;
}

void Subtract(std::vector<float>& from, std::span<const float> what) {
  for (std::size_t i = 0; i < from.size(); ++i) from[i] -= what[i];
}

// Of each channel: the inner product over the tokens.
std::vector<double> Dots(std::span<const float> a, std::span<const float> b, int64_t channels) {
  std::vector<double> dots(static_cast<std::size_t>(channels), 0.0);
  for (std::size_t i = 0; i < a.size(); ++i)
    dots[i % static_cast<std::size_t>(channels)] += double{a[i]} * b[i];
  return dots;
}

}  // namespace

Expected<ValueRefit> RefitValues(const DenseView& full, std::span<const uint32_t> kept,
                                 std::span<const float> keys, const QueryRows& reference,
                                 const Parallel& parallel) {
  const int64_t d = full.head_size;
  const auto t = static_cast<int64_t>(kept.size());
  ValueRefit result;
  if (t == 0 || reference.rows < kRowsPerToken * t) return result;
  MOEND_ASSIGN(Kept stored, Kept::Create(d, keys));
  MOEND_ASSIGN(Queries train, Queries::Create(reference, d, false, parallel));
  MOEND_ASSIGN(Queries held, Queries::Create(reference, d, true, parallel));
  if (held.rows() == 0) return result;

  std::vector<float> values(static_cast<std::size_t>(t * d));
  for (int64_t i = 0; i < t; ++i)
    for (int64_t c = 0; c < d; ++c)
      values[static_cast<std::size_t>(i * d + c)] =
          HalfToFloat(full.v[static_cast<int64_t>(kept[static_cast<std::size_t>(i)]) * d + c]);
  // What attention to the kept tokens lacks.
  MOEND_ASSIGN(std::vector<float> lacks, train.Attend(full));
  MOEND_ASSIGN(std::vector<float> held_lacks, held.Attend(full));
  const double norm = Squares(held_lacks);
  MOEND_ASSIGN(const auto has, train.Attend(stored.With(values)));
  MOEND_ASSIGN(const auto held_has, held.Attend(stored.view()));
  Subtract(lacks, has);
  Subtract(held_lacks, held_has);
  if (!(norm > 0)) return result;
  result.before = result.after = Squares(held_lacks) / norm;

  // X'X is at most the diagonal of what the tokens receive (its rows add up to that, and nothing in it is
  // negative), which therefore conditions it.
  MOEND_ASSIGN(const std::vector<float> received, train.Received(stored.view()));
  double mean = 0;
  for (const float x : received) mean += x / static_cast<double>(t);
  const auto ridge = static_cast<float>(kRidge * mean);
  const auto condition = [&](const std::vector<float>& r) {
    std::vector<float> z(r.size());
    for (std::size_t i = 0; i < r.size(); ++i)
      z[i] = r[i] / (received[i / static_cast<std::size_t>(d)] + ridge);
    return z;
  };
  std::vector<float> moved(values.size(), 0.0f), best;
  MOEND_ASSIGN(std::vector<float> r, train.Transposed(stored.view(), lacks));
  std::vector<float> z = condition(r), p = z;
  std::vector<double> rz = Dots(r, z, d);
  for (int64_t step = 1; step <= kMostSteps; ++step) {
    MOEND_ASSIGN(const std::vector<float> xp, train.Attend(stored.With(p)));
    MOEND_ASSIGN(std::vector<float> ap, train.Transposed(stored.view(), xp));
    for (std::size_t i = 0; i < ap.size(); ++i) ap[i] += ridge * p[i];
    const std::vector<double> pap = Dots(p, ap, d);
    for (std::size_t i = 0; i < r.size(); ++i) {
      const std::size_t c = i % static_cast<std::size_t>(d);
      const double alpha = pap[c] > 0 ? rz[c] / pap[c] : 0;
      moved[i] += static_cast<float>(alpha * p[i]);
      r[i] -= static_cast<float>(alpha * ap[i]);
    }
    std::vector<float> left = held_lacks;
    MOEND_ASSIGN(const auto gains, held.Attend(stored.With(moved)));
    Subtract(left, gains);
    const double error = Squares(left) / norm;
    if (!(error < result.after)) break;
    result.after = error;
    result.steps = step;
    best = moved;
    z = condition(r);
    const std::vector<double> next = Dots(r, z, d);
    for (std::size_t i = 0; i < p.size(); ++i) {
      const std::size_t c = i % static_cast<std::size_t>(d);
      p[i] = z[i] + static_cast<float>(rz[c] > 0 ? next[c] / rz[c] : 0) * p[i];
    }
    rz = next;
  }
  if (best.empty() || !(result.after < kWorthwhile * result.before)) return result;
  for (std::size_t i = 0; i < values.size(); ++i) values[i] += best[i];
  result.v = std::move(values);
  return result;
}

}  // namespace moend
