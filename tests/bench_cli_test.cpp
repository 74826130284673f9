// moend bench as a user meets it. What it measures is never compared with a figure: only that it measured.
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "moend/base/file.h"
#include "moend/engine/benchmark.h"
#include "moend/engine/engine.h"
#include "moend/plan/plan.h"
#include "tests/support/process.h"
#include "tests/support/test_model.h"

namespace moend {
namespace {

using test::Contains;

struct BenchWorld {
  test::TempDir dir;
  std::string model = dir / "model.gguf", plan = dir / "plan.json";
  BenchWorld() {
    EXPECT_TRUE(test::WriteTestModel({}, model));
    auto loaded = Model::Load(model, {1, false});
    EXPECT_TRUE(loaded);
    auto engine = Engine::Create(*loaded, {1});
    EXPECT_TRUE(engine);
    Plan made = FullPlan((*engine)->fingerprint(), 512);
    for (Expert& e : made.layers) e = {0.25, 4, 4};
    EXPECT_TRUE(WriteFileAtomically(plan, ToJson(made)));
  }
};

test::ProcessResult Bench(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "bench");
  return test::Moend(arguments);
}

std::vector<std::string> Lines(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

TEST(BenchCommand, JsonHasARowForEveryTestDepthAndPlan) {
  const BenchWorld world;
  const auto r = Bench({"-m", world.model, "-p", "64,300", "-n", "3", "-d", "0,200", "--plan",
                        "full," + world.plan, "-r", "2", "-o", "json"});
  ASSERT_EQ(r.code, 0) << r.err;
  EXPECT_EQ(r.err, "");
  const auto rows = nlohmann::ordered_json::parse(r.out);
  ASSERT_EQ(rows.size(), 12u);
  std::size_t at = 0;
  for (const std::string& plan : {std::string("full"), world.plan}) {
    for (const int64_t depth : {0, 200}) {
      for (const auto& [test, n] : {std::pair{"pp", 64}, {"pp", 300}, {"tg", 3}}) {
        const auto& row = rows[at++];
        EXPECT_EQ(row["test"], test);
        EXPECT_EQ(row["n"], n);
        EXPECT_EQ(row["depth"], depth);
        EXPECT_EQ(row["plan"], plan);
        EXPECT_GT(row["tps"].get<double>(), 0);
        EXPECT_GE(row["tps_stddev"].get<double>(), 0);
        EXPECT_EQ(row["tps_samples"].size(), 2u);
        EXPECT_GT(row["kv_bytes"].get<int64_t>(), 0);
      }
    }
  }
  // The fields come first, in this order.
  std::vector<std::string> names;
  for (const auto& item : rows[0].items()) names.push_back(item.key());
  names.resize(7);
  EXPECT_EQ(names, (std::vector<std::string>{"test", "n", "depth", "plan", "tps", "tps_stddev", "kv_bytes"}));
  // 500 tokens at 16 bit against a quarter of them at 4 bit, the protected ones at 16.
  EXPECT_GT(rows[4]["kv_bytes"].get<int64_t>(), 3 * rows[10]["kv_bytes"].get<int64_t>());
  // 3 layers, 2 KV heads of 32, K and V at 16 bit: at least 768 bytes a token.
  EXPECT_GE(rows[4]["kv_bytes"].get<int64_t>(), 500 * 768);
}

TEST(BenchCommand, MarkdownAndCsv) {
  const BenchWorld world;
  const auto md = Bench({"-m", world.model, "-p", "8", "-n", "2", "-d", "16", "-r", "1"});
  ASSERT_EQ(md.code, 0) << md.err;
  const auto table = Lines(md.out);
  ASSERT_EQ(table.size(), 4u) << md.out;
  EXPECT_TRUE(Contains(table[0], "| t/s |"));
  EXPECT_TRUE(Contains(table[2], "| pp8 @ d16 |")) << table[2];
  EXPECT_TRUE(Contains(table[3], "| tg2 @ d16 |")) << table[3];
  EXPECT_TRUE(Contains(table[3], " ± 0.00 |")) << table[3];

  const auto csv = Bench({"-m", world.model, "-p", "0", "-n", "2", "-r", "1", "-o", "csv"});
  ASSERT_EQ(csv.code, 0) << csv.err;
  const auto lines = Lines(csv.out);
  ASSERT_EQ(lines.size(), 2u) << csv.out;
  EXPECT_EQ(lines[0], "model,threads,plan,test,n,depth,tps,tps_stddev,tps_median,kv_bytes");
  EXPECT_TRUE(Contains(lines[1], ",1,full,tg,2,0,")) << lines[1];
}

TEST(BenchCommand, WrongUsageIsTwoAndFailureIsOne) {
  const BenchWorld world;
  EXPECT_EQ(Bench({"--help"}).code, 0);
  EXPECT_TRUE(Contains(Bench({"--help"}).out, "--n-depth"));
  for (const std::vector<std::string>& wrong : {std::vector<std::string>{},
                                                {"-m", world.model, "-p", "-1"},
                                                {"-m", world.model, "-p", "x"},
                                                {"-m", world.model, "-r", "0"},
                                                {"-m", world.model, "-o", "xml"},
                                                {"-m", world.model, "-p", "0", "-n", "0"},
                                                {"-m", world.model, "-ngl", "some"}}) {
    const auto r = Bench(wrong);
    EXPECT_EQ(r.code, 2) << r.err;
    EXPECT_EQ(r.out, "");
    EXPECT_TRUE(Contains(r.err, "moend: error: ")) << r.err;
  }
  const auto no_model = Bench({"-m", world.dir / "none.gguf"});
  EXPECT_EQ(no_model.code, 1);
  EXPECT_TRUE(Contains(no_model.err, "none.gguf")) << no_model.err;
  const auto no_plan = Bench({"-m", world.model, "--plan", world.dir / "none.json"});
  EXPECT_EQ(no_plan.code, 1);
  EXPECT_EQ(no_plan.out, "") << "no table before a plan that is missing";
  EXPECT_TRUE(Contains(no_plan.err, "none.json")) << no_plan.err;
}

TEST(SpeedResult, Statistics) {
  const SpeedResult r{{}, {4, 1, 7, 2}, 0};
  EXPECT_DOUBLE_EQ(r.mean(), 3.5);
  EXPECT_DOUBLE_EQ(r.median(), 3);
  EXPECT_DOUBLE_EQ(r.stddev(), std::sqrt((0.25 + 6.25 + 12.25 + 2.25) / 3));
  EXPECT_EQ((SpeedResult{{}, {5}, 0}).stddev(), 0);
  EXPECT_EQ((SpeedResult{{}, {3, 9, 5}, 0}).median(), 5);
}

}  // namespace
}  // namespace moend
