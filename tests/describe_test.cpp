#include "moend/plan/describe.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>
#include <vector>

namespace moend {
namespace {

std::vector<std::string> Lines(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

// Columns on the screen: no colour codes, UTF-8 sequences counted once.
std::size_t Columns(const std::string& line) {
  std::size_t n = 0;
  for (std::size_t i = 0; i < line.size(); ++i) {
    if (line[i] == '\x1b') {
      i = line.find('m', i);
    } else if ((static_cast<unsigned char>(line[i]) & 0xc0) != 0x80) {
      ++n;
    }
  }
  return n;
}

std::string LineWith(const std::string& text, const std::string& start) {
  for (const std::string& line : Lines(text))
    if (line.rfind(start, 0) == 0) return line;
  return "";
}

Profile MakeProfile(int64_t layers, const std::vector<double>& keeps) {
  Profile p;
  p.model = {"llama", "tiny", layers, {2, 64}, "0123456789abcdef"};
  p.length = 8192;
  p.evaluated = 512;
  p.chunks = 3;
  p.chunks_wanted = 8;
  for (const double keep : keeps)
    for (const int k : {2, 4, 16})
      for (const int v : {2, 16}) p.experts.push_back({keep, k, v});
  for (int64_t l = 0; l < layers; ++l) {
    auto& row = p.cells.emplace_back();
    for (const Expert& e : p.experts) {
      const double loss = (1.01 - e.keep) * (1 + static_cast<double>(l)) / e.k_bits / e.v_bits;
      row.push_back({std::sqrt(loss), loss});
    }
  }
  return p;
}

Plan MakeDescribed() {
  Plan p;
  p.model = {"llama", "tiny", 2, {2, 64}, "0123456789abcdef"};
  p.scorer = "snapkv";
  p.solver = "exact";
  p.metric = "kl";
  p.context_length = 4096;
  p.layers = {{0.25, 4, 2}, {1.0, 16, 16}};
  p.predicted = {0.5, 0.125};
  p.bytes = *PlanBytes(p, 4096, 0);
  p.budget_bytes = 2 << 20;
  return p;
}

TEST(DescribeTest, ProfileSaysHowItWasMeasured) {
  const std::string text = DescribeProfile(MakeProfile(3, {0.5, 1.0}));
  for (const char* part :
       {"profile of tiny\nllama, 3 layers, 2 KV heads of 64\n", "3 of 8 chunks of 8192 tokens", "last 512",
        "4 sinks", "newest 28", "scorer keydiff", "50%", "100%", "layer 2"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << "\n" << text;
  }
  EXPECT_NE(text.find("most   0.383 (layer 2, keep 50%, K 2, V 2)"), std::string::npos) << text;
  EXPECT_NE(text.find("keep 50%: kl 3x, l2 1.73x"), std::string::npos) << text;
}

TEST(DescribeTest, WhatARepetitionMeasuresIsNotTheLastTokens) {
  Profile profile = MakeProfile(2, {0.5, 1.0});
  EXPECT_NE(DescribeProfile(profile).find(" of each measured\n"), std::string::npos);
  profile.method = ProfileMethod::kReconstruction;
  const std::string text = DescribeProfile(profile);
  EXPECT_EQ(text.find("the last"), std::string::npos) << text;
  EXPECT_NE(text.find("each measured by what its repetition looks at\n"), std::string::npos) << text;
}

TEST(DescribeTest, ScorersOfLayersAreRanges) {
  Profile profile = MakeProfile(3, {0.5, 1.0});
  profile.scorer = "keydiff,expected,expected,keydiff,expected";
  EXPECT_NE(DescribeProfile(profile).find("scorer expected 1-2 4, keydiff 0 3;"), std::string::npos);
  Plan plan = MakeDescribed();
  plan.scorer = "h2o,h2o";
  EXPECT_NE(DescribePlan(plan).find("scorer h2o 0-1"), std::string::npos);
}

TEST(DescribeTest, ShadesDarkenWithTheLoss) {
  const std::string row = LineWith(DescribeProfile(MakeProfile(1, {0.5, 1.0})), "layer 0").substr(11);
  const std::string shades = " .:-=+*#%@";
  // Two columns a cell; in a group K 2, 4, 16 by V 2, 16: the first is the worst, the last the best.
  EXPECT_EQ(row.substr(0, 2), "@@");
  EXPECT_GT(shades.find(row[0]), shades.find(row[10])) << row;
  EXPECT_GT(shades.find(row[0]), shades.find(row[13])) << row;
}

TEST(DescribeTest, LinesFitTheWidth) {
  const std::vector<double> keeps = {0.0125, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0};
  Profile profile = MakeProfile(80, keeps);
  profile.model.name = "a model with quite a long name that somebody gave it in a file";
  profile.model.architecture = std::string(64, 'x');
  profile.scorer = std::string(64, 'y');
  Plan plan = MakeDescribed();
  plan.model = profile.model;
  plan.variant = plan.solver = plan.metric = profile.scorer;
  plan.layers.assign(80, {0.0125, 16, 16});
  plan.predicted.assign(80, 1.2345e-10);
  plan.context_length = INT32_MAX;
  for (const bool color : {false, true}) {
    for (const int width : {0, 80, 100, 250}) {
      for (const std::string& text :
           {DescribeProfile(profile, {color, width}), DescribePlan(plan, {color, width})}) {
        ASSERT_EQ(text.back(), '\n');
        EXPECT_EQ(text.find('\x1b') != std::string::npos, color);
        for (const std::string& line : Lines(text))
          EXPECT_LE(Columns(line), static_cast<std::size_t>(std::max(width, 80))) << line;
      }
    }
  }
  // All experts are there, whatever the number of panels.
  for (const int width : {80, 250}) {
    std::string text = DescribeProfile(profile, {false, width});
    int titles = 0;
    for (const char* keep : {" 1.25%", " 5%", " 40%", " 100%"})
      titles += text.find(keep) != std::string::npos;
    EXPECT_EQ(titles, 4) << text;
  }
}

TEST(DescribeTest, NamesCannotSteerTheTerminal) {
  Profile profile = MakeProfile(1, {1.0});
  profile.model.name = "evil\x1b]0;title\x07\n\r";
  Plan plan = MakeDescribed();
  plan.model.name = plan.scorer = plan.variant = profile.model.name;
  for (const std::string& text : {DescribeProfile(profile), DescribePlan(plan)}) {
    EXPECT_NE(text.find("evil?]0;title???"), std::string::npos) << text;
    for (const char c : text) EXPECT_TRUE(c == '\n' || static_cast<unsigned char>(c) >= 0x20);
  }
}

TEST(DescribeTest, UnfinishedOrPerfectProfiles) {
  Profile profile = MakeProfile(2, {0.5});
  for (auto& row : profile.cells)
    for (ProfileCell& cell : row) cell = {};
  EXPECT_NE(DescribeProfile(profile).find("nothing is lost anywhere"), std::string::npos);
  profile.chunks = 0;
  EXPECT_NE(DescribeProfile(profile).find("no chunk is finished yet"), std::string::npos);
  profile.chunks = 1;
  profile.cells[0][0].kl = 0.25;  // a single loss
  const std::string text = DescribeProfile(profile);
  EXPECT_NE(text.find("most   0.25"), std::string::npos) << text;
  EXPECT_NE(text.find("layer 0    @@"), std::string::npos) << text;
}

TEST(DescribeTest, PlanRowsAndTotals) {
  const Plan plan = MakeDescribed();
  const std::string text = DescribePlan(plan);
  const std::string row = LineWith(text, "    0 ");
  std::istringstream in(row);
  std::string layer, keep, tokens, k, v, mib, loss, bar;
  in >> layer >> keep >> tokens >> k >> v >> mib >> loss >> bar;
  EXPECT_EQ(keep, "25%");
  EXPECT_EQ(tokens, std::to_string(KeptTokens(0.25, plan.guard, 4096)));
  EXPECT_EQ(k, "4");
  EXPECT_EQ(v, "2");
  const auto bytes = *LayerBytes(plan.model.shape, plan.layers[0], plan.guard, 4096, 0);
  EXPECT_NEAR(std::stod(mib), static_cast<double>(bytes) / (1 << 20), 1e-3);
  EXPECT_EQ(loss, "0.5");
  EXPECT_EQ(bar, std::string(30, '#')) << "the worst layer has the longest bar";

  const double ratio = static_cast<double>(FullBytes(plan.model, 4096)) / static_cast<double>(plan.bytes);
  EXPECT_NE(text.find(fmt::format("{:.2f}x smaller", ratio)), std::string::npos) << text;
  EXPECT_NE(text.find("budget 2.000 MiB, predicted kl 0.625 in all"), std::string::npos) << text;
}

TEST(DescribeTest, PlanWithScorerStateAndWithoutPrediction) {
  Plan plan = MakeDescribed();
  plan.predicted.clear();
  plan.bytes = *PlanBytes(plan, 4096, 4);
  const std::string text = DescribePlan(plan);
  EXPECT_EQ(text.find("predicted"), std::string::npos);
  const auto bytes = *LayerBytes(plan.model.shape, plan.layers[1], plan.guard, 4096, 4);
  EXPECT_NE(LineWith(text, "    1 ").find(fmt::format("{:.3f}", static_cast<double>(bytes) / (1 << 20))),
            std::string::npos)
      << text;
}

}  // namespace
}  // namespace moend
