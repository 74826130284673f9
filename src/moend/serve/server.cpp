#include "moend/serve/server.h"

#include <algorithm>

#include "moend/base/machine.h"

namespace moend::serve {
namespace {

constexpr const char* kNoRoute = "none";  // in /metrics: refused before a route was found

ApiError Loading() {
  return {.status = 503, .message = "the model is loading", .code = "loading", .retry_after = 2};
}

int64_t DefaultBudget(const Backend& backend, int64_t slots) {
  const int64_t n_ctx = backend.info().n_ctx;
  const int64_t wanted = 2 * slots * backend.ContextBound(n_ctx) + backend.PrefillScratch(0, n_ctx);
  const int64_t memory = ReadMachineLimits().usable_memory();
  return memory > 0 ? std::min(wanted, memory / 2) : wanted;
}

}  // namespace

Server::Server(ServerOptions options, Log log) : options_(std::move(options)), log_(std::move(log)) {
  transport_ = std::make_unique<Transport>(
      options_.limits,
      TransportHooks{.handle = [this](const HttpRequest& q, HttpResponse& r) { Handle(q, r); },
                     .check = [this](const RequestHead& head) { return CheckHead(head); },
                     .headers = [this](const RequestHead& head) { return options_.cors.Headers(head); },
                     .refused = [this](int status) { metrics_.CountRequest(kNoRoute, status); }});
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
  if (draining_.exchange(true)) return;
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
  if (options_.cors.IsPreflight(head)) return std::nullopt;
  if (head.path() != "/health" && !options_.keys.Scope(head.Get("authorization")))
    return ApiError{.status = 401,
                    .message = "a valid API key is needed: Authorization: Bearer KEY",
                    .code = "invalid_api_key"};
  // Also what keeps a foreign web page from posting here unasked: it may not send this type across origins.
  const std::string_view type = head.Get("content-type");
  if (head.method == "POST" && Lowercase(type.substr(0, type.find(';'))) != kJson)
    return ApiError{.status = 415, .message = "the body must be JSON: Content-Type: application/json"};
  if (head.method == "POST" && !ready_.load()) return Loading();
  return std::nullopt;
}

std::string Server::ScopeOf(const HttpRequest& request) const {
  return options_.keys.Scope(request.header("authorization")).value_or("nobody");
}

bool Server::Stopping() const {
  return draining_.load(std::memory_order_relaxed) || ClientGone();
}

ApiResult<ChatTokens> Server::Tokenizing(
    int64_t bytes, const std::function<Expected<ChatTokens>(const std::function<bool()>& stop)>& work) {
  const std::function<bool()> stop = [this] { return Stopping(); };
  Expected<ChatTokens> tokens = Fail(ErrorCode::kCancelled, "a text of {} bytes was not tokenized", bytes);
  long_texts_.Pass(bytes, stop, [&] { tokens = work(stop); });
  if (tokens) return std::move(*tokens);
  if (tokens.error().code == ErrorCode::kCancelled && draining_) return std::unexpected(ShuttingDown());
  return std::unexpected(FromError(tokens.error()));
}

ApiResult<std::vector<int32_t>> Server::Tokens(const Ready& ready, std::string_view text, bool add_special,
                                               bool parse_special) {
  auto tokens = Tokenizing(std::ssize(text), [&](const std::function<bool()>& stop) -> Expected<ChatTokens> {
    ChatTokens out;
    MOEND_ASSIGN(out.tokens, ready.backend->Tokenize(text, add_special, parse_special, stop));
    return out;
  });
  if (!tokens) return std::unexpected(std::move(tokens.error()));
  return std::move(tokens->tokens);
}

ApiResult<ChatTokens> Server::ChatTokensOf(const Ready& ready, std::span<const ChatMessage> messages,
                                           const ChatOptions& options) {
  int64_t bytes = std::ssize(options.tools);
  for (const ChatMessage& m : messages) bytes += TextBytes(m);
  return Tokenizing(
      bytes, [&](const std::function<bool()>& stop) { return ready.backend->Chat(messages, options, stop); });
}

void Server::Handle(const HttpRequest& request, HttpResponse& response) {
  static constexpr Route kRoutes[] = {
      {"GET", "/v1/models", &Server::Models, "/v1/models"},
      {"GET", "/v1/models/", &Server::Model, "/v1/models/{model}"},
      {"GET", "/slots", &Server::Slots, "/slots"},
      {"GET", "/metrics", &Server::MetricsText, "/metrics"},
      {"POST", "/v1/chat/completions", &Server::Chat, "/v1/chat/completions"},
      {"POST", "/v1/completions", &Server::Completion, "/v1/completions"},
      {"POST", "/tokenize", &Server::Tokenize, "/tokenize"},
      {"POST", "/detokenize", &Server::Detokenize, "/detokenize"},
  };
  const std::string_view path = request.path;
  if (options_.cors.IsPreflight(request.head)) {
    if (options_.cors.Allows(request.header("origin"))) {
      response.status = 204;
    } else {
      SetError(response, {.status = 403,
                          .message = "pages of this origin may not use this server; see --cors-origin",
                          .code = "origin_not_allowed"});
    }
    return;
  }
  const bool get = request.method() == "GET" || request.method() == "HEAD";
  if (get && path == "/health") return Health(response);
  if (get && path == "/" && options_.page) {  // also while the model is loading: the page says so, and waits
    Page(response);
    return metrics_.CountRequest("/", 200);
  }
  std::string allowed = path == "/health" || (path == "/" && options_.page) ? "GET, HEAD" : "";
  for (const Route& route : kRoutes) {
    const std::string_view pattern = route.path;
    const bool named = pattern.ends_with('/');
    if (named ? !path.starts_with(pattern) || path.size() == pattern.size() ||
                    path.find('/', pattern.size()) != std::string_view::npos
              : path != pattern)
      continue;
    const bool of_get = std::string_view(route.method) == "GET";
    if (of_get ? get : request.method() == route.method) return Call(route, request, response);
    allowed = of_get ? "GET, HEAD" : route.method;
  }
  if (allowed.empty()) {
    SetError(response, {.status = 404, .message = "there is nothing at this path", .code = "unknown_path"});
  } else {
    SetError(response,
             {.status = 405, .message = fmt::format("{} is not answered on this path", request.method())});
    response.SetHeader("Allow", allowed);
  }
  metrics_.CountRequest(kNoRoute, response.status);
}

void Server::Call(const Route& route, const HttpRequest& request, HttpResponse& response) {
  if (const Ready* ready = ready_.load()) {
    try {
      (this->*route.handler)(*ready, request, response);
    } catch (const std::exception& e) {  // memory: no code of ours or the libraries' throws otherwise
      response = {};
      log_.Error("{}: {}", route.label, e.what());
      SetError(response, {.status = 503,
                          .message = "the server ran out of memory",
                          .code = "out_of_memory",
                          .retry_after = 1});
    }
  } else {
    SetError(response, Loading());
  }
  metrics_.CountRequest(route.label, response.status);
}

void Server::Health(HttpResponse& response) const {
  if (!ready_.load()) return SetError(response, Loading());
  response.SetContent(R"({"status":"ok"})", kJson);
}

}  // namespace moend::serve
