#include "tests/support/libllama_logits.h"

#include <llama-cpp.h>
#include <llama.h>

#include <algorithm>
#include <cmath>

namespace moend::test {
namespace {

// log(sum(exp(row)))
double LogSum(const std::vector<float>& row) {
  const double top = *std::max_element(row.begin(), row.end());
  double sum = 0;
  for (float x : row) sum += std::exp(x - top);
  return top + std::log(sum);
}

}  // namespace

std::vector<std::vector<float>> LibllamaLogits(const std::string& path, std::span<const int32_t> tokens,
                                               bool flash_attention, int block, bool repack) {
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  llama_backend_init();
  llama_model_params model_params = llama_model_default_params();
  model_params.n_gpu_layers = 0;
  model_params.use_extra_bufts = repack;
  const llama_model_ptr model(llama_model_load_from_file(path.c_str(), model_params));
  if (!model) return {};
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<uint32_t>(tokens.size() + 8);
  params.n_batch = params.n_ubatch = static_cast<uint32_t>(block);
  params.n_threads = params.n_threads_batch = 1;  // spinning threads crawl on a busy machine
  params.type_k = params.type_v = GGML_TYPE_F16;
  params.flash_attn_type = flash_attention ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
  const llama_context_ptr context(llama_init_from_model(model.get(), params));
  if (!context) return {};

  const auto n_vocab = static_cast<std::size_t>(llama_vocab_n_tokens(llama_model_get_vocab(model.get())));
  std::vector<std::vector<float>> rows;
  llama_batch batch = llama_batch_init(block, 0, 1);
  for (std::size_t begin = 0; begin < tokens.size(); begin += static_cast<std::size_t>(block)) {
    const std::size_t end = std::min(tokens.size(), begin + static_cast<std::size_t>(block));
    batch.n_tokens = static_cast<int32_t>(end - begin);
    for (std::size_t i = begin; i < end; ++i) {
      const std::size_t k = i - begin;
      batch.token[k] = tokens[i];
      batch.pos[k] = static_cast<int32_t>(i);
      batch.n_seq_id[k] = 1;
      batch.seq_id[k][0] = 0;
      batch.logits[k] = 1;
    }
    if (llama_decode(context.get(), batch) != 0) {
      rows.clear();
      break;
    }
    for (std::size_t i = begin; i < end; ++i) {
      const float* logits = llama_get_logits_ith(context.get(), static_cast<int32_t>(i - begin));
      rows.emplace_back(logits, logits + n_vocab);
    }
  }
  llama_batch_free(batch);
  return rows;
}

void LogitDistance::Add(const LogitDistance& o) {
  const auto total = static_cast<double>(positions + o.positions);
  if (total > 0)
    mean_kl =
        (mean_kl * static_cast<double>(positions) + o.mean_kl * static_cast<double>(o.positions)) / total;
  worst_kl = std::max(worst_kl, o.worst_kl);
  largest_gap = std::max(largest_gap, o.largest_gap);
  same_top += o.same_top;
  positions += o.positions;
}

LogitDistance Compare(const std::vector<std::vector<float>>& want,
                      const std::vector<std::vector<float>>& got) {
  LogitDistance d;
  if (want.size() != got.size() || want.empty()) return d;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const std::vector<float>&w = want[i], &g = got[i];
    if (w.size() != g.size()) return {};
    const double log_w = LogSum(w), log_g = LogSum(g);
    double kl = 0;
    for (std::size_t t = 0; t < w.size(); ++t) {
      const double p = std::exp(w[t] - log_w);
      kl += p * ((w[t] - log_w) - (g[t] - log_g));
    }
    if (!std::isfinite(kl)) kl = INFINITY;
    const auto top_w = std::max_element(w.begin(), w.end()) - w.begin();
    const auto top_g = std::max_element(g.begin(), g.end()) - g.begin();
    d.same_top += top_w == top_g;
    d.largest_gap = std::max(d.largest_gap, static_cast<double>(w[static_cast<std::size_t>(top_w)]) -
                                                w[static_cast<std::size_t>(top_g)]);
    d.mean_kl += kl;
    d.worst_kl = std::max(d.worst_kl, kl);
    ++d.positions;
  }
  d.mean_kl /= static_cast<double>(d.positions);
  return d;
}

}  // namespace moend::test
