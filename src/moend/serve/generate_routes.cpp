// The routes that generate: from a request to a job, and from its events to an answer.
#include <algorithm>

#include "moend/serve/prefix_split.h"
#include "moend/serve/server.h"

namespace moend::serve {
namespace {

constexpr auto kPoll = std::chrono::milliseconds(200);    // how soon a client's leaving is noticed
constexpr auto kFirstWait = std::chrono::seconds(2);      // an early error still gets its own status
constexpr auto kPingInterval = std::chrono::seconds(10);  // keeps proxies from giving up on a long prefill

// What of an answer's text is new, as its parts.
AnswerDelta Read(Job& job, std::string text, const Outcome* outcome) {
  if (!job.reader) return {.content = std::move(text)};
  AnswerDelta delta = job.reader->Push(text);
  if (!outcome || outcome->error) return delta;
  delta.Append(job.reader->Finish(outcome->finish_reason == "length"));
  return delta;
}

void NoteCalls(const Job& job, Outcome& outcome) {
  if (job.reader && job.reader->has_calls() && outcome.finish_reason == "stop")
    outcome.finish_reason = "tool_calls";
}

}  // namespace

void Server::Chat(const Ready& ready, const HttpRequest& request, HttpResponse& response) {
  Generate(ready, true, request, response);
}

void Server::Completion(const Ready& ready, const HttpRequest& request, HttpResponse& response) {
  Generate(ready, false, request, response);
}

void Server::Generate(const Ready& ready, bool chat, const HttpRequest& request, HttpResponse& response) {
  auto body = ParseBody(request.body, options_.limits);
  if (!body) return SetError(response, body.error());
  auto parsed = chat ? ParseChatRequest(*body, options_.limits, ready.defaults)
                     : ParseCompletionRequest(*body, options_.limits, ready.defaults);
  *body = nullptr;  // a long prompt need not stay in memory three times
  if (!parsed) return SetError(response, parsed.error());
  auto job = MakeJob(ready, *parsed, ScopeOf(request));
  if (!job) return SetError(response, job.error());
  if (auto ok = ready.scheduler->Submit(*job); !ok) return SetError(response, ok.error());

  AnswerHead head{.chat = chat,
                  .id = RandomId(chat ? "chatcmpl-" : "cmpl-"),
                  .model = ready.model,
                  .fingerprint = "moend-" + ready.backend->info().model_hash,
                  .created = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now()),
                  .logprobs = parsed->pick.top_logprobs >= 0,
                  .include_usage = parsed->include_usage,
                  .kv_layers = parsed->kv_layers};
  if (parsed->stream) {
    Stream(std::move(*job), head, response);
  } else {
    Whole(**job, head, response);
  }
}

ApiResult<std::shared_ptr<Job>> Server::MakeJob(const Ready& ready, GenerationRequest& r,
                                                const std::string& scope) {
  const Backend& backend = *ready.backend;
  auto job = std::make_shared<Job>();
  const char* field = r.chat ? "messages" : "prompt";
  const int64_t n_ctx = backend.info().n_ctx;
  const int64_t most =
      options_.limits.prompt_tokens > 0 ? std::min(options_.limits.prompt_tokens, n_ctx - 1) : n_ctx - 1;
  int64_t boundary = 0, bytes = std::ssize(r.prompt);
  for (const ChatMessage& m : r.messages) bytes += TextBytes(m);
  if (const int64_t longest = backend.info().longest_token; longest > 0 && bytes / longest > most)
    return std::unexpected(BadField(field,
                                    fmt::format("the prompt has {} bytes and so at least {} tokens; this "
                                                "server takes {} in a context of {}",
                                                bytes, bytes / longest, most, n_ctx),
                                    "context_length_exceeded"));
  if (r.chat) {
    const auto messages = std::span<const ChatMessage>(r.messages);
    ChatOptions chat{.variables = r.template_variables.empty() ? "" : Dump(r.template_variables),
                     .tools = r.tools.empty() ? "" : Dump(r.tools),
                     .tool_choice = r.tool_choice,
                     .parallel_tool_calls = r.parallel_tool_calls,
                     .json_schema = std::exchange(r.json_schema, {}),
                     .split_reasoning = r.split_reasoning && r.grammar.empty()};
    MOEND_API_ASSIGN(auto prepared, ChatTokensOf(ready, messages, chat));
    job->prompt = std::move(prepared.tokens);
    if (auto ok = SetFormat(backend, std::move(prepared.format), *job); !ok)
      return std::unexpected(std::move(ok.error()));
    if (messages.size() > 1) {
      // Where the last message begins: what a next request with another last message will share.
      chat.add_generation_prompt = false;
      auto before = ChatTokensOf(ready, messages.first(messages.size() - 1), chat);
      if (before) boundary = CommonPrefix(before->tokens, job->prompt);
    }
  } else if (!r.prompt_tokens.empty()) {
    job->prompt = std::move(r.prompt_tokens);
  } else {
    MOEND_API_ASSIGN(job->prompt, Tokens(ready, r.prompt, true, r.parse_special));
  }
  if (!r.json_schema.empty()) {
    auto source = backend.SchemaGrammar(r.json_schema);
    if (!source) return std::unexpected(FromError(source.error()));
    r.grammar = std::move(source->text);
  }
  if (!r.grammar.empty()) {
    auto grammar = backend.MakeGrammar({.text = std::move(r.grammar)});
    if (!grammar) return std::unexpected(FromError(grammar.error()));
    job->grammar = std::move(*grammar);
  }
  const auto n = std::ssize(job->prompt);
  if (n == 0) return std::unexpected(BadField(field, "the prompt is empty", "invalid_value"));
  if (n > most)
    return std::unexpected(BadField(
        field,
        fmt::format("the prompt has {} tokens; this server takes {} in a context of {}", n, most, n_ctx),
        "context_length_exceeded"));

  const int64_t wanted = r.max_tokens > 0 ? r.max_tokens : options_.limits.default_max_tokens;
  const int64_t allowed = options_.limits.max_tokens > 0 ? options_.limits.max_tokens : n_ctx;
  job->max_tokens = std::min({wanted, allowed, n_ctx - n});
  job->scope = scope;
  job->pick = std::move(r.pick);
  std::ranges::move(r.stop, std::back_inserter(job->stop));
  job->use_cache = job->keep_after = options_.prefix_cache && r.cache_prompt;
  job->keep_after = job->keep_after && r.chat;
  if (job->use_cache) job->split = SplitLength(n, boundary, options_.scheduler.min_prefix_tokens);
  return job;
}

ApiResult<void> Server::SetFormat(const Backend& backend, AnswerFormat format, Job& job) {
  auto reader = AnswerReader::Make(format);
  if (!reader) return std::unexpected(FromError(reader.error()));
  job.reader = std::move(*reader);
  for (const std::string& text : format.preserved) {
    const auto tokens = backend.Tokenize(text, false, /*parse_special=*/true, {});
    if (tokens && tokens->size() == 1) job.shown_tokens.push_back((*tokens)[0]);
  }
  job.stop = std::move(format.stops);
  if (format.grammar.text.empty()) return {};
  auto grammar = backend.MakeGrammar(format.grammar);
  if (!grammar) return std::unexpected(FromError(grammar.error()));
  job.grammar = std::move(*grammar);
  return {};
}

void Server::Whole(Job& job, const AnswerHead& head, HttpResponse& response) {
  Delta all;
  for (;;) {
    Job::Event event = job.Wait(kPoll);
    all.text += event.delta.text;
    std::ranges::move(event.delta.tokens, std::back_inserter(all.tokens));
    if (event.outcome) {
      if (event.outcome->error) return SetError(response, *event.outcome->error);
      AnswerDelta answer = Read(job, std::move(all.text), &*event.outcome);
      NoteCalls(job, *event.outcome);
      response.SetContent(Dump(WholeAnswer(head, answer, all.tokens, *event.outcome)), kJson);
      return;
    }
    if (ClientGone()) {
      job.Cancel();
      return SetError(response, {.status = 503, .message = "the client went away", .code = "cancelled"});
    }
  }
}

void Server::Stream(std::shared_ptr<Job> job, const AnswerHead& head, HttpResponse& response) {
  Job::Event first;
  const auto give_up = Job::Clock::now() + kFirstWait;
  do {
    first = job->Wait(kPoll);
  } while (first.delta.empty() && !first.outcome && !ClientGone() && Job::Clock::now() < give_up);
  if (first.outcome && first.outcome->error) return SetError(response, *first.outcome->error);

  response.content_type = "text/event-stream";
  response.SetHeader("Cache-Control", "no-cache");
  response.SetHeader("X-Accel-Buffering", "no");  // nginx: pass every event on at once
  // Whatever ends this early, an exception included, nobody waits for the rest.
  auto cancel = std::shared_ptr<void>(nullptr, [job](void*) { job->Cancel(); });
  response.stream = [job, head, cancel, event = std::move(first)](BodyWriter& out) mutable {
    std::string text = FirstChunk(head);
    auto last_sent = Job::Clock::now();
    for (;;) {
      const AnswerDelta delta =
          Read(*job, std::move(event.delta.text), event.outcome ? &*event.outcome : nullptr);
      if (!delta.empty() || !event.delta.tokens.empty()) text += DeltaChunk(head, delta, event.delta.tokens);
      if (event.outcome) NoteCalls(*job, *event.outcome);
      if (event.outcome)
        text += event.outcome->error ? ErrorChunk(*event.outcome->error) : LastChunks(head, *event.outcome);
      const auto now = Job::Clock::now();
      if (text.empty() && now - last_sent > kPingInterval) text = ": ping\n\n";
      if (text.empty() ? !out.Alive() : !out.Write(text)) return false;
      if (event.outcome) return true;
      if (!text.empty()) last_sent = now;
      text.clear();
      event = job->Wait(kPoll);
    }
  };
}

}  // namespace moend::serve
