#include "moend/eval/prompt.h"

#include <algorithm>
#include <cmath>

namespace moend::eval {
namespace {

// Stands for the prompt while the template is rendered around it.
constexpr const char* kPlace = "@@moend-prompt@@";

struct Wrapping {
  std::string before, after;
};

Expected<Wrapping> ChatWrapping(const Tokenizer& tokenizer) {
  const ChatMessage message{"user", kPlace};
  MOEND_ASSIGN(const std::string text, tokenizer.ApplyChatTemplate({&message, 1}, true));
  const std::size_t at = text.find(kPlace);
  if (at == std::string::npos || text.find(kPlace, at + 1) != std::string::npos)
    return Fail(ErrorCode::kUnsupported,
                "the model's chat template does not hold the user's text exactly once");
  return Wrapping{text.substr(0, at), text.substr(at + std::string_view(kPlace).size())};
}

void Append(std::vector<int32_t>& to, const std::vector<int32_t>& more) {
  to.insert(to.end(), more.begin(), more.end());
}

Expected<PreparedContext> Prepare(const Tokenizer& tokenizer, const Context& context,
                                  const Wrapping& wrapping) {
  PreparedContext out;
  // The template's own special tokens are tokens; what looks like one in a text is not.
  MOEND_ASSIGN(out.context, tokenizer.Tokenize(wrapping.before, true, true));
  MOEND_ASSIGN(const auto text, tokenizer.Tokenize(context.text, false, false));
  Append(out.context, text);
  MOEND_ASSIGN(const auto after, tokenizer.Tokenize(wrapping.after, false, true));
  for (const Question& q : context.questions) {
    MOEND_ASSIGN(auto question, tokenizer.Tokenize(q.prompt, false, false));
    Append(question, after);
    // Something must be left to read after the compression.
    if (question.empty() && context.questions.size() == 1 && out.context.size() > 1) {
      question.push_back(out.context.back());
      out.context.pop_back();
    }
    if (question.empty() || out.context.empty())
      return Fail(ErrorCode::kInvalidArgument, "{}: the {} has no tokens", q.id,
                  question.empty() ? "question" : "context");
    out.questions.push_back(std::move(question));
  }
  return out;
}

Expected<void> Truncate(PreparedContext& context, const Context& source, int64_t n_ctx,
                        const Lengths& lengths) {
  int64_t question = 0, reserve = 0;
  for (std::size_t q = 0; q < context.questions.size(); ++q) {
    question = std::max(question, static_cast<int64_t>(context.questions[q].size()));
    reserve = std::max(reserve, std::min(MaxNewTokens(source.questions[q], lengths), n_ctx / 32));
  }
  const auto n = static_cast<int64_t>(context.context.size());
  const auto asked = lengths.prompt_tokens > 0 ? lengths.prompt_tokens : n_ctx;
  if (n + question <= std::min(asked, n_ctx)) return {};
  const int64_t limit = std::min(asked, n_ctx - reserve);
  const int64_t first = limit / 2, last = limit - first - question;
  if (first < 1 || last < 0)
    return Fail(ErrorCode::kTooLong,
                "{}: a question of {} tokens does not fit into the last half of {} tokens", source.id,
                question, limit);
  context.context.erase(context.context.begin() + first, context.context.begin() + (n - last));
  context.truncated = true;
  return {};
}

}  // namespace

int64_t MaxNewTokens(const Question& question, const Lengths& lengths) {
  if (lengths.max_new_tokens > 0) return lengths.max_new_tokens;
  const double scaled = static_cast<double>(question.max_new_tokens) * lengths.max_new_scale;
  return std::max<int64_t>(1, std::llround(scaled));
}

Expected<PreparedSuite> PrepareSuite(const Tokenizer& tokenizer, const Suite& suite, int64_t n_ctx,
                                     const Lengths& lengths) {
  PreparedSuite out;
  const bool any_chat = std::ranges::any_of(suite.contexts, &Context::chat);
  Wrapping chat;
  if (any_chat && tokenizer.has_chat_template()) {
    MOEND_ASSIGN(chat, ChatWrapping(tokenizer));
  }
  for (const Context& context : suite.contexts) {
    MOEND_ASSIGN(auto prepared, Prepare(tokenizer, context, context.chat ? chat : Wrapping()));
    MOEND_TRY(Truncate(prepared, context, n_ctx, lengths));
    out.n_truncated += prepared.truncated;
    const auto n = static_cast<int64_t>(prepared.context.size());
    out.longest_context = std::max(out.longest_context, n);
    for (const auto& question : prepared.questions)
      out.longest_prompt = std::max(out.longest_prompt, n + static_cast<int64_t>(question.size()));
    out.contexts.push_back(std::move(prepared));
  }
  return out;
}

std::string HashOf(const Suite& suite) {
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
  const auto add = [&](std::string_view text) {
    for (const char c : text) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3u;
    hash = (hash ^ 0x1FF) * 0x100000001b3u;  // no byte: "ab","c" differs from "a","bc"
  };
  for (const Context& context : suite.contexts) {
    add(context.id);
    add(context.text);
    for (const Question& q : context.questions) {
      add(q.prompt);
      add(Name(q.metric));
      add(fmt::format("{}", q.max_new_tokens));
      for (const std::string& answer : q.answers) add(answer);
    }
  }
  return fmt::format("{:016x}", hash);
}

}  // namespace moend::eval
