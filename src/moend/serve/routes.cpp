// The routes that answer at once.
#include <iterator>

#include "moend/serve/page/page.h"
#include "moend/serve/server.h"

namespace moend::serve {
namespace {

const char* Name(Phase phase) {
  switch (phase) {
    case Phase::kQueued:
      return "queued";
    case Phase::kPrefill:
      return "prefill";
    case Phase::kDecode:
      return "decode";
    case Phase::kDone:
      return "done";
  }
  return "done";
}

// As llama-server has it: part of a character is a list of bytes.
OrderedJson PieceJson(const std::string& piece) {
  if (IsUtf8(piece)) return piece;
  return std::vector<uint8_t>(piece.begin(), piece.end());
}

OrderedJson ModelJson(const std::string& name, const BackendInfo& info, int64_t created) {
  return {{"id", name},
          {"object", "model"},
          {"created", created},
          {"owned_by", "moend"},
          {"max_model_len", info.n_ctx},
          {"meta",
           {{"n_vocab", info.n_vocab},
            {"n_ctx_train", info.n_ctx_train},
            {"n_params", info.n_params},
            {"size", info.model_bytes},
            {"plan", info.plan_name}}}};
}

}  // namespace

void Server::Models(const Ready& ready, const HttpRequest&, HttpResponse& response) {
  const auto created = std::chrono::system_clock::to_time_t(started_);
  const OrderedJson list = {
      {"object", "list"},
      {"data", OrderedJson::array({ModelJson(ready.model, ready.backend->info(), created)})}};
  response.SetContent(Dump(list), kJson);
}

void Server::Model(const Ready& ready, const HttpRequest& request, HttpResponse& response) {
  const std::string name = request.path.substr(request.path.rfind('/') + 1);
  if (name != ready.model)
    return SetError(response, {.status = 404,
                               .message = "the model of this server is " + ready.model,
                               .param = "model",
                               .code = "model_not_found"});
  response.SetContent(
      Dump(ModelJson(name, ready.backend->info(), std::chrono::system_clock::to_time_t(started_))), kJson);
}

void Server::Slots(const Ready& ready, const HttpRequest& request, HttpResponse& response) {
  const std::string scope = ScopeOf(request);
  OrderedJson list = OrderedJson::array();
  for (const SlotReport& s : ready.scheduler->slots()) {
    OrderedJson slot = {
        {"id", list.size()}, {"n_ctx", ready.backend->info().n_ctx}, {"is_processing", s.busy}};
    if (s.busy && s.scope == scope) {  // another key's request is nobody's business
      slot["state"] = Name(s.phase);
      slot["prompt_tokens"] = s.prompt_tokens;
      slot["cached_tokens"] = s.cached_tokens;
      slot["generated_tokens"] = s.generated_tokens;
      slot["prefill_progress"] = s.prefill_progress;
      slot["kv"] = {{"bytes", s.kv_bytes}, {"full_bytes", s.kv_full_bytes}};
    }
    list.push_back(std::move(slot));
  }
  response.SetContent(Dump(list), kJson);
}

void Server::MetricsText(const Ready&, const HttpRequest&, HttpResponse& response) {
  if (!options_.metrics)
    return SetError(response, {.status = 404,
                               .message = "metrics are off; start the server with --metrics",
                               .code = "metrics_off"});
  response.SetContent(metrics_.Render(gauges()), "text/plain; version=0.0.4");
}

void Server::Tokenize(const Ready& ready, const HttpRequest& request, HttpResponse& response) {
  auto body = ParseBody(request.body, options_.limits);
  if (!body) return SetError(response, body.error());
  auto r = ParseTokenizeRequest(*body);
  if (!r) return SetError(response, r.error());
  auto tokens = Tokens(ready, r->content, r->add_special, r->parse_special);
  if (!tokens) return SetError(response, tokens.error());
  // Written as it comes: as a tree of values, the tokens of a long text would take a hundred times its bytes.
  std::string out = R"({"tokens":[)";
  for (std::size_t i = 0; i < tokens->size(); ++i) {
    constexpr std::size_t kBetweenStops = 4096;
    if (i % kBetweenStops == 0 && Stopping()) return SetError(response, ShuttingDown());
    const int32_t t = (*tokens)[i];
    if (i > 0) out += ',';
    if (r->with_pieces) {
      out += Dump({{"id", t}, {"piece", PieceJson(ready.backend->Piece(t))}});
    } else {
      fmt::format_to(std::back_inserter(out), "{}", t);
    }
  }
  fmt::format_to(std::back_inserter(out), R"(],"count":{}}})", tokens->size());
  response.SetContent(std::move(out), kJson);
}

void Server::Detokenize(const Ready& ready, const HttpRequest& request, HttpResponse& response) {
  auto body = ParseBody(request.body, options_.limits);
  if (!body) return SetError(response, body.error());
  auto tokens = ParseDetokenizeRequest(*body, ready.defaults.n_vocab);
  if (!tokens) return SetError(response, tokens.error());
  response.SetContent(Dump({{"content", ready.backend->Detokenize(*tokens)}}), kJson);
}

void Server::Page(HttpResponse& response) const {
  // Nothing is loaded from anywhere, and the page may talk to this server only.
  response.SetHeader("Content-Security-Policy",
                     "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
                     "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
                     "frame-ancestors 'none'");
  response.SetHeader("X-Content-Type-Options", "nosniff");
  response.SetHeader("Referrer-Policy", "no-referrer");
  response.SetContent(PageHtml(), "text/html; charset=utf-8");
}

}  // namespace moend::serve
