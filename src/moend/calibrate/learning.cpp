#include "moend/calibrate/learning.h"

#include <algorithm>
#include <cmath>

#include "moend/base/dot.h"

namespace moend {
namespace {

constexpr int64_t kRows = 8, kColumns = 256;  // of a tile of moments
constexpr int64_t kSkipped = 16;              // tokens at a text's start: attention sinks are kept anyway
constexpr double kFloor = 1e-3;               // of the mean score: what is less is as good as nothing
constexpr double kRidge = 1e-3;               // of the variance of a channel, all of which are scaled to 1

// Row i of a lower triangle, which has i + 1 numbers.
float* Row(float* triangle, int64_t i) {
  return triangle + i * (i + 1) / 2;
}

// A symmetric matrix becomes its Cholesky factor. False if it is not positive definite.
bool Factorize(float* a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float* row = Row(a, i);
    for (int64_t j = 0; j < i; ++j) row[j] = (row[j] - Dot(row, Row(a, j), j)) / Row(a, j)[j];
    const float square = row[i] - Dot(row, row, i);
    if (!(square > 0)) return false;
    row[i] = std::sqrt(square);
  }
  return true;
}

// x = (L L')^-1 x
void Substitute(float* factor, std::vector<double>& x) {
  const auto n = std::ssize(x);
  for (int64_t i = 0; i < n; ++i) {
    const float* row = Row(factor, i);
    double sum = x[static_cast<std::size_t>(i)];
    for (int64_t j = 0; j < i; ++j) sum -= double{row[j]} * x[static_cast<std::size_t>(j)];
    x[static_cast<std::size_t>(i)] = sum / row[i];
  }
  for (int64_t i = n - 1; i >= 0; --i) {
    const float* row = Row(factor, i);
    const double value = x[static_cast<std::size_t>(i)] /= row[i];
    for (int64_t j = 0; j < i; ++j) x[static_cast<std::size_t>(j)] -= row[j] * value;
  }
}

}  // namespace

Expected<ScoreLearner> ScoreLearner::Create(Compute& compute) {
  const HyperParams& hp = compute.model().hparams();
  ScoreLearner learner(compute);
  learner.width_ = hp.n_embd;
  learner.heads_ = hp.n_kv_heads;
  for (int64_t l = 0; l < hp.n_layers; ++l) {
    MOEND_ASSIGN(auto moments, Buffer<float>::Create(nullptr, hp.n_embd * (hp.n_embd + 1) / 2));
    std::fill_n(moments.data(), moments.size(), 0.0f);
    learner.moments_.push_back(std::move(moments));
  }
  learner.joint_.assign(static_cast<std::size_t>(hp.n_layers * hp.n_kv_heads * hp.n_embd), 0.0);
  return learner;
}

void ScoreLearner::Watch(int64_t at, int64_t n, const float* hidden) {
  if (at == 0) rows_.clear();
  for (int64_t i = 0; i < n; ++i, hidden += width_) {
    const float scale = InverseRms(hidden, width_);
    for (int64_t c = 0; c < width_; ++c) rows_.push_back(hidden[c] * scale);
  }
}

Expected<void> ScoreLearner::EndLayer(int64_t layer, const LayerScratch& scratch) {
  const int64_t n = std::ssize(rows_) / width_ - kSkipped;
  if (n < 2) return {};
  float* x = rows_.data() + kSkipped * width_;
  std::vector<double> mean(static_cast<std::size_t>(width_), 0.0);
  for (int64_t t = 0; t < n; ++t)
    for (int64_t c = 0; c < width_; ++c) mean[static_cast<std::size_t>(c)] += x[t * width_ + c];
  for (int64_t t = 0; t < n; ++t)
    for (int64_t c = 0; c < width_; ++c)
      x[t * width_ + c] -= static_cast<float>(mean[static_cast<std::size_t>(c)] / static_cast<double>(n));
  for (int64_t h = 0; h < heads_; ++h) {
    const float* needed = scratch.needed(h) + kSkipped;
    double sum = 0;
    for (int64_t t = 0; t < n; ++t) sum += needed[t];
    const double floor = std::max(kFloor * sum / static_cast<double>(n), 1e-30);
    std::vector<double> y(static_cast<std::size_t>(n));
    double middle = 0;
    for (int64_t t = 0; t < n; ++t)
      middle += y[static_cast<std::size_t>(t)] = std::log(double{needed[t]} + floor);
    double* joint = joint_.data() + (layer * heads_ + h) * width_;
    for (int64_t t = 0; t < n; ++t) {
      const double off = y[static_cast<std::size_t>(t)] - middle / static_cast<double>(n);
      for (int64_t c = 0; c < width_; ++c) joint[c] += off * x[t * width_ + c];
    }
  }
  float* moments = moments_[static_cast<std::size_t>(layer)].data();
  return compute_->ParallelFor((width_ + kRows - 1) / kRows, [&](int64_t block, int) {
    const int64_t begin = block * kRows, end = std::min(begin + kRows, width_);
    float tile[kRows][kColumns];
    for (int64_t first = 0; first < end; first += kColumns) {
      const int64_t columns = std::min(kColumns, width_ - first);
      for (auto& row : tile) std::fill_n(row, kColumns, 0.0f);
      for (int64_t t = 0; t < n; ++t) {
        const float* from = x + t * width_;
        for (int64_t i = begin; i < end; ++i) {
          const float weight = from[i];
          float* row = tile[i - begin];
          for (int64_t c = 0; c < columns; ++c) row[c] += weight * from[first + c];
        }
      }
      for (int64_t i = begin; i < end; ++i)
        for (int64_t c = 0; c < columns && first + c <= i; ++c)
          Row(moments, i)[first + c] += tile[i - begin][c];
    }
  });
}

Expected<LearnedScores> ScoreLearner::Learn() {
  const HyperParams& hp = compute_->model().hparams();
  LearnedScores learned{hp.n_layers, heads_, width_, {}};
  learned.weights.assign(joint_.size(), 0.0f);
  MOEND_TRY(compute_->ParallelFor(hp.n_layers, [&](int64_t layer, int) {
    // Channels differ in size by orders of magnitude, so they are scaled to 1.
    float* a = moments_[static_cast<std::size_t>(layer)].data();
    std::vector<double> size(static_cast<std::size_t>(width_));
    const auto n = std::ssize(size);
    for (int64_t c = 0; c < n; ++c)
      size[static_cast<std::size_t>(c)] = std::sqrt(std::max(double{Row(a, c)[c]}, 1e-20));
    for (int64_t i = 0; i < n; ++i) {
      float* row = Row(a, i);
      for (int64_t j = 0; j <= i; ++j)
        row[j] = static_cast<float>(row[j] /
                                    (size[static_cast<std::size_t>(i)] * size[static_cast<std::size_t>(j)]));
      row[i] += static_cast<float>(kRidge);
    }
    if (!Factorize(a, width_)) return;
    for (int64_t h = 0; h < heads_; ++h) {
      const auto at = static_cast<std::size_t>((layer * heads_ + h) * width_);
      std::vector<double> x(static_cast<std::size_t>(width_));
      for (std::size_t c = 0; c < x.size(); ++c) x[c] = joint_[at + c] / size[c];
      Substitute(a, x);
      for (std::size_t c = 0; c < x.size(); ++c) learned.weights[at + c] = static_cast<float>(x[c] / size[c]);
    }
  }));
  RoundLearnedScores(learned);
  return learned;
}

}  // namespace moend
