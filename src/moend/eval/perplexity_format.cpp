#include <nlohmann/json.hpp>

#include "moend/eval/markdown.h"
#include "moend/eval/perplexity.h"
#include "moend/plan/json_fields.h"

namespace moend::eval {
namespace {

using Json = nlohmann::ordered_json;

constexpr double kMib = 1024.0 * 1024.0;

double Ratio(const PerplexityResult& r) {
  return r.kv_bytes > 0 ? static_cast<double>(r.kv_bytes_full) / static_cast<double>(r.kv_bytes) : 0;
}

bool Compared(const PerplexityResult& r) {
  return r.ppl_base.mean > 0;
}

Json Write(const MeanError& m) {
  return {{"mean", m.mean}, {"error", m.error}};
}
Json Write(const Quantile& q) {
  return {{"value", q.value}, {"low", q.low}, {"high", q.high}};
}

}  // namespace

std::string FormatPerplexity(const PerplexityResult& r) {
  std::string out;
  const auto line = [&](std::string_view name, std::string value) {
    out += fmt::format("{:<28}: {}\n", name, value);
  };
  const auto mean = [](const MeanError& m) { return fmt::format("{:10.6f} ± {:9.6f}", m.mean, m.error); };
  const auto quantile = [](const Quantile& q) {
    return fmt::format("{:10.6f} [{:.6f}, {:.6f}]", q.value, q.low, q.high);
  };
  out += "====== Perplexity statistics ======\n";
  line(Compared(r) ? "Mean PPL(Q)" : "Mean PPL", mean(r.ppl));
  if (Compared(r)) {
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
  line("K/V cache", fmt::format("{:.2f} MiB, {:.2f}x smaller than 16 bit",
                                static_cast<double>(r.kv_bytes) / kMib, Ratio(r)));
  return out;
}

std::string FormatPerplexities(std::span<const PerplexityResult> results) {
  std::vector<std::vector<std::string>> rows = {
      {"cache", "ratio", "MiB", "PPL", "ln(PPL/base)", "KLD", "99% KLD", "max KLD", "same top, %"}};
  for (const PerplexityResult& r : results) {
    std::vector<std::string>& row = rows.emplace_back();
    row = {r.label, fmt::format("{:.2f}x", Ratio(r)),
           fmt::format("{:.2f}", static_cast<double>(r.kv_bytes) / kMib), fmt::format("{:.4f}", r.ppl.mean)};
    if (!Compared(r)) {
      row.insert(row.end(), 5, "-");
      continue;
    }
    row.push_back(fmt::format("{:+.5f} ± {:.5f}", r.ln_ratio.mean, r.ln_ratio.error));
    row.push_back(fmt::format("{:.6f} ± {:.6f}", r.kld.mean, r.kld.error));
    row.push_back(fmt::format("{:.5f}", r.kld_99.value));
    row.push_back(fmt::format("{:.4f}", r.kld_max));
    row.push_back(fmt::format("{:.2f} ± {:.2f}", 100 * r.same_top.mean, 100 * r.same_top.error));
  }
  return MarkdownTable(rows, 1);
}

std::string PerplexitiesToJson(std::span<const PerplexityResult> results, const Fingerprint& model,
                               int64_t n_ctx, const std::string& text) {
  Json list = Json::array();
  for (const PerplexityResult& r : results) {
    Json entry = {{"label", r.label},       {"chunks", r.chunks}, {"tokens", r.tokens},
                  {"kv_bytes", r.kv_bytes}, {"ratio", Ratio(r)},  {"kv_bytes_full", r.kv_bytes_full},
                  {"ppl", Write(r.ppl)}};
    if (Compared(r)) {
      entry["ppl_base"] = Write(r.ppl_base);
      entry["ln_ratio"] = Write(r.ln_ratio);
      entry["kld"] = Write(r.kld);
      entry["kld_max"] = r.kld_max;
      entry["kld_999"] = Write(r.kld_999);
      entry["kld_99"] = Write(r.kld_99);
      entry["kld_95"] = Write(r.kld_95);
      entry["kld_median"] = Write(r.kld_median);
      entry["same_top"] = Write(r.same_top);
    }
    list.push_back(std::move(entry));
  }
  const Json root = {{"moend", "perplexity"}, {"schema", 1},    {"model", moend::Write(model)},
                     {"text", text},          {"n_ctx", n_ctx}, {"results", std::move(list)}};
  return root.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace moend::eval
