#include "moend/plan/query_stats.h"

#include <cmath>
#include <limits>

#include "moend/base/number.h"
#include "moend/plan/query_stats_json.h"

namespace moend {
namespace {

constexpr int64_t kMostHeads = 4096;
constexpr double kMost = 1e15;

// Four significant digits: far finer than what statistics of another text differ by. What is too small for
// them is nothing.
double Rounded(double x) {
  const double rounded = ParseNumber<double>(fmt::format("{:.3e}", x)).value_or(x);
  return std::fabs(rounded) < std::numeric_limits<double>::min() ? 0 : rounded;
}

Expected<void> ReadNumbers(const JsonNode& parent, std::string_view key, double low, int64_t n,
                           double QueryPair::*member, QueryPair* to) {
  MOEND_ASSIGN(const JsonNode node, parent.At(key));
  MOEND_ASSIGN(const int64_t size, node.Size());
  if (size != n) return node.Wrong("has {} numbers; needed: {}, half of the head size", size, n);
  for (int64_t i = 0; i < n; ++i) {
    MOEND_ASSIGN(const JsonNode element, node.At(i));
    MOEND_ASSIGN(to[i].*member, element.Real(low, kMost));
  }
  return {};
}

}  // namespace

std::shared_ptr<const QueryStats> MergeQueryStats(std::shared_ptr<const QueryStats> a,
                                                  std::shared_ptr<const QueryStats> b) {
  if (!a || a->tokens == 0) return b;
  if (!b || b->tokens == 0) return a;
  auto merged = std::make_shared<QueryStats>(*a);
  merged->tokens += b->tokens;
  const double share = static_cast<double>(b->tokens) / static_cast<double>(merged->tokens);
  for (std::size_t i = 0; i < merged->pairs.size() && i < b->pairs.size(); ++i) {
    QueryPair& to = merged->pairs[i];
    const QueryPair& from = b->pairs[i];
    to.re += share * (from.re - to.re);
    to.im += share * (from.im - to.im);
    to.length += share * (from.length - to.length);
  }
  return merged;
}

Expected<void> CheckQueryStats(const QueryStats& stats, int64_t n_layers, const KvShape& shape) {
  const bool whole = stats.n_heads > 0 && shape.n_kv_heads > 0 && stats.n_heads % shape.n_kv_heads == 0;
  if (whole && stats.n_pairs == shape.head_size / 2 &&
      std::ssize(stats.pairs) == n_layers * stats.n_heads * stats.n_pairs)
    return {};
  return Fail(ErrorCode::kMismatch,
              "statistics of {} pairs of channels in {} query heads do not belong to {} layers with {} KV "
              "heads of {}",
              stats.n_pairs, stats.n_heads, n_layers, shape.n_kv_heads, shape.head_size);
}

std::shared_ptr<const QueryStats> RoundQueryStats(const std::shared_ptr<const QueryStats>& stats) {
  if (!stats) return nullptr;
  auto rounded = std::make_shared<QueryStats>(*stats);
  for (QueryPair& pair : rounded->pairs) pair = {Rounded(pair.re), Rounded(pair.im), Rounded(pair.length)};
  return rounded;
}

void WriteQueryStats(const std::shared_ptr<const QueryStats>& stats, nlohmann::ordered_json& object) {
  if (!stats || stats->n_heads <= 0 || stats->n_pairs <= 0) return;
  object["query_tokens"] = stats->tokens;
  nlohmann::ordered_json& heads = object["queries"] = nlohmann::ordered_json::array();
  const int64_t n_layers = std::ssize(stats->pairs) / (stats->n_heads * stats->n_pairs);
  for (int64_t i = 0; i < n_layers * stats->n_heads; ++i) {
    nlohmann::ordered_json re = nlohmann::ordered_json::array(), im = re, length = re;
    for (int64_t p = 0; p < stats->n_pairs; ++p) {
      const QueryPair& pair = stats->pairs[static_cast<std::size_t>(i * stats->n_pairs + p)];
      re.push_back(Rounded(pair.re));
      im.push_back(Rounded(pair.im));
      length.push_back(Rounded(pair.length));
    }
    heads.push_back({{"layer", i / stats->n_heads},
                     {"head", i % stats->n_heads},
                     {"re", std::move(re)},
                     {"im", std::move(im)},
                     {"length", std::move(length)}});
  }
}

Expected<std::shared_ptr<const QueryStats>> ReadQueryStats(const JsonNode& root, int64_t n_layers,
                                                           const KvShape& shape) {
  if (!root.Has("queries")) return nullptr;
  auto stats = std::make_shared<QueryStats>();
  MOEND_ASSIGN(const JsonNode tokens, root.At("query_tokens"));
  MOEND_ASSIGN(stats->tokens, tokens.Int(1, INT64_MAX / 2));
  MOEND_ASSIGN(const JsonNode heads, root.At("queries"));
  MOEND_ASSIGN(const int64_t n, heads.Size());
  stats->n_pairs = shape.head_size / 2;
  stats->n_heads = n / n_layers;
  if (n == 0 || n % n_layers != 0 || stats->n_heads % shape.n_kv_heads != 0 || stats->n_heads > kMostHeads)
    return heads.Wrong("has {} query heads; needed: a multiple of {} KV heads in each of {} layers", n,
                       shape.n_kv_heads, n_layers);
  stats->pairs.resize(static_cast<std::size_t>(n * stats->n_pairs));
  for (int64_t i = 0; i < n; ++i) {
    MOEND_ASSIGN(const JsonNode head, heads.At(i));
    MOEND_ASSIGN(const JsonNode layer, head.At("layer"));
    MOEND_TRY(layer.Int(i / stats->n_heads, i / stats->n_heads));
    MOEND_ASSIGN(const JsonNode index, head.At("head"));
    MOEND_TRY(index.Int(i % stats->n_heads, i % stats->n_heads));
    QueryPair* to = stats->pairs.data() + i * stats->n_pairs;
    MOEND_TRY(ReadNumbers(head, "re", -kMost, stats->n_pairs, &QueryPair::re, to));
    MOEND_TRY(ReadNumbers(head, "im", -kMost, stats->n_pairs, &QueryPair::im, to));
    MOEND_TRY(ReadNumbers(head, "length", 0, stats->n_pairs, &QueryPair::length, to));
  }
  return stats;
}

}  // namespace moend
