// The HTTP server: OpenAI's routes and ours, over a Scheduler. It listens before the model is loaded, so that
// /health can say so.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moend/serve/auth.h"
#include "moend/serve/backend.h"
#include "moend/serve/cors.h"
#include "moend/serve/limits.h"
#include "moend/serve/log.h"
#include "moend/serve/metrics.h"
#include "moend/serve/prefix_store.h"
#include "moend/serve/request.h"
#include "moend/serve/response.h"
#include "moend/serve/scheduler.h"
#include "moend/serve/transport.h"
#include "moend/serve/turnstile.h"

namespace moend::serve {

struct ServerOptions {
  std::string host = "127.0.0.1";  // or "unix:PATH"
  int port = 8080;                 // 0: any free one
  ApiKeys keys;
  Cors cors;
  Limits limits;
  SchedulerOptions scheduler;
  SamplerOptions sampler;    // what requests do not say
  std::string alias;         // the model's name in answers; empty: the backend's
  bool metrics = false;      // answer /metrics
  bool prefix_cache = true;  // keep and reuse prefixes
  bool page = true;          // answer /
};

class Server {
 public:
  Server(ServerOptions options, Log log);
  ~Server();

  // Binds and starts to answer; all but /health and / is 503 until Serve(). Returns the port.
  Expected<int> Start();
  // `store` may be null. Without a K/V budget in the options, one is chosen: all slots full, and as much
  // again for idle contexts, but no more than half of the machine's memory.
  void Serve(std::unique_ptr<Backend> backend, std::unique_ptr<PrefixStore> store);

  // Stops accepting, finishes what the scheduler has accepted (cancels it after `patience`), ends all
  // threads. A request whose text is still being tokenized is refused.
  void Drain(std::chrono::duration<double> patience);

  Gauges gauges() const;  // after Serve()

 private:
  struct Ready {  // exists from Serve() on
    std::unique_ptr<Backend> backend;
    std::unique_ptr<PrefixStore> store;
    std::unique_ptr<Scheduler> scheduler;
    RequestDefaults defaults;
    std::string model;
  };
  using Handler = void (Server::*)(const Ready&, const HttpRequest&, HttpResponse&);
  struct Route {
    const char* method;
    const char* path;  // one that ends with '/' takes a name behind it
    Handler handler;
    const char* label;  // in /metrics
  };

  void Handle(const HttpRequest& request, HttpResponse& response);
  void Call(const Route& route, const HttpRequest& request, HttpResponse& response);
  void Health(HttpResponse& response) const;
  std::optional<ApiError> CheckHead(const RequestHead& head) const;
  std::string ScopeOf(const HttpRequest& request) const;
  // Whether the long work for this thread's request is in vain.
  bool Stopping() const;
  // Tokens of `text`: one text a processor at a time if it is a long one, ended when Stopping().
  ApiResult<std::vector<int32_t>> Tokens(const Ready& ready, std::string_view text, bool add_special,
                                         bool parse_special);
  ApiResult<ChatTokens> ChatTokensOf(const Ready& ready, std::span<const ChatMessage> messages,
                                     const ChatOptions& options);
  // Runs `work` on a text of so many bytes.
  ApiResult<ChatTokens> Tokenizing(
      int64_t bytes, const std::function<Expected<ChatTokens>(const std::function<bool()>& stop)>& work);

  // routes.cpp
  void Models(const Ready& ready, const HttpRequest& request, HttpResponse& response);
  void Model(const Ready& ready, const HttpRequest& request, HttpResponse& response);
  void Slots(const Ready& ready, const HttpRequest& request, HttpResponse& response);
  void MetricsText(const Ready& ready, const HttpRequest& request, HttpResponse& response);
  void Tokenize(const Ready& ready, const HttpRequest& request, HttpResponse& response);
  void Detokenize(const Ready& ready, const HttpRequest& request, HttpResponse& response);
  void Page(HttpResponse& response) const;
  // generate_routes.cpp
  void Chat(const Ready& ready, const HttpRequest& request, HttpResponse& response);
  void Completion(const Ready& ready, const HttpRequest& request, HttpResponse& response);
  void Generate(const Ready& ready, bool chat, const HttpRequest& request, HttpResponse& response);
  ApiResult<std::shared_ptr<Job>> MakeJob(const Ready& ready, GenerationRequest& r, const std::string& scope);
  // How the answer is written, and what it is held to.
  static ApiResult<void> SetFormat(const Backend& backend, AnswerFormat format, Job& job);
  void Stream(std::shared_ptr<Job> job, const AnswerHead& head, HttpResponse& response);
  void Whole(Job& job, const AnswerHead& head, HttpResponse& response);

  ServerOptions options_;
  Log log_;
  Metrics metrics_;
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Ready> ready_owner_;
  std::atomic<const Ready*> ready_{nullptr};
  Turnstile long_texts_;
  std::atomic<bool> draining_{false};
  std::chrono::system_clock::time_point started_ = std::chrono::system_clock::now();
};

}  // namespace moend::serve
