#include "moend/cli/chat.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
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
               const std::string& template_variables, int64_t max_tokens)
      : engine_(std::move(engine)), plan_(plan), options_(options), variables_(template_variables) {
    // An answer should find some room, as much as it may take.
    const int64_t quarter = std::max<int64_t>(1, options.n_ctx / 4);
    room_ = max_tokens > 0 ? std::min(max_tokens, quarter) : quarter;
  }

  void Add(const std::string& role, const std::string& content) { messages_.push_back({role, content}); }
  void TakeBackLast() { messages_.pop_back(); }

  // Reads what the session has not seen yet. Where that leaves no room for an answer, the oldest turns are
  // dropped first; the system message stays. kTooLong when the last message does not fit even alone.
  Expected<void> Read(RunStats& stats) {
    MOEND_ASSIGN(PromptText prompt, Prompt());
    MOEND_ASSIGN(auto tokens, Unread(prompt));
    int64_t dropped = 0;
    while (Seen() + std::ssize(tokens) + room_ > options_.n_ctx && DropOldestTurn()) {
      ++dropped;
      session_.reset();
      MOEND_ASSIGN(prompt, Prompt());
      MOEND_ASSIGN(tokens, Unread(prompt));
    }
    if (Seen() + std::ssize(tokens) >= options_.n_ctx)
      return Fail(ErrorCode::kTooLong, "this message takes {} tokens; the context holds {}",
                  Seen() + std::ssize(tokens), options_.n_ctx);
    if (dropped > 0)
      Note(fmt::format("the context of {} tokens is full: the oldest {} dropped", options_.n_ctx,
                       dropped == 1 ? "turn is" : fmt::format("{} turns are", dropped)));
    if (!session_) {
      MOEND_ASSIGN(Session fresh, Session::Create(engine_, plan_, options_));
      session_.emplace(std::move(fresh));
    }
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
  Expected<PromptText> Prompt() const {
    return engine_->model().tokenizer().ApplyChatTemplate(messages_, {.variables = variables_});
  }
  int64_t Seen() const { return session_ ? std::ssize(session_->tokens()) : 0; }

  // The tokens of `prompt` that the session has not read. A template that rewrites earlier turns (some trim
  // answers, some drop thoughts) makes it read all of them anew.
  Expected<std::vector<int32_t>> Unread(const PromptText& prompt) {
    if (session_ && !prompt.text.starts_with(read_)) session_.reset();
    const int64_t from = session_ ? std::ssize(read_) : 0;
    return engine_->model().tokenizer().TokenizePrompt(prompt, from == 0, from);
  }

  // The oldest message of the user's with what answered it; false when only the last one is left.
  bool DropOldestTurn() {
    const auto is_user = [](const ChatMessage& m) { return m.role == "user"; };
    const auto first = std::find_if(messages_.begin(), messages_.end(), is_user);
    if (first == messages_.end()) return false;
    const auto next = std::find_if(first + 1, messages_.end(), is_user);
    if (next == messages_.end()) return false;
    messages_.erase(first, next);
    return true;
  }

  std::shared_ptr<Engine> engine_;
  const Plan& plan_;
  SessionOptions options_;
  std::string variables_;
  int64_t room_ = 1;
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
  Conversation conversation(std::move(engine), plan, session_options, template_variables, options.max_tokens);
  if (!system.empty()) conversation.Add("system", system);
  RunStats stats;
  while (true) {
    const Interrupt interrupt;
    if (terminal) fmt::print(stderr, "> ");
    const auto line = ReadLine();
    if (!line) break;
    if (line->empty()) continue;
    conversation.Add("user", *line);
    if (const auto read = conversation.Read(stats); !read) {
      if (read.error().code != ErrorCode::kTooLong) return read;
      Note(read.error().message);
      conversation.TakeBackLast();
      continue;
    }
    MOEND_ASSIGN(const Generated answer, conversation.Answer(options, stats));
    fmt::print("\n");
    std::fflush(stdout);
    if (answer.reason == StopReason::kContextFull)
      Note(fmt::format("the answer ends where the context of {} tokens is full", session_options.n_ctx));
  }
  if (terminal) fmt::print(stderr, "\n");
  if (conversation.session()) Note(stats.Line(conversation.session()->stats()));
  return {};
}

}  // namespace moend::cli
