// moend ask: reads a text once per plan, compresses its cache, and only then asks: every question goes to a
// fork of the same compressed context.
#include <fmt/format.h>

#include <algorithm>

#include "moend/cli/arguments.h"
#include "moend/cli/chat.h"
#include "moend/cli/commands.h"
#include "moend/cli/common.h"
#include "moend/cli/stats.h"
#include "moend/cli/table.h"
#include "moend/eval/metrics.h"
#include "moend/eval/text.h"
#include "moend/plan/json_reader.h"

namespace moend::cli {
namespace {

constexpr const char* kAskFooter = R"(
Examples:
  moend ask -m model.gguf -f book.txt -q "Who was born in Cork?"
  moend ask -m model.gguf -f book.txt --questions questions.jsonl --plan full --plan plan.json

A line of the questions' file: {"question": "...", "answers": ["..."]}; with answers, they are compared (case
and white space aside). The text is read and compressed before the first question is known.)";

struct AskFlags {
  ModelFlags model;
  std::string file, questions_file, prompt_template = "Question: {question}\\nAnswer:";
  std::vector<std::string> questions, plans;
  int64_t n_predict = 48;
};

struct Question {
  std::string text;
  std::vector<std::string> answers;  // right ones; may be none
};

// What one plan made of the questions.
struct Outcome {
  std::string label;
  std::vector<std::string> answers;
  KvStats kv;  // when the text was read and compressed
  RunStats reading, answering;
};

Expected<Question> ParseQuestion(const std::string& line, const std::string& source) {
  MOEND_ASSIGN(const auto document, ParseJson(line, source));
  const JsonNode root(document, source);
  constexpr std::size_t kLongest = 1 << 20;
  Question question;
  MOEND_ASSIGN(const JsonNode text, root.At("question"));
  MOEND_ASSIGN(question.text, text.Text(kLongest));
  if (!root.Has("answers")) return question;
  MOEND_ASSIGN(const JsonNode answers, root.At("answers"));
  MOEND_ASSIGN(const int64_t n, answers.Size());
  for (int64_t i = 0; i < n; ++i) {
    MOEND_ASSIGN(const JsonNode answer, answers.At(i));
    MOEND_ASSIGN(std::string value, answer.Text(kLongest));
    question.answers.push_back(std::move(value));
  }
  return question;
}

Expected<std::vector<Question>> ReadQuestions(const AskFlags& flags) {
  std::vector<Question> questions;
  for (const std::string& text : flags.questions) questions.push_back({text, {}});
  if (flags.questions_file.empty()) return questions;
  MOEND_ASSIGN(const std::string text, ReadInput(flags.questions_file));
  int64_t number = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    const std::string line = text.substr(at, end - at);
    at = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    MOEND_ASSIGN(auto question, ParseQuestion(line, fmt::format("{}:{}", flags.questions_file, number)));
    questions.push_back(std::move(question));
  }
  if (questions.empty())
    return Fail(ErrorCode::kInvalidArgument, "{} has no questions", flags.questions_file);
  return questions;
}

// "full", "2d_hetero 14.0x": the variant and what the budget asks for.
std::string Label(const Plan& plan) {
  if (plan.variant == "full" || plan.budget_bytes <= 0) return plan.variant;
  return fmt::format("{} {:.1f}x", plan.variant,
                     static_cast<double>(FullBytes(plan.model, plan.context_length)) /
                         static_cast<double>(plan.budget_bytes));
}

Expected<Outcome> AskAll(const std::shared_ptr<Engine>& engine, const Plan& plan, const AskFlags& flags,
                         std::span<const int32_t> context, const std::vector<std::vector<int32_t>>& prompts) {
  Outcome outcome;
  outcome.label = Label(plan);
  MOEND_ASSIGN(Session session, Session::Create(engine, plan));
  MOEND_TRY(TimedPrefill(session, context, outcome.reading));
  outcome.kv = session.stats();
  Note(fmt::format("{}: read {} tokens in {:.1f} s, K/V {:.2f} MiB of {:.2f} MiB at 16 bit", outcome.label,
                   context.size(), outcome.reading.prefill_seconds, MiB(outcome.kv.bytes),
                   MiB(outcome.kv.bytes_full)));
  GenerateOptions generate;
  generate.max_tokens = flags.n_predict;
  generate.sampler.temperature = 0;
  generate.stop = {"\n"};
  for (const auto& prompt : prompts) {
    MOEND_ASSIGN(Session fork, session.Fork());
    MOEND_TRY(fork.Prefill(prompt));
    MOEND_ASSIGN(
        const Generated answer,
        TimedGenerate(
            fork, generate, [](std::string_view) { return !Interrupt::requested(); }, outcome.answering));
    if (Interrupt::requested()) return Fail(ErrorCode::kCancelled, "interrupted");
    outcome.answers.emplace_back(eval::Trim(answer.text));
  }
  return outcome;
}

bool IsRight(const Question& question, const std::string& answer) {
  return eval::Score(eval::TaskMetric::kExact, answer, question.answers) >= 1;
}

void PrintAnswers(const std::vector<Question>& questions, const std::vector<Outcome>& outcomes) {
  std::vector<Column> columns = {{"question", 34}, {"expected", 19}};
  for (const Outcome& o : outcomes) columns.push_back({o.label, 21});
  std::vector<std::vector<std::string>> rows;
  for (std::size_t q = 0; q < questions.size(); ++q) {
    const auto& right = questions[q].answers;
    std::vector<std::string> row = {questions[q].text, right.empty() ? "" : right[0]};
    for (const Outcome& o : outcomes)
      row.push_back((right.empty()                         ? ""
                     : IsRight(questions[q], o.answers[q]) ? "\u2713 "
                                                           : "\u2717 ") +
                    o.answers[q]);
    rows.push_back(std::move(row));
    rows.emplace_back();
  }
  fmt::print("{}", Table(columns, rows));
}

void PrintFigures(const std::vector<Question>& questions, const std::vector<Outcome>& outcomes) {
  std::vector<Column> columns = {{"", 26}};
  for (const Outcome& o : outcomes) columns.push_back({o.label, 21});
  const auto row = [&](const std::string& name, const auto& cell) {
    std::vector<std::string> cells = {name};
    for (const Outcome& o : outcomes) cells.push_back(cell(o));
    return cells;
  };
  std::vector<std::vector<std::string>> rows;
  std::vector<std::size_t> judged;
  for (std::size_t q = 0; q < questions.size(); ++q)
    if (!questions[q].answers.empty()) judged.push_back(q);
  if (!judged.empty()) {
    rows.push_back(row("right answers", [&](const Outcome& o) {
      const auto right = std::count_if(judged.begin(), judged.end(),
                                       [&](std::size_t q) { return IsRight(questions[q], o.answers[q]); });
      return fmt::format("{} of {}", right, judged.size());
    }));
  }
  rows.push_back(
      row("K/V cache", [](const Outcome& o) { return fmt::format("{:.2f} MiB", MiB(o.kv.bytes)); }));
  rows.push_back(row("  smaller than at 16 bit",
                     [](const Outcome& o) { return fmt::format("{:.2f}x", o.kv.compression()); }));
  rows.push_back(row("  at most, while reading",
                     [](const Outcome& o) { return fmt::format("{:.2f} MiB", MiB(o.kv.peak_bytes)); }));
  rows.push_back(row("prefill, tokens/s",
                     [](const Outcome& o) { return fmt::format("{:.0f}", o.reading.prefill_tps()); }));
  rows.push_back(row("decode, tokens/s",
                     [](const Outcome& o) { return fmt::format("{:.0f}", o.answering.decode_tps()); }));
  fmt::print("{}", Table(columns, rows));
}

Expected<void> Run(const AskFlags& flags) {
  MOEND_ASSIGN(const auto questions, ReadQuestions(flags));
  MOEND_ASSIGN(const std::string text, ReadInput(flags.file));
  MOEND_ASSIGN(auto engine, flags.model.Load());
  const Tokenizer& tokenizer = engine->model().tokenizer();
  MOEND_ASSIGN(const auto context, tokenizer.Tokenize(text, true, true));
  const auto n_context = static_cast<int64_t>(context.size());
  const std::string frame = Unescape(flags.prompt_template);
  std::vector<std::vector<int32_t>> prompts;
  int64_t longest = 0;
  for (const Question& question : questions) {
    const std::string prompt = eval::ReplaceAll(frame, "{question}", question.text);
    MOEND_ASSIGN(auto tokens, tokenizer.Tokenize(prompt, false, true));
    longest = std::max(longest, static_cast<int64_t>(tokens.size()));
    prompts.push_back(std::move(tokens));
  }
  const int64_t trained = engine->model().hparams().n_ctx_train;
  if (n_context + longest + flags.n_predict > trained)
    return Fail(ErrorCode::kTooLong,
                "{} has {} tokens; with a question of {} and an answer of up to {} that is more than the "
                "context of {}",
                flags.file, n_context, longest, flags.n_predict, trained);
  // All plans are checked before the first long reading.
  std::vector<Plan> plans;
  for (const std::string& path : flags.plans) {
    if (path == "full") {
      plans.push_back(FullPlan(engine->fingerprint(), trained));
      continue;
    }
    MOEND_ASSIGN(Plan plan, LoadPlan(path));
    MOEND_TRY(CheckSameModel(plan.model, engine->fingerprint(), path));
    plans.push_back(std::move(plan));
  }
  const Interrupt interrupt;
  std::vector<Outcome> outcomes;
  for (const Plan& plan : plans) {
    MOEND_ASSIGN(Outcome outcome, AskAll(engine, plan, flags, context, prompts));
    outcomes.push_back(std::move(outcome));
  }
  fmt::print("{} tokens were read and their K/V compressed before the questions were known.\n\n", n_context);
  PrintAnswers(questions, outcomes);
  PrintFigures(questions, outcomes);
  return {};
}

}  // namespace

void AddAsk(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("ask", "Ask several questions about one text, with several plans");
  auto flags = std::make_shared<AskFlags>();
  AskFlags& f = *flags;
  f.model.AddTo(*command);
  command->add_option("-f,--file", f.file, "the text; - is standard input")->required()->type_name("FILE");
  auto* one = command->add_option("-q,--question", f.questions, "a question; may be given several times")
                  ->type_name("TEXT")
                  ->expected(1)
                  ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  auto* many =
      command->add_option("--questions", f.questions_file, "a file of questions")->type_name("FILE.jsonl");
  command->add_option("--plan", f.plans, "a plan, or 'full'; several are compared (default: full)")
      ->type_name("PLAN.json")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command->add_option("--template", f.prompt_template, "how a question is put behind the text")
      ->capture_default_str()
      ->type_name("TEXT");
  command->add_option("-n,--predict,--n-predict", f.n_predict, "most tokens of an answer")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20))
      ->type_name("N");
  command->footer(kAskFooter);
  command->callback([flags, one, many, &exit_code] {
    if (one->count() + many->count() == 0) throw CLI::RequiredError("-q TEXT or --questions FILE");
    if (flags->plans.empty()) flags->plans = {"full"};
    exit_code = ExitCode(Run(*flags));
  });
}

}  // namespace moend::cli
