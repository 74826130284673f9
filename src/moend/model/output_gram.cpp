#include "moend/model/output_gram.h"

#include <algorithm>

#include "moend/model/tensor_rows.h"

namespace moend {
namespace {

// Rows of the projection that are looked at, evenly spread: the sum is wanted within some percent.
constexpr int64_t kMostRows = 1024;

}  // namespace

std::vector<float> OutputGrams(const GgufFile& file, const Model& model, int64_t layer) {
  const HyperParams& hp = model.hparams();
  const int64_t d = hp.head_size, width = hp.n_heads * d;
  std::vector<float> grams(static_cast<std::size_t>(hp.n_heads * d * d), 0.0f);
  const GgufTensor* t = file.FindTensor(fmt::format("blk.{}.attn_output.weight", layer));
  if (!t || t->ne[0] != width || t->ne[1] < 1) {
    for (int64_t h = 0; h < hp.n_heads; ++h)
      for (int64_t c = 0; c < d; ++c) grams[static_cast<std::size_t>((h * d + c) * d + c)] = 1.0f;
    return grams;
  }
  const int64_t rows = std::min(t->ne[1], kMostRows);
  const auto scale = static_cast<float>(t->ne[1]) / static_cast<float>(rows);
  std::vector<float> row(static_cast<std::size_t>(width));
  for (int64_t r = 0; r < rows; ++r) {
    ReadElements(*t, r * t->ne[1] / rows, 0, width, row.data());
    for (int64_t h = 0; h < hp.n_heads; ++h) {
      const float* x = row.data() + h * d;
      float* gram = grams.data() + h * d * d;
      for (int64_t i = 0; i < d; ++i) {
        const float xi = scale * x[i];
        for (int64_t j = 0; j < d; ++j) gram[i * d + j] += xi * x[j];
      }
    }
  }
  return grams;
}

}  // namespace moend
