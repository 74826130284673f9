// Suites of every format, well formed and not.
#include "moend/eval/suite.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "moend/eval/longbench.h"

namespace moend::eval {
namespace {

const char* const kMoendRow =
    R"({"_id": "facts-0", "kind": "facts", "context": "Some text.\n", "questions": [
        {"dataset": "niah", "input": "What?", "answers": ["42"], "max_new_tokens": 48, "metric": "exact"},
        {"dataset": "shots", "input": "ferry", "answers": ["pag"], "max_new_tokens": 6, "metric": "first_line",
         "template": "Item: {input}\nLabel:"}]})";

std::string OneLine(std::string text) {
  std::erase(text, '\n');
  return text + "\n";
}

TEST(Suite, Moend) {
  const auto suite = ParseSuite(OneLine(kMoendRow), "dir/suite-2k.jsonl");
  ASSERT_TRUE(suite) << suite.error().message;
  EXPECT_EQ(suite->name, "suite-2k");
  EXPECT_TRUE(suite->malformed.empty());
  ASSERT_EQ(suite->contexts.size(), 1u);
  const Context& context = suite->contexts[0];
  EXPECT_EQ(context.text, "Some text.\n");
  EXPECT_FALSE(context.chat);
  ASSERT_EQ(context.questions.size(), 2u);
  EXPECT_EQ(context.questions[0].prompt, "Question: What?\nAnswer:");
  EXPECT_EQ(context.questions[0].id, "facts-0#0");
  EXPECT_EQ(context.questions[0].max_new_tokens, 48);
  EXPECT_EQ(context.questions[1].prompt, "Item: ferry\nLabel:");
  EXPECT_EQ(context.questions[1].metric, TaskMetric::kFirstLine);
  EXPECT_EQ(suite->datasets(), (std::vector<std::string>{"niah", "shots"}));
  EXPECT_EQ(suite->n_questions(), 2);
  EXPECT_EQ(ScoreAnswer(context.questions[0], " 42"), 1);
}

// Where an answer ends, and choices.
TEST(Suite, EndsOfAnswers) {
  nlohmann::json row = nlohmann::json::parse(kMoendRow);
  const auto question = [&](auto&& change) {
    nlohmann::json changed = row;
    changed["questions"].erase(1);
    change(changed["questions"][0]);
    return ParseSuite(changed.dump(), "s.jsonl");
  };
  const auto first = [&](auto&& change) { return question(change)->contexts.at(0).questions.at(0); };
  EXPECT_FALSE(first([](auto&) {}).first_line);  // exact: of our own suite
  EXPECT_TRUE(first([](auto& q) { q["metric"] = "qa_f1"; }).first_line);
  EXPECT_TRUE(first([](auto& q) { q["metric"] = "contains"; }).first_line);
  EXPECT_FALSE(first([](auto& q) { q["metric"] = "rouge"; }).first_line);
  EXPECT_FALSE(first([](auto& q) { q["metric"] = "qa_f1", q["answers"][0] = "two\nlines"; }).first_line);
  EXPECT_FALSE(first([](auto& q) { q["metric"] = "qa_f1", q["first_line"] = false; }).first_line);
  EXPECT_TRUE(first([](auto& q) { q["first_line"] = true; }).first_line);
  const auto stops = first([](auto& q) { q["metric"] = "qa_f1", q["stop"] = {"\n\n", "Question:"}; });
  EXPECT_EQ(stops.stop, (std::vector<std::string>{"\n\n", "Question:"}));
  EXPECT_FALSE(stops.first_line);
  EXPECT_EQ(first([](auto& q) { q["stop"] = "END"; }).stop, std::vector<std::string>{"END"});
  EXPECT_EQ(ScoreAnswer(first([](auto& q) { q["metric"] = "qa_f1"; }), "\n 42\nQuestion: more"), 1);

  const auto choice = first([](auto& q) { q["metric"] = "choice", q["answers"] = {"C"}; });
  EXPECT_EQ(choice.metric, TaskMetric::kChoice);
  EXPECT_EQ(ScoreAnswer(choice, " (C)\nD"), 1);
  for (const char* wrong : {"E", "c", "CC", ""})
    EXPECT_FALSE(question([&](auto& q) { q["metric"] = "choice", q["answers"] = {wrong}; })) << wrong;
  EXPECT_FALSE(question([](auto& q) { q["stop"] = 5; }));
  EXPECT_FALSE(question([](auto& q) { q["stop"] = {"", "x"}; }));
  EXPECT_FALSE(question([](auto& q) { q["first_line"] = "yes"; }));
}

TEST(Suite, AFirstLineEndsBehindItsText) {
  for (const char* text : {"42\n", "\n\n42\nQuestion", " x\r\n", "<think>a\nb</think>\n42\n"})
    EXPECT_TRUE(FirstLineEnded(text)) << text;
  for (const char* text : {"", "42", "\n\n", "\n42", "<think>a\nb", "<think>a\n</think>\n\n42"})
    EXPECT_FALSE(FirstLineEnded(text)) << text;
}

TEST(Suite, ChatTemplateOfAllRowsOrNone) {
  auto suite = ParseSuite(OneLine(kMoendRow) + OneLine(kMoendRow), "s.jsonl");
  ASSERT_TRUE(suite);
  SetChatTemplate(*suite, ChatTemplate::kSuite);
  EXPECT_FALSE(suite->contexts[1].chat);
  SetChatTemplate(*suite, ChatTemplate::kAlways);
  EXPECT_TRUE(suite->contexts[0].chat && suite->contexts[1].chat);
  SetChatTemplate(*suite, ChatTemplate::kNever);
  EXPECT_FALSE(suite->contexts[0].chat || suite->contexts[1].chat);
}

TEST(Suite, MalformedRowsAreNamedAndTheRestIsKept) {
  const std::string good = OneLine(kMoendRow);
  nlohmann::json base = nlohmann::json::parse(kMoendRow);
  std::string text = "\xEF\xBB\xBF" + good + "{not json\n\n";
  const auto add = [&](auto&& change) {
    nlohmann::json row = base;
    change(row);
    text += row.dump() + "\r\n";
  };
  add([](auto& r) { r.erase("context"); });
  add([](auto& r) { r["context"] = 5; });
  add([](auto& r) { r["context"] = " "; });
  add([](auto& r) { r["questions"] = nlohmann::json::array(); });
  add([](auto& r) { r["questions"] = "x"; });
  add([](auto& r) { r["questions"][0] = 3; });
  add([](auto& r) { r["questions"][0].erase("answers"); });
  add([](auto& r) { r["questions"][0]["answers"] = nlohmann::json::array(); });
  add([](auto& r) { r["questions"][0]["answers"][0] = nullptr; });
  add([](auto& r) { r["questions"][0]["max_new_tokens"] = 0; });
  add([](auto& r) { r["questions"][0]["max_new_tokens"] = 1e30; });
  add([](auto& r) { r["questions"][1]["template"] = "no place"; });
  add([](auto& r) { r["questions"][1]["metric"] = "classification"; });
  add([](auto& r) { r.erase("questions"); });
  text += "[1, 2]\n7\n" + good;
  const auto suite = ParseSuite(text, "s.jsonl");
  ASSERT_TRUE(suite) << suite.error().message;
  EXPECT_EQ(suite->contexts.size(), 2u);
  EXPECT_NE(suite->contexts[0].id, suite->contexts[1].id);  // the same _id twice
  ASSERT_EQ(suite->malformed.size(), 17u);
  EXPECT_EQ(suite->malformed[0].line, 2);
  EXPECT_EQ(suite->malformed[0].message, "s.jsonl:2: the row is no JSON");
  EXPECT_EQ(suite->malformed[1].line, 4);  // the empty line counts
  EXPECT_NE(suite->malformed[7].message.find("questions[0]: \"answers\" is missing"), std::string::npos)
      << suite->malformed[7].message;
}

TEST(Suite, UnknownMetricOrDatasetIsAnError) {
  nlohmann::json row = nlohmann::json::parse(kMoendRow);
  row["questions"][1]["metric"] = "bleu";
  auto suite = ParseSuite(OneLine(kMoendRow) + row.dump(), "s.jsonl");
  ASSERT_FALSE(suite);
  EXPECT_EQ(suite.error().code, ErrorCode::kNotFound);
  EXPECT_TRUE(suite.error().message.starts_with("s.jsonl:2: questions[1]: there is no metric \"bleu\""))
      << suite.error().message;
  suite = ParseSuite(R"({"dataset": "squad", "context": "c", "input": "i", "answers": ["a"]})", "s.jsonl");
  ASSERT_FALSE(suite);
  EXPECT_NE(suite.error().message.find("narrativeqa"), std::string::npos);
  EXPECT_FALSE(ParseSuite(R"({"input": "a\nb", "outputs": ["a"]})", "unknown.jsonl"));
  EXPECT_FALSE(ParseSuite(R"({"problem": "a", "answer": "b"})", "unknown.jsonl"));
}

TEST(Suite, NothingUsableIsAnError) {
  EXPECT_EQ(ParseSuite("", "s.jsonl").error().code, ErrorCode::kCorrupt);
  EXPECT_EQ(ParseSuite("\n{\n", "s.jsonl").error().code, ErrorCode::kCorrupt);
  EXPECT_EQ(ParseSuite("{\"a\": 1}\n", "s.jsonl").error().code, ErrorCode::kCorrupt);
  EXPECT_EQ(LoadSuite("/no/such/file.jsonl").error().code, ErrorCode::kNotFound);
}

TEST(Suite, LongBench) {
  EXPECT_EQ(LongBenchTasks().size(), 21u);
  const std::string text =
      R"({"_id": "n1", "dataset": "narrativeqa", "context": "Once {input}.", "input": "Who?", "answers": ["me"], "all_classes": null})"
      "\n"
      R"({"dataset": "trec_rebuilt", "context": "c", "input": "i", "answers": ["A"], "all_classes": "['A', \"B's\", 'C\\'s']"})"
      "\n"
      R"({"dataset": "samsum_e", "context": "c", "input": "i", "answers": ["A"], "all_classes": null})"
      "\n"
      R"({"dataset": "trec", "context": "c", "input": "i", "answers": ["A"], "all_classes": null})";
  const auto suite = ParseSuite(text, "lb.jsonl");
  ASSERT_TRUE(suite) << suite.error().message;
  ASSERT_EQ(suite->contexts.size(), 3u);
  const Context& story = suite->contexts[0];
  EXPECT_TRUE(story.chat);
  EXPECT_TRUE(story.text.ends_with("Story: Once {input}."))
      << story.text;  // only the question's place is filled
  EXPECT_TRUE(story.questions[0].prompt.ends_with("Question: Who?\n\nAnswer:"));
  EXPECT_EQ(story.questions[0].max_new_tokens, 128);
  EXPECT_EQ(story.questions[0].metric, TaskMetric::kQaF1);
  const Context& trec = suite->contexts[1];
  EXPECT_FALSE(trec.chat);
  EXPECT_EQ(trec.questions[0].classes, (std::vector<std::string>{"A", "B's", "C's"}));
  EXPECT_EQ(trec.questions[0].dataset, "trec_rebuilt");
  EXPECT_EQ(ScoreAnswer(trec.questions[0], "\n\nA\nB's"), 1);  // the first line only
  EXPECT_EQ(suite->contexts[2].questions[0].stop, std::vector<std::string>{"\n"});
  EXPECT_EQ(suite->malformed.size(), 1u);  // trec without classes
}

TEST(Suite, LongBenchTemplatesHoldTheirPlaces) {
  for (const LongBenchTask& task : LongBenchTasks()) {
    const std::size_t context = task.prompt.find("{context}");
    const std::size_t input = task.prompt.find("{input}");
    ASSERT_NE(context, std::string_view::npos) << task.name;
    EXPECT_TRUE(input == std::string_view::npos || input > context) << task.name;
    EXPECT_GT(task.max_new_tokens, 0) << task.name;
    EXPECT_EQ(FindLongBenchTask(task.name), &task);
  }
  EXPECT_EQ(FindLongBenchTask("narrativeqa_x"), nullptr);
}

TEST(Suite, Ruler) {
  const auto suite = ParseSuite(
      R"({"index": 7, "input": "Long text.\nMore.\nWhat is it? It is", "outputs": ["abc", 12], "length": 9})"
      "\n"
      R"({"index": 8, "input": "no question", "outputs": ["abc"]})",
      "dir/niah_multikey_3_4096.jsonl");
  ASSERT_TRUE(suite) << suite.error().message;
  ASSERT_EQ(suite->contexts.size(), 1u);
  const Question& q = suite->contexts[0].questions[0];
  EXPECT_EQ(suite->contexts[0].text, "Long text.\nMore.\n");
  EXPECT_EQ(q.prompt, "What is it? It is");
  EXPECT_EQ(q.dataset, "niah_multikey_3_4096");
  EXPECT_EQ(q.id, "7");
  EXPECT_EQ(q.max_new_tokens, 128);
  EXPECT_EQ(ScoreAnswer(q, "12 and ABC"), 1);
  EXPECT_EQ(suite->malformed.size(), 1u);
  EXPECT_EQ(ParseSuite(R"({"input": "a\nb", "outputs": ["a"], "answer_prefix": " c"})", "vt/validation.jsonl")
                ->contexts[0]
                .questions[0]
                .prompt,
            "b c");
}

TEST(Suite, Math) {
  const auto aime =
      ParseSuite(R"({"id": 60, "problem": "P", "answer": "025", "question": "ignored"})", "aime24.jsonl");
  ASSERT_TRUE(aime) << aime.error().message;
  EXPECT_EQ(aime->contexts[0].text, "P");
  EXPECT_TRUE(aime->contexts[0].chat);
  EXPECT_EQ(aime->contexts[0].questions[0].id, "60");
  EXPECT_EQ(ScoreAnswer(aime->contexts[0].questions[0], "<think>1</think>\\boxed{25}"), 1);
  const auto gsm =
      ParseSuite(R"({"question": "Q", "answer": "3*5=15\n#### 1,500", "idx": 3})", "gsm8k.jsonl");
  ASSERT_TRUE(gsm) << gsm.error().message;
  EXPECT_EQ(gsm->contexts[0].questions[0].answers[0], "1,500");
  EXPECT_EQ(ScoreAnswer(gsm->contexts[0].questions[0], "that is $1500."), 1);
  const auto math =
      ParseSuite(R"({"problem": "Q", "answer": "p - q", "unique_id": "test/1"})", "math500.jsonl");
  ASSERT_TRUE(math) << math.error().message;
  EXPECT_EQ(ScoreAnswer(math->contexts[0].questions[0], "\\boxed{p-q}"), 1);
}

TEST(Suite, Limit) {
  const std::string row = OneLine(kMoendRow);
  auto suite = ParseSuite(row + row + row, "s.jsonl");
  ASSERT_TRUE(suite);
  Limit(*suite, 2);
  EXPECT_EQ(suite->contexts.size(), 2u);
  EXPECT_EQ(suite->n_questions(), 4);
  Limit(*suite, 0);
  EXPECT_EQ(suite->n_questions(), 4);
}

TEST(Suite, KeepDatasets) {
  const std::string row = OneLine(kMoendRow);
  auto suite = ParseSuite(row + row, "s.jsonl");
  ASSERT_TRUE(suite);
  const std::vector<std::string> names = suite->datasets();
  ASSERT_GE(names.size(), 2u);
  const auto unknown = KeepDatasets(*suite, {names[0], "nothing"});
  ASSERT_FALSE(unknown);
  EXPECT_EQ(unknown.error().code, ErrorCode::kNotFound);
  EXPECT_NE(unknown.error().message.find(names[1]), std::string::npos) << unknown.error().message;
  EXPECT_EQ(suite->datasets(), names);
  ASSERT_TRUE(KeepDatasets(*suite, {names[1]}));
  EXPECT_EQ(suite->datasets(), std::vector<std::string>{names[1]});
  ASSERT_TRUE(KeepDatasets(*suite, {}));
  EXPECT_EQ(suite->contexts.size(), 2u);
}

// The suites that ship with the reference model, when they are there.
TEST(Suite, ReferenceSuitesLoadWithoutALoss) {
  int found = 0;
  for (const char* name : {"2k", "4k", "8k", "16k", "short"}) {
    const auto suite = LoadSuite(std::string(MOEND_SOURCE_DIR) + "/models/suite/suite-" + name + ".jsonl");
    if (!suite && suite.error().code == ErrorCode::kNotFound) continue;
    ASSERT_TRUE(suite) << suite.error().message;
    EXPECT_TRUE(suite->malformed.empty()) << name;
    EXPECT_GT(suite->n_questions(), 100) << name;
    ++found;
  }
  if (found == 0) GTEST_SKIP() << "the reference suites are not here";
}

}  // namespace
}  // namespace moend::eval
