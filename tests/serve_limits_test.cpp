// The routes at their edges: texts that are too long, clients that leave, answers that end early, pages of
// other origins.
#include <gtest/gtest.h>

#include "tests/support/serve_client.h"

namespace moend::serve {
namespace {

using nlohmann::json;
using test::Ask;
using test::Client;
using test::Events;
using test::Eventually;
using test::FakeOptions;
using test::Get;
using test::kChat;
using test::kComplete;
using test::ParseReply;
using test::Post;
using test::Reply;
using test::Running;
using namespace std::chrono_literals;

// A text that cannot fit is refused by its bytes, before anybody works on it.
TEST(Api, ATextThatCannotFitIsNotTokenized) {
  Running s;
  for (const char* path : {kComplete, kChat}) {
    const std::string long_text(5000, 'x');  // the context has 4,096 tokens, and none stands for two bytes
    const Reply r =
        Ask(s.port, Post(path, path == kChat
                                   ? json({{"messages", {{{"role", "user"}, {"content", long_text}}}}}).dump()
                                   : json({{"prompt", long_text}}).dump()));
    EXPECT_EQ(r.status, 400);
    EXPECT_EQ(r.json()["error"]["code"], "context_length_exceeded") << r.body;
  }
  EXPECT_EQ(s.backend->tokenized, 0);
}

TEST(Api, TokenizingEndsWhenItsClientLeaves) {
  FakeOptions fake;
  fake.tokenize_byte = 2ms;
  Running s({}, fake);
  const std::string text(4000, 'x');
  for (const auto& [path, body] : {std::pair<const char*, json>{kComplete, {{"prompt", text}}},
                                   {kChat, {{"messages", {{{"role", "user"}, {"content", text}}}}}},
                                   {"/tokenize", {{"content", text}}}}) {
    const int64_t before = s.backend->tokenized;
    {
      Client c(s.port);
      c.Send(Post(path, body.dump()));
      ASSERT_TRUE(Eventually([&] { return s.backend->tokenized > before + 5; }));
    }
    EXPECT_TRUE(Eventually([&] { return s.server.gauges().connections == 0; }));
    EXPECT_LT(s.backend->tokenized, before + 4000) << path;
  }
}

TEST(Api, TokenizingEndsWhenTheServerDrains) {
  FakeOptions fake;
  fake.tokenize_byte = 5ms;
  Running s({}, fake);
  Client c(s.port);
  c.Send(Post(kComplete, json({{"prompt", std::string(4000, 'x')}}).dump()));
  ASSERT_TRUE(Eventually([&] { return s.backend->tokenized > 5; }));
  // The server's end is also the backend's.
  std::atomic<bool> drained{false};
  std::thread drain([&] {
    s.server.Drain(60s);
    drained = true;
  });
  const Reply r = ParseReply(c.ReadAll());
  EXPECT_EQ(r.status, 503);
  EXPECT_EQ(r.json()["error"]["code"], "shutting_down") << r.body;
  EXPECT_TRUE(Eventually([&] { return drained.load(); }));
  drain.join();
}

// More long texts at once than processors: who waits for a turn can leave.
TEST(Api, ManyLongTextsTakeTurns) {
  FakeOptions fake;
  fake.n_ctx = 1 << 20;
  fake.tokenize_byte = 1ms;
  Running s({}, fake);
  const std::string body = json({{"content", std::string(70'000, 'x')}}).dump();
  std::vector<std::unique_ptr<Client>> clients;
  for (unsigned i = 0; i < std::thread::hardware_concurrency() + 4; ++i) {
    clients.push_back(std::make_unique<Client>(s.port));
    clients.back()->Send(Post("/tokenize", body));
  }
  ASSERT_TRUE(Eventually([&] { return s.backend->tokenized > 20; }));
  clients.clear();
  EXPECT_TRUE(Eventually([&] { return s.server.gauges().connections == 0; }));
}

TEST(Api, MaxTokensMinusOneIsAsManyAsFit) {
  FakeOptions fake;
  fake.n_ctx = 300;
  ServerOptions options;
  options.limits.default_max_tokens = 10;
  Running s(std::move(options), fake);
  const auto generated = [&](const std::string& field) {
    return Ask(s.port, Post(kComplete, R"({"prompt":"x","temperature":0)" + field + "}"))
        .json()["usage"]["completion_tokens"]
        .get<int>();
  };
  EXPECT_EQ(generated(""), 10);
  EXPECT_EQ(generated(R"(,"max_tokens":-1)"), 298);
  EXPECT_EQ(generated(R"(,"n_predict":-1)"), 298);
}

TEST(Api, EndsOnlyWhenItMay) {
  Running s;
  const auto ask = [&](const std::string& fields) {
    return Ask(s.port, Post(kComplete, R"({"prompt":"echo:hi there.\n","temperature":0,)" + fields + "}"))
        .json();
  };
  const json plain = ask(R"("max_tokens":20)");
  EXPECT_EQ(plain["choices"][0]["text"], "hi there.");
  const json all = ask(R"("max_tokens":20,"ignore_eos":true)");
  EXPECT_EQ(all["usage"]["completion_tokens"], 20);
  EXPECT_EQ(all["choices"][0]["finish_reason"], "length");
  EXPECT_GE(ask(R"("max_tokens":20,"min_tokens":12)")["usage"]["completion_tokens"], 12);
  // 116 is 't'.
  const json stopped = ask(R"("max_tokens":20,"stop_token_ids":[116])");
  EXPECT_EQ(stopped["choices"][0]["text"], "hi ");
  EXPECT_EQ(stopped["choices"][0]["finish_reason"], "stop");
  // Nothing but the end is left, and it may not be picked: its log probability is still a number.
  const json odd = ask(R"("max_tokens":2,"min_tokens":2,"logprobs":5,"logit_bias":{"256":100})");
  for (const json& top : odd["choices"][0]["logprobs"]["top_logprobs"])
    for (const auto& [token, logprob] : top.items()) EXPECT_TRUE(logprob.is_number()) << odd;
}

// Log probabilities belong to the text: none for what turned out to be a stop string, whole or streamed.
TEST(Api, LogProbabilitiesEndWhereTheTextDoes) {
  Running s;
  for (const auto& [stop, text] :
       {std::pair<std::string, std::string>{"there", "hi "}, {"e.", "hi ther"}, {"h", ""}}) {
    const std::string fields =
        R"("prompt":"echo:hi there.\n","temperature":0,"logprobs":0,"stop":")" + stop + "\"";
    const json whole = Ask(s.port, Post(kComplete, "{" + fields + "}")).json();
    EXPECT_EQ(whole["choices"][0]["text"], text);
    EXPECT_EQ(whole["choices"][0]["logprobs"]["tokens"].size(), text.size()) << whole;
    std::string streamed, tokens;
    for (const json& e : Events(Ask(s.port, Post(kComplete, "{" + fields + ",\"stream\":true}")).body)) {
      if (!e.is_object()) continue;
      streamed += e["choices"][0]["text"].get<std::string>();
      if (e["choices"][0]["logprobs"].is_null()) continue;
      for (const json& t : e["choices"][0]["logprobs"]["tokens"]) tokens += t.get<std::string>();
      for (const json& o : e["choices"][0]["logprobs"]["text_offset"]) EXPECT_LT(o, text.size());
    }
    EXPECT_EQ(streamed, text);
    EXPECT_EQ(tokens, text);
  }
  // Without a stop string every token has its own.
  const json all =
      Ask(s.port, Post(kComplete, R"({"prompt":"echo:hi.\n","temperature":0,"logprobs":0,"stop":"zz"})"))
          .json()["choices"][0];
  EXPECT_EQ(all["logprobs"]["tokens"].size(), 3u);
  EXPECT_EQ(all["logprobs"]["text_offset"], json({0, 1, 2}));
}

TEST(Api, PagesOfAnotherOriginNeedToBeNamed) {
  ServerOptions options;
  options.keys = ApiKeys::Create({"right"}).value();
  options.cors = Cors::Create({"https://app.example"}).value();
  Running s(std::move(options));
  const std::string app = "Origin: https://app.example\r\n", evil = "Origin: https://evil.example\r\n";
  const auto preflight = [&](const std::string& origin) {
    return Ask(s.port, "OPTIONS /v1/chat/completions HTTP/1.1\r\nConnection: close\r\n" + origin +
                           "Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: "
                           "authorization, content-type, x-stainless-os\r\n\r\n");
  };
  const auto has = [](const Reply& r, const std::string& line) {
    return (r.head + "\r\n").find(line + "\r\n") != std::string::npos;
  };
  const Reply yes = preflight(app);  // without a key
  EXPECT_EQ(yes.status, 204);
  EXPECT_TRUE(has(yes, "Access-Control-Allow-Origin: https://app.example")) << yes.head;
  EXPECT_TRUE(has(yes, "Access-Control-Allow-Headers: authorization, content-type, x-stainless-os"));
  EXPECT_TRUE(has(yes, "Vary: Origin"));
  const Reply no = preflight(evil);
  EXPECT_EQ(no.status, 403);
  EXPECT_EQ(no.head.find("Access-Control-Allow"), std::string::npos);
  // Answers, refusals among them, can be read by that origin only.
  const std::string key = "Authorization: Bearer right\r\n";
  for (const Reply& r :
       {Ask(s.port, Get("/v1/models", key + app)), Ask(s.port, Get("/v1/models", app)),
        Ask(s.port, Post(kComplete, "{", key + app)),
        Ask(s.port, Post(kComplete, R"({"prompt":"x","max_tokens":1,"stream":true})", key + app))})
    EXPECT_TRUE(has(r, "Access-Control-Allow-Origin: https://app.example")) << r.head;
  EXPECT_EQ(Ask(s.port, Get("/v1/models", app)).status, 401);
  EXPECT_EQ(Ask(s.port, Get("/v1/models", key + evil)).head.find("Access-Control"), std::string::npos);
  Running closed;
  EXPECT_EQ(Ask(closed.port, Get("/v1/models", app)).head.find("Access-Control"), std::string::npos);
}

}  // namespace
}  // namespace moend::serve
