// What libllama computes for the same file and tokens: the yardstick of our own graphs.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace moend::test {

// Logits of every position, [tokens][n_vocab], from a half-float cache; empty when libllama cannot run the
// file. Blocks of `block` tokens are decoded at a time. `repack`: weights as LoadOptions::repack has them,
// which go through other kernels.
std::vector<std::vector<float>> LibllamaLogits(const std::string& path, std::span<const int32_t> tokens,
                                               bool flash_attention = false, int block = 512,
                                               bool repack = false);

// How far `got` is from `want`, both [positions][n_vocab].
struct LogitDistance {
  double mean_kl = 0, worst_kl = 0;  // KL(want || got) in nats
  int64_t same_top = 0, positions = 0;
  // Where the two differ by more than rounding can explain: the most likely token of `want` lies this far
  // above what `got` prefers, in logits. Ties of the top two are the only excuse for another top token.
  double largest_gap = 0;
  double top_share() const {
    return positions ? static_cast<double>(same_top) / static_cast<double>(positions) : 0;
  }
  void Add(const LogitDistance& other);
};
LogitDistance Compare(const std::vector<std::vector<float>>& want,
                      const std::vector<std::vector<float>>& got);

}  // namespace moend::test
