// Scores of hand-made answers, each worked out by hand or with the published scorer.
#include "moend/eval/metrics.h"

#include <gtest/gtest.h>

#include "moend/eval/interval.h"
#include "moend/eval/math.h"
#include "moend/eval/text.h"

namespace moend::eval {
namespace {

double One(TaskMetric metric, std::string_view text, const std::string& answer,
           std::vector<std::string> classes = {}) {
  const std::vector<std::string> answers = {answer};
  return Score(metric, text, answers, classes);
}

TEST(Text, DecodesAndRestoresAnyBytes) {
  const std::string odd = "a\xC3\xA9\xE2\x80\x94\xF0\x9F\x98\x80|\xFF\xC3|\xE2\x82|\xC0\xAF|\xED\xA0\x80";
  std::string back;
  for (const uint32_t c : CodePoints(odd)) AppendUtf8(c, back);
  EXPECT_EQ(back, odd);
  EXPECT_EQ(CodePoints("\xC3\xA9"), std::vector<uint32_t>{0xE9});
  EXPECT_EQ(CodePoints("\xC0\xAF").size(), 2u);      // overlong
  EXPECT_EQ(CodePoints("\xED\xA0\x80").size(), 3u);  // a surrogate
}

TEST(Text, LowersAndFolds) {
  EXPECT_EQ(Lower("ÀÉŁŽÿŸ ΑΩ ЖЁ ß×"), "àéłžÿÿ αω жё ß×");
  EXPECT_EQ(FoldSpaces("  a\t\u00A0b\u3000\nc "), "a b c");
  EXPECT_EQ(Trim("\n \u2003x y \n"), "x y");
  EXPECT_EQ(Trim(" \n"), "");
  EXPECT_EQ(FirstLine("\n\nLabel \nrest"), "Label ");
  EXPECT_EQ(ReplaceAll("a{x}b{x}", "{x}", "{x}{x}"), "a{x}{x}b{x}{x}");
  EXPECT_EQ(DigitRuns("a12b003").size(), 2u);
}

TEST(Metrics, NamesRoundTrip) {
  for (const std::string& name : TaskMetricNames()) EXPECT_EQ(Name(ParseTaskMetric(name).value()), name);
  const auto unknown = ParseTaskMetric("bleu");
  ASSERT_FALSE(unknown);
  EXPECT_EQ(unknown.error().code, ErrorCode::kNotFound);
  EXPECT_NE(unknown.error().message.find("leading_words"), std::string::npos);
}

TEST(Metrics, Exact) {
  EXPECT_EQ(One(TaskMetric::kExact, "  Rita  Braninmer,\nborn in BREMEN ", "Rita Braninmer, born in Bremen"),
            1);
  EXPECT_EQ(One(TaskMetric::kExact, "42829.", "42829"), 0);
  EXPECT_EQ(One(TaskMetric::kExact, "", "42829"), 0);
}

TEST(Metrics, LeadingWords) {
  EXPECT_DOUBLE_EQ(One(TaskMetric::kLeadingWords, " who got the sane idea", "who got the insane idea"), 0.6);
  EXPECT_EQ(One(TaskMetric::kLeadingWords, "one two three four", "one two three"), 1);
  EXPECT_EQ(One(TaskMetric::kLeadingWords, "two three", "one two three"), 0);
}

TEST(Metrics, LastNumber) {
  EXPECT_EQ(LastNumber("Step 1: 5 + 3 = 8. Step 2: 8 - 12 = -4."), "-4");
  EXPECT_EQ(LastNumber("between 10-20"), "20");
  EXPECT_EQ(LastNumber("$1,234,567.50 in all"), "1234567.50");
  EXPECT_EQ(LastNumber("1,2,3"), "3");
  EXPECT_EQ(LastNumber("1,2345"), "2345");
  EXPECT_EQ(LastNumber("is .25"), "0.25");
  EXPECT_EQ(LastNumber("\u22127"), "-7");
  EXPECT_EQ(LastNumber("none"), "");
  EXPECT_EQ(One(TaskMetric::kLastNumber, "so 36, then 038.0", "38"), 1);
  EXPECT_EQ(One(TaskMetric::kLastNumber, "70,000", "70000"), 1);
  EXPECT_EQ(One(TaskMetric::kLastNumber, "38 and then 39", "38"), 0);
  EXPECT_EQ(One(TaskMetric::kLastNumber, "nothing", "38"), 0);
}

TEST(Metrics, FirstLine) {
  EXPECT_EQ(One(TaskMetric::kFirstLine, " Pag\nItem: next", "pag"), 1);
  EXPECT_EQ(One(TaskMetric::kFirstLine, "plonk\npag", "pag"), 0);
}

TEST(Metrics, QaF1) {
  // {cat, sat} against {cat, sat, down}: precision 1, recall 2/3.
  EXPECT_DOUBLE_EQ(One(TaskMetric::kQaF1, "The cat sat.", "a cat sat down"), 0.8);
  EXPECT_EQ(One(TaskMetric::kQaF1, "An  Answer!", "answer"), 1);
  EXPECT_EQ(One(TaskMetric::kQaF1, "well-known", "wellknown"),
            1);  // punctuation vanishes, it does not separate
  EXPECT_EQ(One(TaskMetric::kQaF1, "theatre", "atre"), 0);
  // Multisets: "x x" against "x" has one word in common; precision 1/2, recall 1.
  EXPECT_DOUBLE_EQ(QaF1("x x", "x"), 2.0 / 3.0);
  EXPECT_EQ(QaF1("", "x"), 0);
  EXPECT_EQ(QaF1("the", "the"), 0);  // nothing is left of either
  EXPECT_EQ(QaF1("end\u2014the\u2014end", "end\u2014 \u2014end"), 1);
  const std::vector<std::string> answers = {"wrong", "right one"};
  EXPECT_EQ(Score(TaskMetric::kQaF1, "Right one", answers), 1);  // the best of them
  EXPECT_DOUBLE_EQ(One(TaskMetric::kQaF1Characters, "北京。", "北京市"), 0.8);
}

TEST(Metrics, RougeL) {
  // LCS "the cat": 2 of 3 distinct words on either side.
  EXPECT_NEAR(RougeL("the cat slept", "the cat sat"), 2.0 / 3.0, 1e-7);
  EXPECT_NEAR(RougeL("a b c", "a b c"), 1, 1e-7);
  EXPECT_EQ(RougeL("", "a b"), 0);
  EXPECT_EQ(RougeL("...", "a b"), 0);
  EXPECT_EQ(RougeL("x", "a b"), 0);
  // Sets of words: "b b b" counts once. Sentence by sentence, in union: {a, b} of {a, b, c} and {a, b}.
  EXPECT_NEAR(RougeL("b b b. a", "a c. b"), 2 * (1.0 * 2 / 3) / (1 + 2.0 / 3), 1e-7);
  // A sentence of white space is one empty word in the original: {a, ""} against {a}.
  EXPECT_NEAR(RougeL("a. ", "a"), 2 * 0.5 / 1.5, 1e-7);
}

TEST(Metrics, Classification) {
  const std::vector<std::string> classes = {"Other", "Other entity", "Animal", "entity", "City"};
  EXPECT_EQ(Classification("Animal", "Animal", classes), 1);
  EXPECT_EQ(Classification("Animal or City", "Animal", classes), 0.5);
  EXPECT_EQ(Classification("City", "Animal", classes), 0);
  EXPECT_EQ(Classification("", "Animal", classes), 0);
  // Found: Other, Other entity, entity. Parts of the gold name are removed, but removing "Other" makes the
  // walk skip "Other entity", not "entity", so both parts go.
  EXPECT_EQ(Classification("Other entity", "Other entity", classes), 1);
  // Here the walk skips "entity" after removing "Other", and it stays.
  const std::vector<std::string> quirk = {"Other", "entity", "Other entity"};
  EXPECT_EQ(Classification("Other entity", "Other entity", quirk), 0.5);
}

TEST(Metrics, RetrievalAndCount) {
  EXPECT_EQ(One(TaskMetric::kRetrieval, "Paragraph 12", "Paragraph 12"), 1);
  EXPECT_EQ(One(TaskMetric::kRetrieval, "Paragraph 12 or 13", "Paragraph 12"), 0.5);
  EXPECT_EQ(One(TaskMetric::kRetrieval, "Paragraph 012", "Paragraph 12"), 0);  // compared as text
  EXPECT_EQ(One(TaskMetric::kRetrieval, "段落3", "段落3"), 1);
  EXPECT_EQ(One(TaskMetric::kRetrieval, "none", "Paragraph 12"), 0);
  EXPECT_DOUBLE_EQ(One(TaskMetric::kCount, "7, 8 or 7", "7"), 2.0 / 3.0);
}

TEST(Metrics, CodeSimilarity) {
  EXPECT_EQ(CodeSimilarity("return x\nmore", "return x"), 1);
  EXPECT_EQ(CodeSimilarity("\n# comment\n// other\n```\nreturn x", "return x"), 1);
  EXPECT_DOUBLE_EQ(CodeSimilarity("return x", "return y"), 0.88);  // 2 * 7 / 16 = 0.875, in hundredths
  EXPECT_EQ(CodeSimilarity("# only", "return x"), 0);
  EXPECT_EQ(CodeSimilarity("", "return x"), 0);
}

TEST(Metrics, Contains) {
  const std::vector<std::string> answers = {"ABC", "def"};
  EXPECT_EQ(Score(TaskMetric::kContains, "x abc y", answers), 0.5);
  EXPECT_EQ(Score(TaskMetric::kContains, "DEFABC", answers), 1);
}

TEST(Metrics, Choice) {
  for (const char* text :
       {"B", " B", "(B)", "B.", "b", " (b).", "Answer: B", "**B**", "B) Paris", "\nB\nC", "[B]",
        "The answer is B, not C", "Because D'Artagnan says so: B", "A-levels matter: B"})
    EXPECT_EQ(ChosenLetter(text), 'B') << text;
  for (const char* text : {"", "None", "Bob", "E", "b and c", "ABCD", "x_B", "B2"})
    EXPECT_EQ(ChosenLetter(text), 0) << text;
  EXPECT_EQ(One(TaskMetric::kChoice, "(C) the third", "C"), 1);
  EXPECT_EQ(One(TaskMetric::kChoice, "(C) the third", "D"), 0);
  EXPECT_EQ(One(TaskMetric::kChoice, "no idea", "D"), 0);
  EXPECT_EQ(One(TaskMetric::kChoice, "<think>A or B</think> D", "D"), 1);
}

TEST(Metrics, ReasoningIsNotTheAnswer) {
  EXPECT_EQ(FinalAnswer("<think>5</think>mid</think> 7"), " 7");
  EXPECT_EQ(One(TaskMetric::kExact, "<think>it is 5 or 7</think>\n7", "7"), 1);
  EXPECT_EQ(One(TaskMetric::kContains, "<think>abc</think>no", "abc"), 0);
}

TEST(Math, ExtractsTheFinalAnswer) {
  EXPECT_EQ(ExtractMathAnswer("first \\boxed{1}, then $\\boxed{\\frac{1}{2}}$."), "\\frac{1}{2}");
  EXPECT_EQ(ExtractMathAnswer("\\boxed{\\{1, 2\\}}"), "\\{1, 2\\}");
  EXPECT_EQ(ExtractMathAnswer("\\boxed 7 and on"), "7");
  EXPECT_EQ(ExtractMathAnswer("\\boxed{5} or \\boxed{6"), "5");  // the last one was cut off
  EXPECT_EQ(ExtractMathAnswer("So the answer is: $12$. Done."), "$12$");
  EXPECT_EQ(ExtractMathAnswer("= 9\n#### 18"), "18");
  EXPECT_EQ(ExtractMathAnswer("we get 3 and 4"), "4");
  EXPECT_EQ(ExtractMathAnswer("no idea"), "");
}

TEST(Math, EqualAnswers) {
  const std::pair<const char*, const char*> same[] = {
      {"\\frac{14}{3}", "14/3"},
      {"\\dfrac{17}{50}", "\\frac{17}{50}"},
      {"\\frac43", "\\frac{4}{3}"},
      {"\\frac 59", "\\tfrac{5}{9}"},
      {"0.5", "\\frac{1}{2}"},
      {".5", "0.50"},
      {"90^\\circ", "90"},
      {"90^{\\circ}", "90\u00B0"},
      {"\\text{Evelyn}", "evelyn"},
      {"\\text{(C)}", "C"},
      {"11\\sqrt2", "11\\sqrt{2}"},
      {"6 - 5i", "-5i+6"},
      {"x=5", "5"},
      {"y = 2x + 3", "2x+3"},
      {"x \\in [-2,7]", "[-2, 7]"},
      {"\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)"},
      {"3, 5, 7", "7,5,3"},
      {"\\{1\\pm\\sqrt{5},-2\\}", "\\{-2, 1+\\sqrt{5}, 1-\\sqrt{5}\\}"},
      {"1 \\pm \\sqrt{19}", "1-\\sqrt{19}, 1+\\sqrt{19}"},
      {"10,\\!080", "10080"},
      {"\\$32,\\!348", "32348"},
      {"58,500", "58500"},
      {"864 \\mbox{ inches}^2", "864"},
      {"5.4 \\text{ cents}", "5.40"},
      {"\\frac{270}7\\text{ degrees}", "\\frac{270}{7}"},
      {"1\\frac{4}{5}", "9/5"},
      {"137 \\frac{1}{2}", "137.5"},
      {"4210_{5}", "4210_5"},
      {"(a+5)(b+2)", "(b+2)(a+5)"},
      {"x^5 - x^4 + 1", "1-x^{4}+x^{5}"},
      {"\\cot x", "\\cot(x)"},
      {"(-\\infty, 2) \\cup (3, \\infty)", "(-\\infty,2)\\cup(3,\\infty)"},
      {"\\begin{pmatrix} -1/3 \\\\ 2/3 \\\\ 5/3 \\end{pmatrix}",
       "\\begin{bmatrix}-\\frac{1}{3}\\\\\\frac{2}{3}\\\\\\frac53\\end{bmatrix}"},
      {"\\begin{pmatrix} -1 & 0 \\\\ 0 & -1 \\end{pmatrix}", "\\begin{pmatrix}-1&0\\\\0&-1\\end{pmatrix}"},
      {"5x - 7y + 11z + 4 = 0", "4 + 5x - 7y + 11z = 0"},
      {"50\\%", "50"},
      {"3^{-2}", "\\frac19"},
      {"-x^2", "-(x^2)"},
      {"\\sqrt[3]{8}", "2"},
      {"3!", "6"},
  };
  for (const auto& [a, b] : same) {
    EXPECT_TRUE(SameMath(a, b)) << a << " and " << b;
    EXPECT_TRUE(SameMath(b, a)) << b << " and " << a;
    EXPECT_TRUE(SameMath(a, a)) << a;
  }
  const std::pair<const char*, const char*> different[] = {
      {"\\frac{14}{3}", "3/14"},
      {"(3,4]", "[3,4]"},
      {"(3,4)", "(4,3)"},
      {"3,5", "3,5,7"},
      {"52_8", "52"},
      {"\\text{east}", "\\text{seat}"},
      {"x+1", "x-1"},
      {"2\\sqrt{5}", "\\sqrt{5}"},
      {"0.333", "\\frac13"},
      {"", ""},
      {"5", ""},
      {"\\pi", "3.14"},
      {"1,2345", "12345"},
      {"(2,12) \\cup (12,102)", "(2,102)"},
      {"\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1&2\\end{pmatrix}"},
  };
  for (const auto& [a, b] : different) {
    EXPECT_FALSE(SameMath(a, b)) << a << " and " << b;
    EXPECT_FALSE(SameMath(b, a)) << b << " and " << a;
  }
}

TEST(Math, HostileFormulasAreOnlyWrong) {
  EXPECT_FALSE(SameMath(std::string(100000, '('), "1"));
  EXPECT_FALSE(SameMath(std::string(900, '(') + std::string(900, ')'), "1"));
  EXPECT_FALSE(SameMath(std::string(900, '{') + "1", "1"));
  std::string nested;
  for (int i = 0; i < 200; ++i) nested += "\\{";
  EXPECT_FALSE(SameMath(nested, nested + "1"));
  std::string roots;
  for (int i = 0; i < 150; ++i) roots += "\\sqrt";
  EXPECT_FALSE(SameMath(roots + "2", "2"));
  std::string fractions;
  for (int i = 0; i < 150; ++i) fractions += "\\frac1";
  EXPECT_FALSE(SameMath(fractions, "2"));
  EXPECT_FALSE(SameMath("\\", "\\frac"));
  EXPECT_FALSE(SameMath("1/0", "2/0"));
  EXPECT_EQ(ExtractMathAnswer("\\boxed"), "");
}

TEST(Math, IntegersAndScores) {
  EXPECT_EQ(IntegerValue("025").value(), 25);
  EXPECT_EQ(IntegerValue("25.0").value(), 25);
  EXPECT_FALSE(IntegerValue("25.5"));
  EXPECT_FALSE(IntegerValue("99999999999999999999"));
  EXPECT_EQ(One(TaskMetric::kInteger, "<think>..</think> so $\\boxed{025}$", "25"), 1);
  EXPECT_EQ(One(TaskMetric::kInteger, "\\boxed{m+n=113}", "113"), 1);
  EXPECT_EQ(One(TaskMetric::kInteger, "\\boxed{112}", "113"), 0);
  EXPECT_EQ(One(TaskMetric::kInteger, "", "113"), 0);
  EXPECT_EQ(One(TaskMetric::kMath, "so $\\boxed{\\dfrac{1}{2}}$", "0.5"), 1);
  EXPECT_EQ(One(TaskMetric::kMath, " \\frac{1}{2}\n", "0.5"), 1);  // nothing but the formula
  EXPECT_EQ(One(TaskMetric::kMath, "the answer is $p - q$.", "p - q"), 1);
}

TEST(Interval, Wilson) {
  // Textbook value: 15 of 20 gives (0.531, 0.888).
  const Estimate e = Wilson(0.75, 20);
  EXPECT_NEAR(e.low, 0.5313, 5e-4);
  EXPECT_NEAR(e.high, 0.8881, 5e-4);
  EXPECT_EQ(e.n, 20);
  const Estimate all = Wilson(1, 36), none = Wilson(0, 36);
  EXPECT_EQ(all.high, 1);
  EXPECT_NEAR(all.low, 0.9036, 5e-4);
  EXPECT_EQ(none.low, 0);
  EXPECT_NEAR(none.high, 1 - all.low, 1e-12);
  const Estimate empty = Wilson(0.5, 0);
  EXPECT_EQ(empty.low, 0);
  EXPECT_EQ(empty.high, 1);
}

TEST(Interval, MeanOverDatasets) {
  const std::vector<Estimate> two = {{0.8, 0.7, 0.85, 50}, {0.4, 0.1, 0.45, 10}, {}};
  const Estimate mean = MeanOver(two);
  EXPECT_DOUBLE_EQ(mean.score, 0.6);
  EXPECT_NEAR(mean.low, 0.6 - std::sqrt(0.01 + 0.09) / 2, 1e-12);
  EXPECT_NEAR(mean.high, 0.6 + std::sqrt(0.0025 + 0.0025) / 2, 1e-12);
  EXPECT_EQ(mean.n, 60);
  EXPECT_EQ(MeanOver({}).n, 0);
}

}  // namespace
}  // namespace moend::eval
