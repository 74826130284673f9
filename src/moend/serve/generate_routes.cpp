// The routes that generate: from a request to a job, and from its events to an answer.
#include <algorithm>

#include "moend/serve/prefix_split.h"
#include "moend/serve/server.h"

namespace moend::serve {
namespace {

constexpr const char* kJson = "application/json";
constexpr auto kPoll = std::chrono::milliseconds(200);    // how soon a client's leaving is noticed
constexpr auto kFirstWait = std::chrono::seconds(2);      // an early error still gets its own status
constexpr auto kPingInterval = std::chrono::seconds(10);  // keeps proxies from giving up on a long prefill

}  // namespace

void Server::Chat(const Ready& ready, const httplib::Request& request, httplib::Response& response) {
  Generate(ready, true, request, response);
}

void Server::Completion(const Ready& ready, const httplib::Request& request, httplib::Response& response) {
  Generate(ready, false, request, response);
}

void Server::Generate(const Ready& ready, bool chat, const httplib::Request& request,
                      httplib::Response& response) {
  auto body = ParseBody(request.body, options_.limits);
  if (!body) return SendError(response, body.error());
  auto parsed = chat ? ParseChatRequest(*body, options_.limits, ready.defaults)
                     : ParseCompletionRequest(*body, options_.limits, ready.defaults);
  *body = nullptr;  // a long prompt need not stay in memory three times
  if (!parsed) return SendError(response, parsed.error());
  auto job = MakeJob(ready, *parsed, ScopeOf(request));
  if (!job) return SendError(response, job.error());
  if (auto ok = ready.scheduler->Submit(*job); !ok) return SendError(response, ok.error());

  AnswerHead head{.chat = chat,
                  .id = RandomId(chat ? "chatcmpl-" : "cmpl-"),
                  .model = ready.model,
                  .fingerprint = "moend-" + ready.backend->info().model_hash,
                  .created = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now()),
                  .logprobs = parsed->pick.top_logprobs >= 0,
                  .include_usage = parsed->include_usage,
                  .kv_layers = parsed->kv_layers};
  if (parsed->stream) {
    Stream(std::move(*job), head, request.version != "HTTP/1.0", response);
  } else {
    Whole(**job, head, response);
  }
}

ApiResult<std::shared_ptr<Job>> Server::MakeJob(const Ready& ready, GenerationRequest& r,
                                                const std::string& scope) {
  const Backend& backend = *ready.backend;
  auto job = std::make_shared<Job>();
  const char* field = r.chat ? "messages" : "prompt";
  int64_t boundary = 0;
  if (r.chat) {
    auto tokens = backend.ChatTokens(r.messages, {.variables = r.template_variables});
    if (!tokens) return std::unexpected(FromError(tokens.error()));
    job->prompt = std::move(*tokens);
    if (r.messages.size() > 1) {
      // Where the last message begins: what a next request with another last message will share.
      auto before = backend.ChatTokens(std::span(r.messages).first(r.messages.size() - 1),
                                       {.add_generation_prompt = false, .variables = r.template_variables});
      if (before) boundary = CommonPrefix(*before, job->prompt);
    }
  } else if (!r.prompt_tokens.empty()) {
    job->prompt = std::move(r.prompt_tokens);
  } else {
    auto tokens = backend.Tokenize(r.prompt, true, r.parse_special);
    if (!tokens) return std::unexpected(FromError(tokens.error()));
    job->prompt = std::move(*tokens);
  }
  const auto n = std::ssize(job->prompt);
  if (n == 0) return std::unexpected(BadField(field, "the prompt is empty", "invalid_value"));
  const int64_t n_ctx = backend.info().n_ctx;
  const int64_t most =
      options_.limits.prompt_tokens > 0 ? std::min(options_.limits.prompt_tokens, n_ctx - 1) : n_ctx - 1;
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
  job->stop = std::move(r.stop);
  job->use_cache = job->keep_after = options_.prefix_cache && r.cache_prompt;
  job->keep_after = job->keep_after && r.chat;
  if (job->use_cache) job->split = SplitLength(n, boundary, options_.scheduler.min_prefix_tokens);
  return job;
}

void Server::Whole(Job& job, const AnswerHead& head, httplib::Response& response) {
  Delta all;
  for (;;) {
    Job::Event event = job.Wait(kPoll);
    all.text += event.delta.text;
    std::ranges::move(event.delta.tokens, std::back_inserter(all.tokens));
    if (event.outcome) {
      if (event.outcome->error) return SendError(response, *event.outcome->error);
      response.set_content(Dump(WholeAnswer(head, all, *event.outcome)), kJson);
      return;
    }
    if (ClientGone()) {
      job.Cancel();
      return SendError(response, {.status = 503, .message = "the client went away", .code = "cancelled"});
    }
  }
}

void Server::Stream(std::shared_ptr<Job> job, const AnswerHead& head, bool chunked,
                    httplib::Response& response) {
  struct State {
    Job::Event event;
    bool started = false, over = false;
    int64_t offset = 0;
    Job::Clock::time_point last_sent = Job::Clock::now();
  };
  auto state = std::make_shared<State>();
  const auto give_up = Job::Clock::now() + kFirstWait;
  do {
    state->event = job->Wait(kPoll);
  } while (state->event.delta.empty() && !state->event.outcome && !ClientGone() &&
           Job::Clock::now() < give_up);
  if (state->event.outcome && state->event.outcome->error)
    return SendError(response, *state->event.outcome->error);

  response.set_header("Cache-Control", "no-cache");
  response.set_header("X-Accel-Buffering", "no");  // nginx: pass every event on at once
  const auto provide = [job, state, head](size_t, httplib::DataSink& sink) {
    std::string out;
    if (!std::exchange(state->started, true)) out = FirstChunk(head);
    Job::Event event = std::exchange(state->event, {});
    if (event.delta.empty() && !event.outcome) event = job->Wait(kPoll);
    if (!event.delta.empty()) {
      out += DeltaChunk(head, event.delta, state->offset);
      state->offset += std::ssize(event.delta.text);
    }
    if (event.outcome) {
      state->over = true;
      out += event.outcome->error ? ErrorChunk(*event.outcome->error) : LastChunks(head, *event.outcome);
    }
    const auto now = Job::Clock::now();
    if (out.empty() && now - state->last_sent > kPingInterval) out = ": ping\n\n";
    if (out.empty() ? !sink.is_writable() : !sink.write(out.data(), out.size())) {
      job->Cancel();
      return false;
    }
    if (!out.empty()) state->last_sent = now;
    if (state->over) sink.done();
    return true;
  };
  const auto release = [job, state](bool) {
    if (!state->over) job->Cancel();
  };
  if (chunked) {
    response.set_chunked_content_provider("text/event-stream", provide, release);
  } else {
    response.set_content_provider("text/event-stream", provide, release);  // ends where the connection does
  }
}

}  // namespace moend::serve
