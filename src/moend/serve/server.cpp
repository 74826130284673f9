#include "moend/serve/server.h"

#include <algorithm>
#include <array>

#include "moend/base/machine.h"

namespace moend::serve {
namespace {

constexpr const char* kJson = "application/json";
constexpr const char* kNoRoute = "none";  // in /metrics: refused before a route was found

int64_t DefaultBudget(const Backend& backend, int64_t slots) {
  const int64_t n_ctx = backend.info().n_ctx;
  const int64_t wanted = 2 * slots * backend.ContextBound(n_ctx) + backend.PrefillScratch(0, n_ctx);
  const int64_t memory = ReadMachineLimits().usable_memory();
  return memory > 0 ? std::min(wanted, memory / 2) : wanted;
}

}  // namespace

Server::Server(ServerOptions options, Log log) : options_(std::move(options)), log_(std::move(log)) {
  transport_ = std::make_unique<Transport>(
      options_.limits, [this](const RequestHead& head) { return CheckHead(head); },
      [this](int status) { metrics_.CountRequest(kNoRoute, status); });
  AddRoutes();
}

Server::~Server() {
  Drain(std::chrono::seconds(0));
}

Expected<int> Server::Start() {
  MOEND_ASSIGN(const int port, transport_->Listen(options_.host, options_.port));
  transport_->Start();
  return port;
}

void Server::Serve(std::unique_ptr<Backend> backend, std::unique_ptr<PrefixStore> store) {
  auto ready = std::make_unique<Ready>();
  ready->backend = std::move(backend);
  ready->store = std::move(store);
  const BackendInfo& info = ready->backend->info();
  if (options_.scheduler.kv_budget_bytes <= 0)
    options_.scheduler.kv_budget_bytes = DefaultBudget(*ready->backend, options_.scheduler.slots);
  ready->scheduler = std::make_unique<Scheduler>(*ready->backend, ready->store.get(), options_.limits,
                                                 options_.scheduler, metrics_, log_);
  ready->defaults = {options_.sampler, info.n_vocab};
  ready->model = options_.alias.empty() ? info.model_name : options_.alias;
  ready_owner_ = std::move(ready);
  ready_.store(ready_owner_.get());
}

void Server::Drain(std::chrono::duration<double> patience) {
  if (std::exchange(drained_, true)) return;
  const auto deadline = std::chrono::steady_clock::now() +
                        std::chrono::duration_cast<std::chrono::steady_clock::duration>(patience);
  transport_->StopAccepting();
  if (ready_owner_) ready_owner_->scheduler->Drain(deadline);
  // The last bytes of the answers still have to go out.
  transport_->WaitIdle(std::max(deadline, std::chrono::steady_clock::now() + std::chrono::seconds(2)));
  transport_.reset();
  ready_.store(nullptr);
  ready_owner_.reset();
}

Gauges Server::gauges() const {
  Gauges g = ready_owner_->scheduler->gauges();
  g.connections = transport_->open_connections();
  return g;
}

std::optional<ApiError> Server::CheckHead(const RequestHead& head) const {
  if (head.path() != "/health" && !options_.keys.Scope(head.Get("authorization")))
    return ApiError{.status = 401,
                    .message = "a valid API key is needed: Authorization: Bearer KEY",
                    .code = "invalid_api_key"};
  // Also what keeps a foreign web page from posting here unasked: it may not send this type across origins.
  const std::string_view type = head.Get("content-type");
  if (head.method == "POST" && Lowercase(type.substr(0, type.find(';'))) != kJson)
    return ApiError{.status = 415, .message = "the body must be JSON: Content-Type: application/json"};
  if (head.method == "POST" && !ready_.load())
    return ApiError{.status = 503, .message = "the model is loading", .code = "loading", .retry_after = 2};
  return std::nullopt;
}

std::string Server::ScopeOf(const httplib::Request& request) const {
  return options_.keys.Scope(request.get_header_value("authorization")).value_or("nobody");
}

void Server::SendError(httplib::Response& response, const ApiError& error) const {
  response.status = error.status;
  if (error.retry_after > 0) response.set_header("Retry-After", std::to_string(error.retry_after));
  response.set_content(ToJson(error), kJson);
}

void Server::Route(const char* method, const char* path, Handler handler, const char* label) {
  if (!label) label = path;
  auto call = [this, label, handler](const httplib::Request& request, httplib::Response& response) {
    response.status = 200;
    if (const Ready* ready = ready_.load()) {
      try {
        (this->*handler)(*ready, request, response);
      } catch (const std::exception& e) {  // memory: no code of ours or the libraries' throws otherwise
        log_.Error("{}: {}", label, e.what());
        SendError(response,
                  {.status = 503, .message = "the server ran out of memory", .code = "out_of_memory"});
      }
    } else {
      SendError(response,
                {.status = 503, .message = "the model is loading", .code = "loading", .retry_after = 2});
    }
    metrics_.CountRequest(label, response.status);
  };
  httplib::Server& routes = transport_->routes();
  if (std::string_view(method) == "GET") {
    routes.Get(path, call);
  } else {
    routes.Post(path, call);
  }
}

void Server::AddRoutes() {
  httplib::Server& routes = transport_->routes();
  const auto health = [this](const httplib::Request&, httplib::Response& response) {
    if (ready_.load()) {
      response.set_content(R"({"status":"ok"})", kJson);
    } else {
      SendError(response,
                {.status = 503, .message = "the model is loading", .code = "loading", .retry_after = 2});
    }
  };
  routes.Get("/health", health);
  Route("GET", "/v1/models", &Server::Models);
  Route("GET", R"(/v1/models/([^/]+))", &Server::Model, "/v1/models/{model}");
  Route("GET", "/slots", &Server::Slots);
  Route("GET", "/metrics", &Server::MetricsText);
  Route("POST", "/v1/chat/completions", &Server::Chat);
  Route("POST", "/v1/completions", &Server::Completion);
  Route("POST", "/tokenize", &Server::Tokenize);
  Route("POST", "/detokenize", &Server::Detokenize);
  if (options_.page)  // also while the model is loading: the page says so, and waits
    routes.Get("/", [this](const httplib::Request&, httplib::Response& response) {
      Page(response);
      metrics_.CountRequest("/", 200);
    });

  routes.set_error_handler([this](const httplib::Request& request, httplib::Response& response) {
    if (!response.body.empty()) return;  // a handler has said already what is wrong
    constexpr std::array kPaths = {"/health",   "/v1/models",           "/slots",
                                   "/metrics",  "/v1/chat/completions", "/v1/completions",
                                   "/tokenize", "/detokenize",          "/"};
    ApiError error{.status = response.status, .message = "the request could not be answered"};
    if (response.status == 404) {
      if (std::ranges::find(kPaths, request.path) != kPaths.end()) {
        error.status = 405;
        error.message = fmt::format("{} is not answered on this path", request.method);
      } else {
        error.message = "there is nothing at this path";
        error.code = "unknown_path";
      }
    }
    metrics_.CountRequest(kNoRoute, error.status);
    SendError(response, error);
  });
  routes.set_exception_handler(
      [this](const httplib::Request&, httplib::Response& response, const std::exception_ptr&) {
        SendError(response, {.status = 500, .message = "the request could not be answered"});
      });
}

}  // namespace moend::serve
