// The HTTP server: OpenAI's routes and ours, over a Scheduler. It listens before the model is loaded, so that
// /health can say so.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <string>

#include "moend/serve/auth.h"
#include "moend/serve/backend.h"
#include "moend/serve/limits.h"
#include "moend/serve/log.h"
#include "moend/serve/metrics.h"
#include "moend/serve/prefix_store.h"
#include "moend/serve/request.h"
#include "moend/serve/response.h"
#include "moend/serve/scheduler.h"
#include "moend/serve/transport.h"

namespace moend::serve {

struct ServerOptions {
  std::string host = "127.0.0.1";
  int port = 8080;  // 0: any free one
  ApiKeys keys;
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

  // Stops accepting, finishes what was accepted (cancels it after `patience`), ends all threads.
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
  using Handler = void (Server::*)(const Ready&, const httplib::Request&, httplib::Response&);

  void AddRoutes();
  // `label`: the route's name in /metrics; null: its path.
  void Route(const char* method, const char* path, Handler handler, const char* label = nullptr);
  std::optional<ApiError> CheckHead(const RequestHead& head) const;
  std::string ScopeOf(const httplib::Request& request) const;
  void SendError(httplib::Response& response, const ApiError& error) const;

  // routes.cpp
  void Models(const Ready& ready, const httplib::Request& request, httplib::Response& response);
  void Model(const Ready& ready, const httplib::Request& request, httplib::Response& response);
  void Slots(const Ready& ready, const httplib::Request& request, httplib::Response& response);
  void MetricsText(const Ready& ready, const httplib::Request& request, httplib::Response& response);
  void Tokenize(const Ready& ready, const httplib::Request& request, httplib::Response& response);
  void Detokenize(const Ready& ready, const httplib::Request& request, httplib::Response& response);
  void Page(httplib::Response& response) const;
  // generate_routes.cpp
  void Chat(const Ready& ready, const httplib::Request& request, httplib::Response& response);
  void Completion(const Ready& ready, const httplib::Request& request, httplib::Response& response);
  void Generate(const Ready& ready, bool chat, const httplib::Request& request, httplib::Response& response);
  ApiResult<std::shared_ptr<Job>> MakeJob(const Ready& ready, GenerationRequest& r, const std::string& scope);
  void Stream(std::shared_ptr<Job> job, const AnswerHead& head, bool chunked, httplib::Response& response);
  void Whole(Job& job, const AnswerHead& head, httplib::Response& response);

  ServerOptions options_;
  Log log_;
  Metrics metrics_;
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Ready> ready_owner_;
  std::atomic<const Ready*> ready_{nullptr};
  bool drained_ = false;
  std::chrono::system_clock::time_point started_ = std::chrono::system_clock::now();
};

}  // namespace moend::serve
