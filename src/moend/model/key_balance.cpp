#include "moend/model/key_balance.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "moend/model/rope.h"
#include "moend/model/tensor_rows.h"

namespace moend {
namespace {

constexpr double kMostBalance = 1024;  // no weights are that far apart; what is broken stays representable

// Columns of a row that are looked at: spans of one multiple of every type's block size, evenly spread. The
// length of a row is wanted within some percent, and a large model has billions of weights.
constexpr int64_t kSpan = 256, kMostSpans = 8;

// |row|^2 of `rows` rows from `first` on, each column weighed by the norm in front of the matrix. The rows
// are read from the file, since ggml may have a copy in another layout.
std::vector<double> RowPower(const GgufFile& file, const std::string& name, int64_t first, int64_t rows,
                             const ggml_tensor* norm) {
  std::vector<double> power(static_cast<std::size_t>(rows), 0.0);
  const GgufTensor* t = file.FindTensor(name);
  if (!t) return power;
  const int64_t width = t->ne[0];
  const auto* weight = static_cast<const float*>(norm->data);
  const int64_t spans = std::max<int64_t>(1, width / kSpan);
  const int64_t step = (spans + kMostSpans - 1) / kMostSpans;
  std::vector<float> values(static_cast<std::size_t>(std::min(width, kSpan)));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t s = 0; s < spans; s += step) {
      const int64_t begin = s * kSpan, n = std::min(kSpan, width - begin);
      ReadElements(*t, first + r, begin, n, values.data());
      for (int64_t c = 0; c < n; ++c) {
        const double x = double{values[static_cast<std::size_t>(c)]} * weight[begin + c];
        power[static_cast<std::size_t>(r)] += x * x;
      }
    }
  }
  return power;
}

void AddBias(std::vector<double>& power, const ggml_tensor* bias) {
  if (!bias) return;
  const auto* b = static_cast<const float*>(bias->data);
  for (std::size_t r = 0; r < power.size(); ++r) power[r] += double{b[r]} * b[r];
}

// A norm comes behind the projection, over each head or over all of them: rows count relative to the others
// that are normed with them.
void ApplyNorm(std::vector<double>& power, const ggml_tensor* norm) {
  if (!norm) return;
  const auto* weight = static_cast<const float*>(norm->data);
  const int64_t width = norm->ne[0];
  for (auto head = power.begin(); head != power.end(); head += width) {
    double mean = 0;
    for (int64_t c = 0; c < width; ++c) mean += head[c] / static_cast<double>(width);
    for (int64_t c = 0; c < width; ++c) head[c] = (mean > 0 ? head[c] / mean : 1.0) * weight[c] * weight[c];
  }
}

}  // namespace

std::vector<float> KeyBalance(const GgufFile& file, const Model& model, int64_t layer) {
  const HyperParams& hp = model.hparams();
  const LayerWeights& w = model.weights().layers[static_cast<std::size_t>(layer)];
  const LayerParams& params = hp.layers[static_cast<std::size_t>(layer)];
  const std::string prefix = fmt::format("blk.{}.", layer);
  const int64_t d = hp.head_size, group = hp.n_heads / hp.n_kv_heads;
  const int64_t k_rows = hp.n_kv_heads * d;
  if (params.holds_state()) return std::vector<float>(static_cast<std::size_t>(k_rows), 1.0f);
  const std::string fused = prefix + "attn_qkv.weight";
  const bool is_fused = file.FindTensor(fused) != nullptr;
  // A head's gate stands behind its query.
  const int64_t stride = params.output_gate ? 2 * d : d;
  const std::string q_name = is_fused ? fused : prefix + "attn_q.weight";
  std::vector<double> q;
  for (int64_t head = 0; head < hp.n_heads; ++head)
    for (const double power : RowPower(file, q_name, head * stride, d, w.attn_norm)) q.push_back(power);
  auto k = RowPower(file, is_fused ? fused : prefix + "attn_k.weight", is_fused ? hp.n_heads * stride : 0,
                    k_rows, w.attn_norm);
  AddBias(q, w.bq);
  AddBias(k, w.bk);
  ApplyNorm(q, w.q_norm);
  ApplyNorm(k, w.k_norm);

  std::vector<float> balance(static_cast<std::size_t>(k_rows), 1.0f);
  const std::vector<RopePair> pairs = RopePairs(model, layer);
  std::vector<double> log_of(pairs.size());
  for (int64_t h = 0; h < hp.n_kv_heads; ++h) {
    double mean = 0;
    for (std::size_t p = 0; p < pairs.size(); ++p) {
      // RoPE mixes the channels of a pair: they get one factor.
      double of_q = 0, of_k = 0;
      for (const int64_t c : {pairs[p].first, pairs[p].second}) {
        of_k += k[static_cast<std::size_t>(h * d + c)];
        for (int64_t g = 0; g < group; ++g) of_q += q[static_cast<std::size_t>((h * group + g) * d + c)];
      }
      const double ratio = of_q / of_k;
      log_of[p] = std::isfinite(ratio) && ratio > 0 ? std::log(ratio) / 4 : 0.0;
      mean += log_of[p] / static_cast<double>(pairs.size());
    }
    for (std::size_t p = 0; p < pairs.size(); ++p) {
      const double b = std::clamp(std::exp(log_of[p] - mean), 1 / kMostBalance, kMostBalance);
      for (const int64_t c : {pairs[p].first, pairs[p].second})
        balance[static_cast<std::size_t>(h * d + c)] = static_cast<float>(b);
    }
  }
  return balance;
}

}  // namespace moend
