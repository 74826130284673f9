#include "moend/cli/chat.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <optional>
#include <vector>

#include "moend/cli/common.h"
#include "moend/cli/stats.h"

namespace moend::cli {
namespace {

// A line without its newline; nothing at the end of the input or after Ctrl-C.
std::optional<std::string> ReadLine() {
  std::string line;
  int c = 0;
  while ((c = std::fgetc(stdin)) != EOF && c != '\n') line += static_cast<char>(c);
  if (c == EOF && (line.empty() || Interrupt::requested())) return std::nullopt;
  return line;
}

// One conversation: its messages, and how much of them, as text, the session has read.
class Conversation {
 public:
  Conversation(std::shared_ptr<Engine> engine, const Plan& plan, const SessionOptions& options,
               const std::string& template_variables)
      : engine_(std::move(engine)), plan_(plan), options_(options), variables_(template_variables) {}

  void Add(const std::string& role, const std::string& content) { messages_.push_back({role, content}); }

  // Reads what the session has not seen yet.
  Expected<void> Read(RunStats& stats) {
    const Tokenizer& tokenizer = engine_->model().tokenizer();
    MOEND_ASSIGN(const PromptText prompt, tokenizer.ApplyChatTemplate(messages_, {.variables = variables_}));
    // A template that rewrites earlier turns (some trim answers, some drop thoughts) makes the session read
    // all of them anew.
    if (!session_ || !prompt.text.starts_with(read_)) {
      MOEND_ASSIGN(Session fresh, Session::Create(engine_, plan_, options_));
      session_.emplace(std::move(fresh));
      read_.clear();
    }
    MOEND_ASSIGN(const auto tokens, tokenizer.TokenizePrompt(prompt, read_.empty(), std::ssize(read_)));
    MOEND_TRY(TimedPrefill(*session_, tokens, stats));
    read_ = prompt.text;
    return {};
  }

  Expected<Generated> Answer(const GenerateOptions& options, RunStats& stats) {
    const auto emit = [](std::string_view part) {
      fmt::print("{}", part);
      std::fflush(stdout);
      return !Interrupt::requested();
    };
    MOEND_ASSIGN(Generated answer, TimedGenerate(*session_, options, emit, stats));
    messages_.push_back({"assistant", answer.text});
    read_ += answer.text;
    return answer;
  }

  const std::optional<Session>& session() const { return session_; }

 private:
  std::shared_ptr<Engine> engine_;
  const Plan& plan_;
  SessionOptions options_;
  std::string variables_;
  std::vector<ChatMessage> messages_;
  std::optional<Session> session_;
  std::string read_;
};

}  // namespace

Expected<void> Chat(std::shared_ptr<Engine> engine, const Plan& plan, const SessionOptions& session_options,
                    const GenerateOptions& options, const std::string& system,
                    const std::string& template_variables) {
  const bool terminal = isatty(STDIN_FILENO) == 1;
  if (!engine->model().tokenizer().has_chat_template())
    return Fail(ErrorCode::kUnsupported, "{} has no chat template; use -p or -f without --chat",
                engine->model().path());
  if (const std::string note = engine->model().tokenizer().chat_template_note(); !note.empty()) Note(note);
  if (terminal) Note("one message a line; Ctrl-C ends an answer, Ctrl-D the conversation");
  Conversation conversation(std::move(engine), plan, session_options, template_variables);
  if (!system.empty()) conversation.Add("system", system);
  RunStats stats;
  while (true) {
    const Interrupt interrupt;
    if (terminal) fmt::print(stderr, "> ");
    const auto line = ReadLine();
    if (!line) break;
    if (line->empty()) continue;
    conversation.Add("user", *line);
    MOEND_TRY(conversation.Read(stats));
    MOEND_ASSIGN(const Generated answer, conversation.Answer(options, stats));
    fmt::print("\n");
    std::fflush(stdout);
    if (answer.reason == StopReason::kContextFull) {
      Note(fmt::format("the context of {} tokens is full", conversation.session()->n_ctx()));
      break;
    }
  }
  if (terminal) fmt::print(stderr, "\n");
  if (conversation.session()) Note(stats.Line(conversation.session()->stats()));
  return {};
}

}  // namespace moend::cli
