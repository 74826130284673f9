#include "moend/plan/learned_scores.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "moend/base/base64.h"
#include "moend/base/half.h"
#include "moend/plan/learned_scores_json.h"

namespace moend {
namespace {

constexpr int64_t kMostEmbd = int64_t{1} << 20;

}  // namespace

void RoundLearnedScores(LearnedScores& learned) {
  for (int64_t i = 0; i < learned.n_layers * learned.n_kv_heads; ++i) {
    float* w = learned.weights.data() + i * learned.n_embd;
    float most = 0;
    bool finite = true;
    for (int64_t c = 0; c < learned.n_embd; ++c) {
      finite &= std::isfinite(w[c]);
      most = std::max(most, std::fabs(w[c]));
    }
    for (int64_t c = 0; c < learned.n_embd; ++c)
      w[c] = finite && most > 0 ? HalfToFloat(FloatToHalf(w[c] / most)) : 0.0f;
  }
}

Expected<void> CheckLearnedScores(const LearnedScores& learned, int64_t n_layers, int64_t n_kv_heads,
                                  int64_t n_embd) {
  if (learned.n_layers == n_layers && learned.n_kv_heads == n_kv_heads && learned.n_embd == n_embd &&
      std::ssize(learned.weights) == n_layers * n_kv_heads * n_embd)
    return {};
  return Fail(ErrorCode::kMismatch,
              "the learned scores are of {} layers with {} KV heads and hidden states of {}; the model has "
              "{}, {} and {}",
              learned.n_layers, learned.n_kv_heads, learned.n_embd, n_layers, n_kv_heads, n_embd);
}

void WriteLearnedScores(const std::shared_ptr<const LearnedScores>& learned, nlohmann::ordered_json& object) {
  if (!learned) return;
  nlohmann::ordered_json heads = nlohmann::ordered_json::array();
  for (int64_t i = 0; i < learned->n_layers * learned->n_kv_heads; ++i) {
    std::string bytes;
    for (int64_t c = 0; c < learned->n_embd; ++c) {
      const uint16_t half = FloatToHalf(learned->weights[static_cast<std::size_t>(i * learned->n_embd + c)]);
      bytes.push_back(static_cast<char>(half & 0xff));
      bytes.push_back(static_cast<char>(half >> 8));
    }
    heads.push_back(EncodeBase64(bytes));
  }
  object["learned"] = {{"n_embd", learned->n_embd}, {"weights", std::move(heads)}};
}

Expected<std::shared_ptr<const LearnedScores>> ReadLearnedScores(const JsonNode& root, int64_t n_layers,
                                                                 int64_t n_kv_heads) {
  if (!root.Has("learned")) return nullptr;
  auto learned = std::make_shared<LearnedScores>();
  learned->n_layers = n_layers;
  learned->n_kv_heads = n_kv_heads;
  MOEND_ASSIGN(const JsonNode node, root.At("learned"));
  MOEND_ASSIGN(const JsonNode width, node.At("n_embd"));
  MOEND_ASSIGN(learned->n_embd, width.Int(1, kMostEmbd));
  MOEND_ASSIGN(const JsonNode heads, node.At("weights"));
  MOEND_ASSIGN(const int64_t n, heads.Size());
  if (n != n_layers * n_kv_heads)
    return heads.Wrong("has {} KV heads; needed: {} in each of {} layers", n, n_kv_heads, n_layers);
  // What is read is no longer than the file that it is read from.
  const auto text_bytes = static_cast<std::size_t>((2 * learned->n_embd + 2) / 3 * 4);
  for (int64_t i = 0; i < n; ++i) {
    MOEND_ASSIGN(const JsonNode head, heads.At(i));
    MOEND_ASSIGN(const std::string text, head.Text(text_bytes));
    const auto bytes = DecodeBase64(text);
    if (!bytes || std::ssize(*bytes) != 2 * learned->n_embd)
      return head.Wrong("is not base64 of {} half floats", learned->n_embd);
    for (int64_t c = 0; c < learned->n_embd; ++c) {
      const auto at = static_cast<std::size_t>(2 * c);
      const auto low = static_cast<unsigned char>((*bytes)[at]);
      const auto high = static_cast<unsigned char>((*bytes)[at + 1]);
      const float weight = HalfToFloat(static_cast<uint16_t>(low | high << 8));
      if (!std::isfinite(weight)) return head.Wrong("holds a number that is not finite, number {}", c);
      learned->weights.push_back(weight);
    }
  }
  return learned;
}

}  // namespace moend
