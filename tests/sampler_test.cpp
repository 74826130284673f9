#include "moend/engine/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <set>

#include "moend/engine/text_stream.h"

namespace moend {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// How often each token comes out of `draws` draws.
std::map<int32_t, int> Draw(const SamplerOptions& options, const std::vector<float>& logits, int draws) {
  Sampler sampler(options);
  std::map<int32_t, int> counts;
  for (int i = 0; i < draws; ++i) ++counts[sampler.Sample(logits)];
  return counts;
}

SamplerOptions Plain(float temperature = 1.0f) {
  SamplerOptions o;
  o.temperature = temperature;
  o.top_k = 0;
  o.top_p = 1;
  o.min_p = 0;
  o.seed = 7;
  return o;
}

std::vector<float> Logs(const std::vector<float>& probabilities) {
  std::vector<float> logits;
  for (const float p : probabilities) logits.push_back(std::log(p));
  return logits;
}

TEST(Sampler, GreedyTakesTheFirstOfTheLargest) {
  SamplerOptions o = Plain(0);
  EXPECT_EQ(Sampler(o).Sample(std::vector<float>{1, 5, 5, -2}), 1);
  EXPECT_EQ(Sampler(o).Sample(std::vector<float>{NAN, -kInf, -3}), 2);
  o.temperature = -1;
  EXPECT_EQ(Sampler(o).Sample(std::vector<float>{0, 0, 4}), 2);
  o = Plain(1);
  o.top_k = 1;
  EXPECT_EQ(Sampler(o).Sample(std::vector<float>{0, 1, 0.5f}), 1);
}

TEST(Sampler, DrawsInProportionToTheSoftmax) {
  const std::vector<float> p = {0.5f, 0.3f, 0.15f, 0.05f};
  constexpr int kDraws = 40000;
  auto counts = Draw(Plain(), Logs(p), kDraws);
  for (int t = 0; t < 4; ++t) {
    const double expected = p[static_cast<std::size_t>(t)];
    const double sigma = std::sqrt(expected * (1 - expected) / kDraws);
    EXPECT_NEAR(counts[t] / double{kDraws}, expected, 5 * sigma) << "token " << t;
  }
  // Temperature 1/2 squares the probabilities.
  counts = Draw(Plain(0.5f), Logs(p), kDraws);
  const double norm = 0.25 + 0.09 + 0.0225 + 0.0025;
  EXPECT_NEAR(counts[0] / double{kDraws}, 0.25 / norm, 0.0125);
  EXPECT_NEAR(counts[1] / double{kDraws}, 0.09 / norm, 0.0125);
}

TEST(Sampler, TopKLeavesTheKLargest) {
  SamplerOptions o = Plain();
  o.top_k = 2;
  const auto counts = Draw(o, {0, 1, 3, 2.9f, 0.5f}, 2000);
  EXPECT_EQ(counts.size(), 2u);
  EXPECT_TRUE(counts.contains(2) && counts.contains(3));
  o.top_k = 100;  // more than there are
  EXPECT_EQ(Draw(o, {0, 0, 0}, 2000).size(), 3u);
}

TEST(Sampler, TopPIncludesTheTokenThatReachesIt) {
  SamplerOptions o = Plain();
  o.top_p = 0.6f;
  EXPECT_EQ(Draw(o, Logs({0.1f, 0.5f, 0.3f, 0.1f}), 2000).size(), 2u);
  o.top_p = 0;  // never empty
  EXPECT_EQ(Draw(o, Logs({0.1f, 0.5f, 0.4f}), 100).size(), 1u);
}

TEST(Sampler, MinPIsRelativeToTheLargest) {
  SamplerOptions o = Plain();
  o.min_p = 0.25f;
  const auto counts = Draw(o, Logs({0.5f, 0.13f, 0.12f, 0.25f}), 4000);
  EXPECT_TRUE(counts.contains(0) && counts.contains(1) && counts.contains(3));
  EXPECT_FALSE(counts.contains(2));
}

// Probabilities 0.5, 0.2, 0.2, 0.1: an entropy of 1.22 nats; surprises of 0.69, 1.61, 1.61, 2.30. The order
// by distance is 0.2, 0.2, 0.5, 0.1.
TEST(Sampler, TypicalPKeepsWhatIsAsSurprisingAsExpected) {
  const auto kept = [](float typical_p) {
    SamplerOptions o = Plain();
    o.typical_p = typical_p;
    std::set<int32_t> tokens;
    for (const auto& [token, n] : Draw(o, Logs({0.5f, 0.2f, 0.2f, 0.1f}), 2000)) tokens.insert(token);
    return tokens;
  };
  EXPECT_EQ(kept(0.1f), (std::set<int32_t>{1}));
  EXPECT_EQ(kept(0.3f), (std::set<int32_t>{1, 2}));
  EXPECT_EQ(kept(0.5f), (std::set<int32_t>{0, 1, 2}));
  EXPECT_EQ(kept(0.95f), (std::set<int32_t>{0, 1, 2, 3}));
  EXPECT_EQ(kept(1.0f), (std::set<int32_t>{0, 1, 2, 3}));
}

TEST(Sampler, TheSeedDecidesTheSequence) {
  SamplerOptions o = Plain();
  const std::vector<float> flat(50, 0.0f);
  const auto sequence = [&](uint64_t seed) {
    o.seed = seed;
    Sampler s(o);
    std::vector<int32_t> tokens;
    for (int i = 0; i < 32; ++i) tokens.push_back(s.Sample(flat));
    return tokens;
  };
  EXPECT_EQ(sequence(1), sequence(1));
  EXPECT_NE(sequence(1), sequence(2));
}

TEST(Sampler, UnusableLogitsAreNeverDrawn) {
  const auto counts = Draw(Plain(), {NAN, 0, -kInf, 0, NAN}, 1000);
  EXPECT_EQ(counts.size(), 2u);
  EXPECT_TRUE(counts.contains(1) && counts.contains(3));
  // Nothing usable at all: some token of the vocabulary, no crash.
  const int32_t t = Sampler(Plain()).Sample(std::vector<float>{-kInf, NAN});
  EXPECT_TRUE(t == 0 || t == 1);
}

// What comes out when `text` arrives in pieces of `n` bytes, and the parts as they were released.
std::string Stream(TextStream stream, const std::string& text, std::size_t n,
                   std::vector<std::string>* parts = nullptr) {
  std::string all;
  const auto add = [&](std::string part) {
    if (parts && !part.empty()) parts->push_back(part);
    all += part;
  };
  for (std::size_t i = 0; i < text.size(); i += n) add(stream.Push(std::string_view(text).substr(i, n)));
  add(stream.Finish());
  return all;
}

TEST(TextStream, CharactersStayWhole) {
  const std::string text = "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80z";
  for (std::size_t n = 1; n <= text.size(); ++n) EXPECT_EQ(Stream(TextStream(), text, n), text);
  std::vector<std::string> parts;
  Stream(TextStream(), text, 1, &parts);
  EXPECT_EQ(parts, (std::vector<std::string>{"a", "\xC3\xA9", "\xE2\x82\xAC", "\xF0\x9F\x98\x80", "z"}));
}

TEST(TextStream, BytesThatAreNoTextAreReplaced) {
  const std::string r = "\xEF\xBF\xBD";
  for (std::size_t n = 1; n < 6; ++n) {
    EXPECT_EQ(Stream(TextStream(), "a\xFF!", n), "a" + r + "!");
    EXPECT_EQ(Stream(TextStream(), "\xC0\xAF", n), r + r);                  // overlong
    EXPECT_EQ(Stream(TextStream(), "\xED\xA0\x80", n), r + r + r);          // surrogate
    EXPECT_EQ(Stream(TextStream(), "\xE2\x82x", n), r + "x");               // cut in the middle
    EXPECT_EQ(Stream(TextStream(), "ok\xF0\x9F\x98", n), "ok" + r);         // cut at the end
    EXPECT_EQ(Stream(TextStream(), "\xF4\x90\x80\x80", n), r + r + r + r);  // above U+10FFFF
  }
}

TEST(TextStream, TheTextEndsBeforeTheFirstStopString) {
  for (std::size_t n = 1; n < 8; ++n) {
    EXPECT_EQ(Stream(TextStream({"END", "\n\n"}), "one\n\ntwo END three", n), "one");
    EXPECT_EQ(Stream(TextStream({"END"}), "EN ENE EEND x", n), "EN ENE E");
    EXPECT_EQ(Stream(TextStream({"END"}), "no stop: EN", n), "no stop: EN");
    EXPECT_EQ(Stream(TextStream({""}), "an empty stop is none", n), "an empty stop is none");
  }
  TextStream s({"stop"});
  EXPECT_EQ(s.Push("a st"), "a ");  // held back
  EXPECT_FALSE(s.stopped());
  EXPECT_EQ(s.Push("opped"), "");
  EXPECT_TRUE(s.stopped());
  EXPECT_EQ(s.Push("more"), "");
  EXPECT_EQ(s.Finish(), "");
}

}  // namespace
}  // namespace moend
