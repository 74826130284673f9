// Results files and the report made from them.
#include "moend/eval/report.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

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
