#include "moend/plan/plan.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "moend/base/file.h"

namespace moend {
namespace {

Fingerprint Model() {
  return {"llama", "tiny \"quoted\" \xc3\xa4", 3, {2, 64}, "0123456789abcdef"};
}

Profile MakeProfile() {
  Profile p;
  p.model = Model();
  p.scorer = "h2o";
  p.guard = {2, 30};
  p.length = 4096;
  p.evaluated = 256;
  p.chunks = 3;
  p.chunks_wanted = 8;
  p.experts = {{0.1, 4, 2}, {0.1, 4, 4}, {1.0 / 3, 8, 4}, {1.0, 16, 16}};
  double x = 0.1;
  for (int64_t l = 0; l < p.model.n_layers; ++l) {
    auto& row = p.cells.emplace_back();
    for (std::size_t e = 0; e < p.experts.size(); ++e, x /= 3) row.push_back({x, x * x});
  }
  return p;
}

Plan MakePlan() {
  Plan p;
  p.model = Model();
  p.scorer = "keydiff";
  p.solver = "exact";
  p.metric = "kl";
  p.guard = {4, 28};
  p.context_length = 16384;
  p.budget_bytes = int64_t{1} << 62;
  p.bytes = 123456789;
  p.layers = {{0.1, 4, 2}, {0.7, 3, 8}, {1.0, 16, 16}};
  p.predicted = {0.1, 1e-17, 0};
  return p;
}

void ExpectEqual(const Profile& a, const Profile& b) {
  EXPECT_EQ(a.model, b.model);
  EXPECT_EQ(a.scorer, b.scorer);
  EXPECT_EQ(a.guard, b.guard);
  EXPECT_EQ(a.length, b.length);
  EXPECT_EQ(a.evaluated, b.evaluated);
  EXPECT_EQ(a.chunks, b.chunks);
  EXPECT_EQ(a.chunks_wanted, b.chunks_wanted);
  EXPECT_EQ(a.experts, b.experts);
  ASSERT_EQ(a.cells.size(), b.cells.size());
  for (std::size_t l = 0; l < a.cells.size(); ++l) {
    ASSERT_EQ(a.cells[l].size(), b.cells[l].size());
    for (std::size_t e = 0; e < a.cells[l].size(); ++e) {
      EXPECT_EQ(a.cells[l][e].kl, b.cells[l][e].kl);
      EXPECT_EQ(a.cells[l][e].l2, b.cells[l][e].l2);
    }
  }
}

void ExpectEqual(const Plan& a, const Plan& b) {
  EXPECT_EQ(a.model, b.model);
  EXPECT_EQ(a.variant, b.variant);
  EXPECT_EQ(a.scorer, b.scorer);
  EXPECT_EQ(a.solver, b.solver);
  EXPECT_EQ(a.metric, b.metric);
  EXPECT_EQ(a.guard, b.guard);
  EXPECT_EQ(a.context_length, b.context_length);
  EXPECT_EQ(a.budget_bytes, b.budget_bytes);
  EXPECT_EQ(a.bytes, b.bytes);
  EXPECT_EQ(a.layers, b.layers);
  EXPECT_EQ(a.predicted, b.predicted);
}

// `text` with the first `from` replaced; the test breaks if there is none.
std::string Replaced(std::string text, const std::string& from, const std::string& to) {
  const std::size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return at == std::string::npos ? text : text.replace(at, from.size(), to);
}

TEST(PlanTest, RoundTripIsExact) {
  const auto profile = ParseProfile(ToJson(MakeProfile()), "p");
  ASSERT_TRUE(profile) << profile.error().message;
  ExpectEqual(*profile, MakeProfile());

  Plan plan = MakePlan();
  const auto parsed = ParsePlan(ToJson(plan), "p");
  ASSERT_TRUE(parsed) << parsed.error().message;
  ExpectEqual(*parsed, plan);

  plan.predicted.clear();
  const auto without = ParsePlan(ToJson(plan), "p");
  ASSERT_TRUE(without) << without.error().message;
  ExpectEqual(*without, plan);
}

// Every number that can be read can be written, and what was written is read as the same.
TEST(PlanTest, StatisticsOfAnySizeAreWritten) {
  auto stats = std::make_shared<QueryStats>();
  stats->tokens = 10;
  const Plan base = MakePlan();
  stats->n_heads = base.model.shape.n_kv_heads;
  stats->n_pairs = base.model.shape.head_size / 2;
  stats->pairs.resize(static_cast<std::size_t>(base.model.n_layers * stats->n_heads * stats->n_pairs));
  const double numbers[] = {1e-310, -4.9e-324, 2.2250738585072014e-308, 0, -0.0, 123456.789, 1e15, -1e-300};
  for (std::size_t i = 0; i < stats->pairs.size(); ++i)
    stats->pairs[i] = {numbers[i % 8], numbers[(i + 3) % 8], std::fabs(numbers[(i + 5) % 8])};
  Plan plan = base;
  plan.queries = stats;
  const std::string written = ToJson(plan);
  const auto parsed = ParsePlan(written, "p");
  ASSERT_TRUE(parsed) << parsed.error().message;
  EXPECT_EQ(ToJson(*parsed), written);
  const auto rounded = RoundQueryStats(stats);
  for (std::size_t i = 0; i < stats->pairs.size(); ++i) {
    EXPECT_EQ(parsed->queries->pairs[i].re, rounded->pairs[i].re);
    EXPECT_NEAR(rounded->pairs[i].re, stats->pairs[i].re, std::fabs(stats->pairs[i].re) * 6e-4 + 1e-307);
  }
  Plan from_file = base;  // as someone may edit it
  from_file.queries = rounded;
  std::string text = ToJson(from_file);
  const std::size_t begin = text.find('[', text.find("\"re\"")) + 1;
  text.replace(begin, text.find(',', begin) - begin, "1e-310");
  const auto tiny = ParsePlan(text, "p");
  ASSERT_TRUE(tiny) << tiny.error().message;
  EXPECT_EQ(tiny->queries->pairs[0].re, 1e-310);
  EXPECT_FALSE(ToJson(*tiny).empty());
}

TEST(PlanTest, AScorerForEachLayerIsRead) {
  Plan plan = MakePlan();
  plan.scorer = "keydiff";
  for (int l = 1; l < 200; ++l) plan.scorer += ",expected";
  auto parsed = ParsePlan(ToJson(plan), "p");
  ASSERT_TRUE(parsed) << parsed.error().message;
  EXPECT_EQ(parsed->scorer, plan.scorer);
  Profile profile = MakeProfile();
  profile.scorer = plan.scorer;
  EXPECT_EQ(ParseProfile(ToJson(profile), "p")->scorer, plan.scorer);
  plan.scorer = profile.scorer = std::string(kLongestScorer + 1, 'x');
  EXPECT_FALSE(ParsePlan(ToJson(plan), "p"));
  EXPECT_FALSE(ParseProfile(ToJson(profile), "p"));
}

TEST(PlanTest, UnfinishedProfileIsRead) {
  Profile p = MakeProfile();
  p.chunks = 0;
  for (auto& row : p.cells) row.assign(p.experts.size(), {});
  const auto parsed = ParseProfile(ToJson(p), "p");
  ASSERT_TRUE(parsed) << parsed.error().message;
  ExpectEqual(*parsed, p);
}

TEST(PlanTest, FileRoundTrip) {
  const std::string path = ::testing::TempDir() + "/moend_plan_test.json";
  ASSERT_TRUE(WriteFileAtomically(path, ToJson(MakePlan())));
  const auto plan = LoadPlan(path);
  ASSERT_TRUE(plan);
  ExpectEqual(*plan, MakePlan());
  const auto profile = LoadProfile(path);
  ASSERT_FALSE(profile);
  EXPECT_EQ(profile.error().code, ErrorCode::kMismatch);
  std::remove(path.c_str());
  EXPECT_EQ(LoadPlan(path).error().code, ErrorCode::kNotFound);
}

TEST(PlanTest, LayersAreLinesForPeople) {
  const std::string json = ToJson(MakePlan());
  EXPECT_NE(json.find("\n    {\"keep\":0.7,\"k_bits\":3,\"v_bits\":8,\"predicted\":1e-17},\n"),
            std::string::npos)
      << json;
}

TEST(PlanTest, UnknownFieldsAreIgnored) {
  const auto plan = ParsePlan(Replaced(ToJson(MakePlan()), "\"bytes\"", "\"later\": [1], \"bytes\""), "p");
  ASSERT_TRUE(plan);
  ExpectEqual(*plan, MakePlan());
}

TEST(PlanTest, ErrorsNameFileFieldAndRemedy) {
  struct Case {
    std::string from, to, message;
  };
  const std::string json = ToJson(MakePlan());
  const std::vector<Case> cases = {
      {"\"k_bits\":3", "\"k_bits\":5", "dir/plan.json: layers[1].k_bits is 5; possible: 16, 8, 4, 3, 2"},
      {"\"k_bits\":3", "\"k_bits\":3.0", "layers[1].k_bits is 3.0, where a whole number is needed"},
      {"\"k_bits\":3", "\"k_bits\":4294967299", "layers[1].k_bits is 4294967299; possible"},
      {"\"k_bits\":3", "\"bits\":3", "layers[1].k_bits is missing"},
      {"\"keep\":0.7", "\"keep\":0", "layers[1].keep is 0; possible: above 0 and up to 1"},
      {"\"keep\":0.7", "\"keep\":1.01", "layers[1].keep is 1.01"},
      {"\"keep\":0.7", "\"keep\":1e999", "not valid JSON"},
      {"\"keep\":0.7", "\"keep\":null", "layers[1].keep is null, where a number is needed"},
      {"\"keep\":0.7", "\"keep\":[[]]", "layers[1].keep is an array, where a number is needed"},
      {",\"predicted\":1e-17", "", "layers[1].predicted is missing"},
      {",\"predicted\":0.1", "", "layers[1] has a predicted loss"},
      {"{\"keep\":0.7,\"k_bits\":3,\"v_bits\":8,\"predicted\":1e-17},", "", "layers has 2 layers"},
      {"\"context_length\": 16384", "\"context_length\": 0", "context_length is 0; possible: 1 to"},
      {"\"context_length\": 16384", "\"context_length\": 18446744073709551615", "context_length is 1844"},
      {"\"context_length\": 16384", "\"context_length\": 99999999999999999999999", "context_length is 9.99"},
      {"\"context_length\": 16384", "\"context_length\": -1", "context_length is -1"},
      {"\"bytes\": 123456789", "\"bytes\": -5", "bytes is -5"},
      {"\"n_layers\":3", "\"n_layers\":1000000000000",
       "model.n_layers is 1000000000000; possible: 1 to 1024"},
      {"\"head_size\":64", "\"head_size\":72", "model.head_size is 72; possible: multiples of 16"},
      {"\"hash\":\"0123456789abcdef\"", "\"hash\":\"xyz\"", "model.hash is \"xyz\""},
      {"\"architecture\":\"llama\"", "\"architecture\":7",
       "model.architecture is 7, where a string is needed"},
      {"\"sinks\":4", "\"sinks\":-4", "protected.sinks is -4"},
      {"\"moend\": \"plan\"", "\"moend\": \"plant\"", "this is a \"plant\" file"},
      {"\"moend\": \"plan\"", "\"moend\": \"profile\"", "this is a \"profile\" file"},
      {"\"moend\"", "\"other\"", "moend is missing"},
      {"\"layers\": [", "\"layers\": 5, \"x\": [", "layers is 5, where an array is needed"},
  };
  for (const Case& c : cases) {
    const auto plan = ParsePlan(Replaced(json, c.from, c.to), "dir/plan.json");
    ASSERT_FALSE(plan) << c.from << " -> " << c.to;
    EXPECT_EQ(plan.error().message.find("dir/plan.json: "), 0u) << plan.error().message;
    EXPECT_NE(plan.error().message.find(c.message), std::string::npos) << c.message << "\n"
                                                                       << plan.error().message;
  }
  EXPECT_NE(ParsePlan("[]", "p").error().message.find("is an array, where an object is needed"),
            std::string::npos);
  EXPECT_EQ(ParsePlan("", "p").error().code, ErrorCode::kCorrupt);
}

TEST(PlanTest, OtherSchemaVersionIsAMismatch) {
  const auto plan = ParsePlan(Replaced(ToJson(MakePlan()), "\"schema\": 1", "\"schema\": 2"), "p.json");
  ASSERT_FALSE(plan);
  EXPECT_EQ(plan.error().code, ErrorCode::kMismatch);
  EXPECT_EQ(plan.error().message,
            "p.json: a plan of schema version 2; this program reads version 1 and is older than the file");
  const auto old = ParsePlan(Replaced(ToJson(MakePlan()), "\"schema\": 1", "\"schema\": 0"), "p.json");
  ASSERT_FALSE(old);
  EXPECT_EQ(old.error().message,
            "p.json: a plan of schema version 0; this program reads version 1 (moend solve makes it anew)");
}

TEST(PlanTest, ProfileTablesMustFit) {
  const std::string json = ToJson(MakeProfile());
  const std::vector<std::array<std::string, 3>> cases = {
      {"\"kl\":[", "\"kl\":[0.5,", "layers[0].kl has 5 numbers; needed: one for each of the 4 experts"},
      {"\"l2\":[", "\"l2\":[null,", "layers[0].l2 has 5 numbers"},
      {"\"kl\":[0.010000000000000002", "\"kl\":[\"x\"", "layers[0].kl[0] is \"x\", where a number is needed"},
      {"{\"keep\":0.1,\"k_bits\":4,\"v_bits\":4}", "{\"keep\":0.1,\"k_bits\":4,\"v_bits\":2}",
       "experts[1] is out of order"},
      {"\"evaluated\": 256", "\"evaluated\": 4097", "evaluated is 4097; possible: 0 to 4096"},
      {"\"chunks\": 3", "\"chunks\": -3", "chunks is -3"},
  };
  for (const auto& [from, to, message] : cases) {
    const auto profile = ParseProfile(Replaced(json, from, to), "p");
    ASSERT_FALSE(profile) << from;
    EXPECT_NE(profile.error().message.find(message), std::string::npos) << profile.error().message;
  }
}

TEST(PlanTest, DepthBombIsRefused) {
  for (const std::string& piece : {std::string("["), std::string("{\"a\":")}) {
    std::string bomb;
    for (int i = 0; i < 200000; ++i) bomb += piece;
    EXPECT_EQ(ParsePlan(bomb, "p").error().code, ErrorCode::kCorrupt);
    EXPECT_EQ(ParseProfile("{\"moend\": \"profile\", \"x\": " + bomb, "p").error().code, ErrorCode::kCorrupt);
  }
  // Brackets inside strings are text.
  Plan plan = MakePlan();
  plan.model.name = std::string(100, '[') + "\\\"" + std::string(100, '{');
  EXPECT_TRUE(ParsePlan(ToJson(plan), "p"));
}

TEST(PlanTest, MutatedFilesNeverCrash) {
  const std::string plan = ToJson(MakePlan()), profile = ToJson(MakeProfile());
  for (std::size_t n = 0; n + 2 < plan.size(); ++n) EXPECT_FALSE(ParsePlan(plan.substr(0, n), "p")) << n;
  for (std::size_t n = 0; n + 2 < profile.size(); ++n)
    EXPECT_FALSE(ParseProfile(profile.substr(0, n), "p")) << n;

  std::mt19937 random(1);
  int accepted = 0;
  for (int i = 0; i < 4000; ++i) {
    for (const bool is_plan : {true, false}) {
      std::string text = is_plan ? plan : profile;
      for (int flips = 1 + i % 3; flips > 0; --flips)
        text[random() % text.size()] ^= static_cast<char>(1 << random() % 8);
      if (is_plan) {
        const auto parsed = ParsePlan(text, "p");
        if (!parsed) continue;
        ++accepted;
        for (const Expert& e : parsed->layers) {
          EXPECT_TRUE(e.keep > 0 && e.keep <= 1 && IsBitWidth(e.k_bits) && IsBitWidth(e.v_bits));
        }
        EXPECT_EQ(static_cast<int64_t>(parsed->layers.size()), parsed->model.n_layers);
        EXPECT_TRUE(ParsePlan(ToJson(*parsed), "p"));
      } else if (const auto parsed = ParseProfile(text, "p")) {
        ++accepted;
        for (const auto& row : parsed->cells) EXPECT_EQ(row.size(), parsed->experts.size());
        EXPECT_TRUE(ParseProfile(ToJson(*parsed), "p"));
      }
    }
  }
  EXPECT_GT(accepted, 100) << "mutations of digits and names should still parse";
}

TEST(PlanTest, BytesThatAreNotUtf8AreRepairedOnWriting) {
  Plan plan = MakePlan();
  plan.model.name = "bad \xff\xfe name";
  const auto parsed = ParsePlan(ToJson(plan), "p");
  ASSERT_TRUE(parsed) << parsed.error().message;
  EXPECT_EQ(parsed->model.name, "bad \xef\xbf\xbd\xef\xbf\xbd name");
}

TEST(PlanTest, SameModel) {
  const Fingerprint a = Model();
  Fingerprint b = a;
  EXPECT_TRUE(CheckSameModel(a, b, "p"));
  b.name = "renamed";
  EXPECT_TRUE(CheckSameModel(a, b, "p")) << "the name is for people";
  b.hash = "fedcba9876543210";
  const auto result = CheckSameModel(a, b, "plan.json");
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().code, ErrorCode::kMismatch);
  for (const char* part : {"plan.json", "tiny", "renamed", "0123456789abcdef", "fedcba9876543210",
                           "calibrate again with this model"}) {
    EXPECT_NE(result.error().message.find(part), std::string::npos) << part;
  }
  b = a;
  b.shape.head_size = 128;
  EXPECT_FALSE(CheckSameModel(a, b, "p"));
  b = a;
  b.n_layers = 4;
  EXPECT_FALSE(CheckSameModel(a, b, "p"));
}

TEST(PlanTest, Bytes) {
  const Fingerprint model = Model();
  EXPECT_EQ(FullBytes(model, 1000), 3 * 1000 * 2 * 64 * 2 * 2);
  const Plan full = FullPlan(model, 1000);
  EXPECT_EQ(full.variant, "full");
  ASSERT_EQ(full.layers.size(), 3u);
  for (const Expert& e : full.layers) EXPECT_EQ(e, Expert{});
  EXPECT_GE(full.bytes, FullBytes(model, 1000));
  EXPECT_EQ(full.bytes, 3 * *LayerBytes(model.shape, Expert{}, full.guard, 1000, 0));

  Plan mixed = full;
  mixed.layers[1] = {0.25, 4, 2};
  EXPECT_EQ(*PlanBytes(mixed, 1000, 4), 2 * *LayerBytes(model.shape, Expert{}, full.guard, 1000, 4) +
                                            *LayerBytes(model.shape, {0.25, 4, 2}, full.guard, 1000, 4));
  EXPECT_FALSE(PlanBytes(mixed, -1, 0));
  mixed.layers[2].k_bits = 5;
  EXPECT_EQ(PlanBytes(mixed, 1000, 0).error().code, ErrorCode::kInvalidArgument);

  Fingerprint huge = model;
  huge.n_layers = INT64_MAX / 2;
  EXPECT_EQ(FullBytes(huge, 1000), INT64_MAX);
}

}  // namespace
}  // namespace moend
