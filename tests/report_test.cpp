// Results files and the report made from them.
#include "moend/eval/report.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "moend/eval/paired.h"
#include "moend/eval/report_assets.h"
#include "moend/eval/results.h"

namespace moend::eval {
namespace {

Fingerprint SomeModel() {
  return {"llama", "tiny <b>", 2, {2, 64}, "0123456789abcdef"};
}

Plan SomePlan(const std::string& variant) {
  Plan plan = FullPlan(SomeModel(), 4096);
  plan.variant = variant;
  if (variant != "full") plan.layers = {{0.1, 4, 2}, {0.5, 8, 4}};
  return plan;
}

Results SomeResults() {
  Results r;
  r.model = SomeModel();
  r.settings = {"dir/suite-4k.jsonl", "abc", "agnostic", 4096, 0, 1, 4050};
  r.n_contexts = 2;
  r.n_questions = 5;
  r.complete = true;
  Run full;
  full.variant = "full";
  full.mode = "agnostic";
  full.plan = SomePlan("full");
  full.contexts = {{"c0", 4000, 1000, 1000}, {"c1", 2000, 500, 500}};
  full.answers = {{"c0#0", "niah", 1, 3, "42"},
                  {"c0#1", "qa", 1, 3, "a </script><!-- {{script}}"},
                  {"c1#0", "niah", 1, 3, "bad \xFF byte"},
                  {"c1#1", "niah", 0, 3, ""},
                  {"c1#2", "qa", 0.5, 3, "x"}};
  Run hetero = full;
  hetero.variant = "2d_hetero";
  hetero.scorer = "snapkv";
  hetero.compression = 14;
  hetero.plan = SomePlan("2d_hetero");
  hetero.contexts = {{"c0", 4000, 70, 1000}, {"c1", 2000, 30, 500}};
  hetero.answers.resize(3);
  r.runs = {full, hetero};
  return r;
}

TEST(Results, Sums) {
  const Results r = SomeResults();
  EXPECT_EQ(r.runs[1].kv_bytes(), 50);
  EXPECT_DOUBLE_EQ(r.runs[1].ratio(), 15);
  EXPECT_EQ(r.runs[1].label(), "2d_hetero/snapkv 14x");
  const auto summary = Summarize(r.runs[0]);
  ASSERT_EQ(summary.size(), 2u);
  EXPECT_EQ(summary[0].first, "niah");
  EXPECT_DOUBLE_EQ(summary[0].second.score, 2.0 / 3);
  EXPECT_EQ(summary[0].second.n, 3);
  EXPECT_DOUBLE_EQ(summary[1].second.score, 0.75);
  EXPECT_DOUBLE_EQ(MeanScore(r.runs[0]).score, (2.0 / 3 + 0.75) / 2);
  EXPECT_EQ(eval::Run().ratio(), 0);
  EXPECT_EQ(eval::Run().kv_bytes(), 0);
}

TEST(Results, RoundTrip) {
  const Results r = SomeResults();
  const std::string json = ToJson(r);
  const auto back = ParseResults(json, "out.json");
  ASSERT_TRUE(back) << back.error().message;
  EXPECT_EQ(back->settings, r.settings);
  EXPECT_EQ(back->model, r.model);
  EXPECT_TRUE(back->complete);
  ASSERT_EQ(back->runs.size(), 2u);
  EXPECT_EQ(back->runs[1].plan.layers, r.runs[1].plan.layers);
  EXPECT_EQ(back->runs[1].contexts[1].kv_bytes, 30);
  EXPECT_EQ(back->runs[0].answers[1].text, r.runs[0].answers[1].text);
  EXPECT_EQ(ToJson(*back), json);  // bytes that are no UTF-8 were repaired once
  // What the file promises to others.
  const auto document = nlohmann::json::parse(json);
  const auto& run = document["runs"][1];
  EXPECT_EQ(run["variant"], "2d_hetero");
  EXPECT_EQ(run["kv_bytes"], 50);
  EXPECT_EQ(run["ratio"], 15.0);
  EXPECT_EQ(run["datasets"]["niah"]["n"], 2);
  EXPECT_EQ(run["datasets"]["niah"]["score"], 1.0);
  EXPECT_LT(run["datasets"]["niah"]["low"], 1.0);
  EXPECT_EQ(run["answers"].size(), 3u);
}

Run Scores(const std::vector<double>& scores, int64_t per_context) {
  Run run;
  run.variant = "1d";
  for (std::size_t i = 0; i < scores.size(); ++i) {
    const auto c = static_cast<int64_t>(i) / per_context;
    if (static_cast<int64_t>(i) % per_context == 0) run.contexts.push_back({fmt::format("c#{}", c), 1, 1, 1});
    Answer& a = run.answers.emplace_back();
    a.id = per_context == 1 ? fmt::format("c#{}", c) : fmt::format("c#{}#{}", c, i);
    a.dataset = i % 2 ? "odd" : "even";
    a.score = scores[i];
    a.ids = {1, 2, static_cast<int32_t>(10 * scores[i])};
    a.gold_tokens = 2;
    a.nll = 3;
    a.kld = {static_cast<float>(1 - scores[i]), 0};
    a.same_top = 1;
  }
  return run;
}

TEST(Paired, ComparesTheSameQuestions) {
  eval::Run full = Scores({1, 1, 0.5, 1}, 2), method = Scores({0.5, 1, 0.5, 0}, 2);
  for (Answer& a : full.answers) a.kld.clear();
  const Paired all = ComparePaired(method, &full);
  EXPECT_DOUBLE_EQ(all.difference.mean, -1.5 / 4);
  EXPECT_EQ(all.difference.n, 4);
  EXPECT_EQ(all.difference.clusters, 2);
  EXPECT_DOUBLE_EQ(all.kld.mean, 2.0 / 8);
  EXPECT_EQ(all.kld.n, 8);
  EXPECT_DOUBLE_EQ(all.same_top, 0.5);
  EXPECT_DOUBLE_EQ(all.nll, 1.5);
  EXPECT_DOUBLE_EQ(all.nll_full, 1.5);
  EXPECT_DOUBLE_EQ(all.agreed, (2 + 3 + 3 + 2) / 4.0);
  EXPECT_DOUBLE_EQ(all.answer_tokens, 3);
  const Paired odd = ComparePaired(method, &full, "odd");
  EXPECT_DOUBLE_EQ(odd.difference.mean, -0.5);
  EXPECT_EQ(odd.difference.n, 2);
  method.answers.pop_back();  // not answered yet
  EXPECT_DOUBLE_EQ(ComparePaired(method, &full).difference.mean, -0.5 / 3);
  const Paired alone = ComparePaired(method, nullptr);
  EXPECT_EQ(alone.difference.n, 0);
  EXPECT_EQ(alone.kld.n, 6);
}

TEST(Paired, ContextsWhoseNamesHoldTheSign) {
  const eval::Run full = Scores({1, 1, 1}, 1), method = Scores({0, 1, 1}, 1);
  EXPECT_EQ(ComparePaired(method, &full).difference.clusters, 3);
}

// Whole contexts are drawn: ten questions that move together say as much as one.
TEST(Paired, TheBootstrapDrawsContexts) {
  std::vector<Cluster> together, apart;
  for (int i = 0; i < 40; ++i) {
    together.push_back({i % 4 == 0 ? 10.0 : 0.0, 10});
    for (int k = 0; k < 10; ++k) apart.push_back({i % 4 == 0 ? 1.0 : 0.0, 1});
  }
  const ClusterMean a = Bootstrap(together), b = Bootstrap(apart);
  EXPECT_DOUBLE_EQ(a.mean, 0.25);
  EXPECT_DOUBLE_EQ(b.mean, 0.25);
  const double sigma = std::sqrt(0.25 * 0.75 / 39);
  EXPECT_NEAR(a.high - a.low, 2 * 1.96 * sigma, 0.15 * 2 * 1.96 * sigma);  // means lie in steps of 1/40
  EXPECT_NEAR((a.high - a.low) / (b.high - b.low), std::sqrt(10.0), 0.6);
  const ClusterMean again = Bootstrap(together);
  EXPECT_EQ(again.low, a.low);
  EXPECT_FALSE(Bootstrap(std::vector<Cluster>{{1, 2}}).has_interval());
  EXPECT_EQ(Bootstrap({}).n, 0);
  const std::vector<Cluster> same = {{1, 2}, {1, 2}, {2, 4}};
  EXPECT_EQ(Bootstrap(same).low, 0.5);
  EXPECT_EQ(Bootstrap(same).high, 0.5);
}

TEST(Results, PairedComparisonIsInTheFileAndTheTable) {
  Results r = SomeResults();
  eval::Run full = Scores({1, 1, 0, 1}, 2), method = Scores({0, 1, 0, 1}, 2);
  full.variant = "full";
  for (Answer& a : full.answers) a.kld.clear();
  full.mode = method.mode = "agnostic";
  full.plan = SomePlan("full");
  method.plan = SomePlan("1d");
  r.runs = {full, method};
  const auto document = nlohmann::json::parse(ToJson(r));
  EXPECT_TRUE(document["runs"][0]["paired"].empty());
  const auto& paired = document["runs"][1]["paired"];
  EXPECT_EQ(paired["difference"]["mean"], -0.25);
  EXPECT_EQ(paired["difference"]["contexts"], 2);
  EXPECT_EQ(paired["kld"]["mean"], 0.25);
  EXPECT_EQ(document["runs"][1]["datasets"]["even"]["paired"]["difference"]["mean"], -0.5);
  EXPECT_EQ(ToJson(*ParseResults(ToJson(r), "r")), ToJson(r));
  const std::string table = FormatTable(r);
  EXPECT_NE(table.find("vs full"), std::string::npos) << table;
  EXPECT_NE(table.find("| -25.0 [-60.4, +10.4] |"), std::string::npos) << table;
  EXPECT_NE(table.find(" 2.8 of 3.0 |"), std::string::npos) << table;
  EXPECT_EQ(FormatTable(SomeResults()).find("KLD"), std::string::npos);  // not measured
}

TEST(Results, BadFilesNameTheField) {
  const auto good = nlohmann::json::parse(ToJson(SomeResults()));
  const auto broken = [&](auto&& change) {
    auto document = good;
    change(document);
    const auto result = ParseResults(document.dump(), "out.json");
    return result ? std::string() : result.error().message;
  };
  EXPECT_NE(broken([](auto& d) { d["runs"][1].erase("plan"); }).find("runs[1].plan is missing"),
            std::string::npos);
  EXPECT_NE(broken([](auto& d) { d["runs"][0]["answers"][2]["score"] = 1.5; }).find("answers[2].score"),
            std::string::npos);
  EXPECT_NE(broken([](auto& d) { d["runs"][0]["plan"]["layers"] = 5; }).find("the plan of runs[0]"),
            std::string::npos);
  EXPECT_FALSE(broken([](auto& d) { d["schema"] = 99; }).empty());
  EXPECT_FALSE(broken([](auto& d) { d["settings"] = 0; }).empty());
  EXPECT_FALSE(ParseResults("{", "out.json"));
  EXPECT_EQ(LoadResults("/no/such/file").error().code, ErrorCode::kNotFound);
}

TEST(Results, Table) {
  const std::string table = FormatTable(SomeResults());
  EXPECT_NE(table.find(" niah (n=3) |"), std::string::npos) << table;
  EXPECT_NE(table.find("15.00x"), std::string::npos) << table;
  EXPECT_NE(table.find("100.0 [34, 100] n=2"), std::string::npos) << table;  // fewer answers than others have
  std::size_t width = table.find('\n');
  for (std::size_t at = 0; at < table.size(); at += width + 1) EXPECT_EQ(table[at + width], '\n') << table;
}

TEST(Report, HoldsTheDataAndNothingThatEndsIt) {
  if (assets::plots.empty()) GTEST_SKIP() << "built without the plotting library";
  const std::vector<Results> results = {SomeResults()};
  ReportInput input;
  input.results = results;
  Profile profile;
  profile.model = SomeModel();
  profile.length = 100;
  profile.experts = {{0.1, 4, 2}, {0.5, 8, 4}};
  profile.cells = {{{0.25, 0.5}, {1, 2}}, {{3, 4}, {5, 6}}};
  input.profile = profile;
  input.plan = SomePlan("2d_hetero");
  input.plan_source = "{{plots}}</script>";
  const auto page = MakeReport(input);
  ASSERT_TRUE(page) << page.error().message;
  const std::string open = "<script type=\"application/json\" id=\"data\">", close = "</script>";
  const std::size_t begin = page->find(open) + open.size();
  const auto data = nlohmann::json::parse(page->substr(begin, page->find(close, begin) - begin));
  EXPECT_EQ(data["suites"][0]["name"], "suite-4k");
  EXPECT_EQ(data["suites"][0]["runs"][1]["layers"][1]["k_bits"], 8);
  EXPECT_EQ(data["profile"]["kl"][0][1], 2.0);
  EXPECT_EQ(data["profile"]["l2"][1][0], 3.0);
  EXPECT_EQ(data["plan"]["source"], "{{plots}}</script>");
  // Three scripts (data, library, ours), and nothing from elsewhere.
  std::size_t scripts = 0;
  for (std::size_t at = page->find(close); at != std::string::npos; at = page->find(close, at + 1)) ++scripts;
  EXPECT_EQ(scripts, 3u);
  EXPECT_EQ(page->find(" src="), std::string::npos);
  EXPECT_EQ(page->find("<link"), std::string::npos);
  EXPECT_NE(page->find("prefers-color-scheme: dark"), std::string::npos);
}

TEST(Report, RefusesSeveralModels) {
  if (assets::plots.empty()) GTEST_SKIP() << "built without the plotting library";
  std::vector<Results> results = {SomeResults(), SomeResults()};
  results[1].model.hash = "another";
  ReportInput input;
  input.results = results;
  ASSERT_FALSE(MakeReport(input));
  EXPECT_EQ(MakeReport(input).error().code, ErrorCode::kMismatch);
  input.results = {};
  EXPECT_EQ(MakeReport(input).error().code, ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace moend::eval
