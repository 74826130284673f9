// The routes, over sockets: OpenAI's shapes, streams, keys, limits, and a storm of hostile requests.
#include <gtest/gtest.h>

#include <random>

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

TEST(Api, Completes) {
  Running s;
  const Reply r = Ask(s.port, Post(kComplete, R"({"prompt":"echo:hi there.\n","temperature":0})"));
  ASSERT_EQ(r.status, 200) << r.body;
  const json j = r.json();
  EXPECT_EQ(j["object"], "text_completion");
  EXPECT_TRUE(j["id"].get<std::string>().starts_with("cmpl-"));
  EXPECT_EQ(j["model"], "fake");
  EXPECT_EQ(j["choices"][0]["text"], "hi there.");
  EXPECT_EQ(j["choices"][0]["finish_reason"], "stop");
  EXPECT_TRUE(j["choices"][0]["logprobs"].is_null());
  EXPECT_EQ(j["usage"]["prompt_tokens"], 16);
  EXPECT_EQ(j["usage"]["completion_tokens"], 9);
  EXPECT_EQ(j["usage"]["total_tokens"], 25);
  EXPECT_EQ(j["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
  const json& kv = j["timings"]["kv"];
  EXPECT_GT(kv["bytes"], 0);
  EXPECT_GT(kv["full_bytes"], kv["bytes"]);
  EXPECT_NEAR(kv["ratio"].get<double>(), kv["full_bytes"].get<double>() / kv["bytes"].get<double>(), 1e-9);
  EXPECT_FALSE(kv.contains("layers"));
}

TEST(Api, Chats) {
  Running s;
  const Reply r =
      Ask(s.port, Post(kChat, R"({"messages":[{"role":"user","content":"echo:a\u00e9b."}],"temperature":0,
      "logprobs":true,"top_logprobs":2,"kv_layers":true})"));
  ASSERT_EQ(r.status, 200) << r.body;
  const json j = r.json();
  EXPECT_EQ(j["object"], "chat.completion");
  EXPECT_EQ(j["choices"][0]["message"]["role"], "assistant");
  EXPECT_EQ(j["choices"][0]["message"]["content"], "a\u00e9b.");
  const json& tokens = j["choices"][0]["logprobs"]["content"];
  ASSERT_EQ(tokens.size(), 5u);
  EXPECT_EQ(tokens[0]["token"], "a");
  EXPECT_EQ(tokens[1]["bytes"], json::array({0xc3}));  // half a character: its bytes tell
  EXPECT_EQ(tokens[0]["top_logprobs"].size(), 2u);
  EXPECT_EQ(j["timings"]["kv"]["layers"].size(), 2u);
  EXPECT_EQ(j["timings"]["kv"]["layers"][0]["k_bits"], 4);
}

TEST(Api, StreamsChats) {
  Running s;
  const Reply r =
      Ask(s.port, Post(kChat, R"({"messages":[{"role":"user","content":"echo:one two."}],"temperature":0,
      "stream":true,"stream_options":{"include_usage":true}})"));
  ASSERT_EQ(r.status, 200);
  EXPECT_NE(r.head.find("text/event-stream"), std::string::npos);
  const auto events = Events(r.body);
  ASSERT_GE(events.size(), 4u);
  EXPECT_EQ(events[0]["choices"][0]["delta"]["role"], "assistant");
  std::string text;
  for (std::size_t i = 0; i + 3 < events.size(); ++i) {
    EXPECT_EQ(events[i]["object"], "chat.completion.chunk");
    EXPECT_EQ(events[i]["id"], events[0]["id"]);
    EXPECT_TRUE(events[i]["usage"].is_null());
    EXPECT_TRUE(events[i]["choices"][0]["finish_reason"].is_null());
    text += events[i]["choices"][0]["delta"]["content"].get<std::string>();
  }
  EXPECT_EQ(text, "one two.");
  const json& last = events[events.size() - 3];
  EXPECT_EQ(last["choices"][0]["finish_reason"], "stop");
  EXPECT_TRUE(last["timings"].contains("kv"));
  EXPECT_EQ(events[events.size() - 2]["usage"]["completion_tokens"], 8);
  EXPECT_TRUE(events[events.size() - 2]["choices"].empty());
  EXPECT_EQ(events.back(), "[DONE]");
}

TEST(Api, StreamsCompletionsAsItWouldAnswerWhole) {
  Running s;
  const std::string fields = R"("prompt":"abc","temperature":0,"max_tokens":40,"stop":"q","logprobs":1)";
  const json whole = Ask(s.port, Post(kComplete, "{" + fields + "}")).json();
  const auto events = Events(Ask(s.port, Post(kComplete, "{" + fields + ",\"stream\":true}")).body);
  std::string text;
  std::vector<std::string> tokens;
  for (const json& e : events) {
    if (!e.is_object()) continue;
    text += e["choices"][0]["text"].get<std::string>();
    if (!e["choices"][0]["logprobs"].is_null())
      for (const json& t : e["choices"][0]["logprobs"]["tokens"]) tokens.push_back(t);
  }
  EXPECT_EQ(text, whole["choices"][0]["text"]);
  EXPECT_EQ(json(tokens), whole["choices"][0]["logprobs"]["tokens"]);
  EXPECT_EQ(whole["choices"][0]["logprobs"]["text_offset"][1], 1);
}

TEST(Api, TokensThatArePartsOfCharactersStayApart) {
  Running s;
  const json j = Ask(s.port, Post(kComplete, R"({"prompt":"x","max_tokens":1,"temperature":0,"logprobs":2,
        "logit_bias":{"254":100,"255":100}})"))
                     .json()["choices"][0]["logprobs"];
  EXPECT_TRUE(j["tokens"][0] == "bytes:\\xfe" || j["tokens"][0] == "bytes:\\xff") << j;
  EXPECT_TRUE(j["top_logprobs"][0].contains("bytes:\\xfe") && j["top_logprobs"][0].contains("bytes:\\xff"))
      << j;
}

TEST(Api, ASeedRepeatsAnAnswer) {
  Running s;
  // The fake's other tokens need a high temperature to be picked at all.
  const auto ask = [&](int seed) {
    return Ask(s.port,
               Post(kComplete,
                    fmt::format(
                        R"({{"prompt":"x","temperature":2,"top_k":0,"top_p":1,"min_p":0,"max_tokens":60,
        "logit_bias":{{"65":18,"66":18,"67":18}},"seed":{}}})",
                        seed)))
        .json()["choices"][0]["text"]
        .get<std::string>();
  };
  EXPECT_EQ(ask(1), ask(1));
  EXPECT_NE(ask(1), ask(2));
}

TEST(Api, ListsModelsTokensSlotsAndMetrics) {
  ServerOptions options;
  options.metrics = true;
  options.alias = "tiny";
  Running s(std::move(options));
  const json models = Ask(s.port, Get("/v1/models")).json();
  EXPECT_EQ(models["data"][0]["id"], "tiny");
  EXPECT_EQ(models["data"][0]["meta"]["n_vocab"], 258);
  EXPECT_EQ(Ask(s.port, Get("/v1/models/tiny")).json()["object"], "model");
  EXPECT_EQ(Ask(s.port, Get("/v1/models/other")).json()["error"]["code"], "model_not_found");
  EXPECT_EQ(Ask(s.port, Post("/tokenize", R"({"content":"ab","add_special":true})")).json()["tokens"],
            json({257, 97, 98}));
  EXPECT_EQ(
      Ask(s.port, Post("/tokenize", R"({"content":"a","with_pieces":true})")).json()["tokens"][0]["piece"],
      "a");
  EXPECT_EQ(Ask(s.port, Post("/tokenize", R"({"content":"\u00e4","with_pieces":true})")).json()["tokens"],
            json::parse(R"([{"id":195,"piece":[195]},{"id":164,"piece":[164]}])"));
  EXPECT_EQ(Ask(s.port, Post("/detokenize", R"({"tokens":[97,98,257]})")).json()["content"], "ab");
  EXPECT_EQ(Ask(s.port, Post("/detokenize", R"({"tokens":[255]})")).json()["content"], "\ufffd");
  EXPECT_EQ(Ask(s.port, Get("/slots")).json().size(), 8u);
  Ask(s.port, Post(kComplete, R"({"prompt":"x","max_tokens":3})"));
  ASSERT_TRUE(Eventually([&] { return s.server.gauges().slots_busy == 0; }));
  const std::string text = Ask(s.port, Get("/metrics")).body;
  EXPECT_NE(text.find("moend_generated_tokens_total 3\n"), std::string::npos) << text;
  EXPECT_NE(text.find("moend_requests_total{route=\"/v1/completions\",status=\"200\"} 1\n"),
            std::string::npos);
  EXPECT_NE(text.find("moend_first_token_seconds_bucket{le=\"+Inf\"} 1\n"), std::string::npos);
  Running without;
  EXPECT_EQ(Ask(without.port, Get("/metrics")).status, 404);
}

TEST(Api, MetricsCountWhatNoRouteSaw) {
  ServerOptions options;
  options.metrics = true;
  options.keys = ApiKeys::Create({"right"}).value();
  options.limits.body_bytes = 3000;
  Running s(std::move(options));
  const std::string right = "Authorization: Bearer right\r\n";
  Ask(s.port, Get("/slots"));
  Ask(s.port, Get("/slots"));
  Ask(s.port, Post(kComplete, std::string(4000, 'x'), right));
  Ask(s.port, Get("/nothing", right));
  Ask(s.port, Get("/v1/models/other", right));
  const std::string text = Ask(s.port, Get("/metrics", right)).body;
  for (const char* line :
       {"{route=\"none\",status=\"401\"} 2\n", "{route=\"none\",status=\"413\"} 1\n",
        "{route=\"none\",status=\"404\"} 1\n", "{route=\"/v1/models/{model}\",status=\"404\"} 1\n"})
    EXPECT_NE(text.find(std::string("moend_requests_total") + line), std::string::npos) << line << text;
}

TEST(Api, SaysThatItIsLoading) {
  ServerOptions options;
  options.port = 0;
  Server server(std::move(options), Log());
  const int port = server.Start().value();
  EXPECT_EQ(Ask(port, Get("/health")).status, 503);
  EXPECT_EQ(Ask(port, Get("/")).status, 200);  // the page asks again by itself
  EXPECT_EQ(Ask(port, Get("/v1/models")).json()["error"]["code"], "loading");
  EXPECT_EQ(Ask(port, Post(kComplete, R"({"prompt":"x"})")).status, 503);
  server.Serve(std::make_unique<test::FakeBackend>(), nullptr);
  EXPECT_EQ(Ask(port, Get("/health")).json()["status"], "ok");
  EXPECT_EQ(Ask(port, Post(kComplete, R"({"prompt":"x","max_tokens":1})")).status, 200);
}

TEST(Api, EveryRouteButHealthNeedsTheKey) {
  ServerOptions options;
  options.keys = ApiKeys::Create({"right", "other"}).value();
  options.metrics = true;
  Running s(std::move(options));
  const std::vector<std::string> gets = {"/", "/v1/models", "/v1/models/fake", "/slots", "/metrics"};
  const std::vector<std::pair<std::string, std::string>> posts = {
      {kChat, R"({"messages":[{"role":"user","content":"x"}],"max_tokens":1})"},
      {kComplete, R"({"prompt":"x","max_tokens":1})"},
      {"/tokenize", R"({"content":"x"})"},
      {"/detokenize", R"({"tokens":[1]})"}};
  for (const std::string key : {"", "Authorization: Bearer wrong\r\n", "Authorization: Bearer\r\n",
                                "Authorization: right\r\n", "X-Api-Key: right\r\n"}) {
    EXPECT_EQ(Ask(s.port, Get("/health", key)).status, 200);
    for (const auto& path : gets) EXPECT_EQ(Ask(s.port, Get(path, key)).status, 401) << path << key;
    for (const auto& [path, body] : posts)
      EXPECT_EQ(Ask(s.port, Post(path, body, key)).status, 401) << path << key;
    EXPECT_EQ(Ask(s.port, Get("/no/such/path", key)).status, 401);
  }
  const std::string right = "Authorization: Bearer right\r\n";
  for (const auto& path : gets) EXPECT_EQ(Ask(s.port, Get(path, right)).status, 200) << path;
  for (const auto& [path, body] : posts) EXPECT_EQ(Ask(s.port, Post(path, body, right)).status, 200) << path;
  const json e = Ask(s.port, Get("/v1/models")).json();
  EXPECT_EQ(e["error"]["type"], "authentication_error");
  EXPECT_EQ(e["error"]["code"], "invalid_api_key");
}

TEST(Api, KeysSeeNothingOfEachOther) {
  ServerOptions options;
  options.keys = ApiKeys::Create({"a", "b"}).value();
  FakeOptions fake;
  fake.step = 2ms;
  Running s(std::move(options), fake);
  const std::string a = "Authorization: Bearer a\r\n", b = "Authorization: Bearer b\r\n";
  const std::string document(1000, 'd');
  const std::string body = json({{"prompt", document}, {"max_tokens", 2}}).dump();
  EXPECT_EQ(Ask(s.port, Post(kComplete, body, a)).json()["usage"]["prompt_tokens_details"]["cached_tokens"],
            0);
  EXPECT_GT(Ask(s.port, Post(kComplete, body, a)).json()["usage"]["prompt_tokens_details"]["cached_tokens"],
            0);
  EXPECT_EQ(Ask(s.port, Post(kComplete, body, b)).json()["usage"]["prompt_tokens_details"]["cached_tokens"],
            0);
  Client running(s.port);
  running.Send(Post(kComplete, R"({"prompt":"x","max_tokens":4000,"stream":true})", a));
  ASSERT_TRUE(Eventually([&] { return Ask(s.port, Get("/slots", a)).json()[0].contains("kv"); }));
  const json seen = Ask(s.port, Get("/slots", b)).json()[0];
  EXPECT_TRUE(seen["is_processing"]);
  EXPECT_FALSE(seen.contains("kv") || seen.contains("prompt_tokens") || seen.contains("state"));
}

TEST(Api, LimitsHaveTheirErrors) {
  ServerOptions options;
  options.limits.body_bytes = 3000;
  options.limits.max_tokens = 50;
  options.limits.prompt_tokens = 500;
  options.limits.json_depth = 8;
  options.limits.stops = 2;
  options.limits.messages = 2;
  Running s(std::move(options));
  const auto error = [&](const char* path, const std::string& body) {
    const Reply r = Ask(s.port, Post(path, body));
    const json j = r.json();
    EXPECT_TRUE(j.is_object() && j["error"]["message"].is_string() && j["error"]["type"].is_string())
        << r.body;
    return std::pair(r.status, j["error"]["code"].is_null() ? "" : j["error"]["code"].get<std::string>());
  };
  using E = std::pair<int, std::string>;
  EXPECT_EQ(error(kComplete, json({{"prompt", std::string(4000, 'x')}}).dump()), E(413, "body_too_large"));
  EXPECT_EQ(error(kComplete, json({{"prompt", std::string(600, 'x')}}).dump()),
            E(400, "context_length_exceeded"));
  EXPECT_EQ(error(kComplete, R"({"prompt":"x","max_tokens":51})"), E(400, "out_of_range"));
  EXPECT_EQ(error(kComplete, R"({"prompt":"x","a":[[[[[[[[]]]]]]]]})"), E(400, "json_too_deep"));
  EXPECT_EQ(error(kComplete, R"({"prompt":"x","stop":["a","b","c"]})"), E(400, "too_many"));
  EXPECT_EQ(
      error(
          kChat,
          R"({"messages":[{"role":"user","content":"x"},{"role":"user","content":"x"},{"role":"user","content":"x"}]})"),
      E(400, "too_many"));
  EXPECT_EQ(error(kComplete, "{"), E(400, "invalid_json"));
  EXPECT_EQ(error("/nothing", "{}"), E(404, "unknown_path"));
  EXPECT_EQ(error("/v1/models", "{}").first, 405);
  const Reply type =
      Ask(s.port, "POST /v1/completions HTTP/1.1\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}");
  EXPECT_EQ(type.status, 415);
  EXPECT_TRUE(type.json()["error"].is_object());
  // The default of max_tokens is held to the limit, too.
  EXPECT_EQ(Ask(s.port, Post(kComplete, R"({"prompt":"x"})")).json()["usage"]["completion_tokens"], 50);
}

TEST(Api, AFullQueueIs429) {
  ServerOptions options;
  options.scheduler.slots = 1;
  options.limits.queue = 1;
  FakeOptions fake;
  fake.step = 2ms;
  Running s(std::move(options), fake);
  const std::string body = R"({"prompt":"x","max_tokens":4000,"stream":true})";
  Client one(s.port), two(s.port);
  one.Send(Post(kComplete, body));
  ASSERT_TRUE(Eventually([&] { return s.server.gauges().slots_busy == 1; }));
  two.Send(Post(kComplete, body));
  ASSERT_TRUE(Eventually([&] { return s.server.gauges().queued == 1; }));
  const Reply r = Ask(s.port, Post(kComplete, body));
  EXPECT_EQ(r.status, 429);
  EXPECT_NE(r.head.find("Retry-After: "), std::string::npos);
  EXPECT_EQ(r.json()["error"]["type"], "rate_limit_error");
}

TEST(Api, AClientThatLeavesFreesItsSlot) {
  FakeOptions fake;
  fake.step = 1ms;
  fake.prefill_block = 1ms;
  ServerOptions options;
  options.scheduler.slots = 3;
  Running s(std::move(options), fake);
  const auto idle = [&] {
    const Gauges g = s.server.gauges();
    return g.slots_busy == 0 && g.queued == 0 && g.connections == 0;
  };
  const std::string slow_prompt = std::string(3900, 'p');
  for (const bool stream : {false, true}) {
    for (const std::string& prompt : {std::string("x"), slow_prompt}) {
      std::vector<std::unique_ptr<Client>> clients;
      for (int i = 0; i < 8; ++i) {
        clients.push_back(std::make_unique<Client>(s.port));
        clients.back()->Send(
            Post(kComplete, json({{"prompt", prompt}, {"max_tokens", 4000}, {"stream", stream}}).dump()));
      }
      ASSERT_TRUE(
          Eventually([&] { return s.server.gauges().slots_busy > 0 && s.server.gauges().queued > 0; }));
      clients.clear();
      EXPECT_TRUE(Eventually(idle, 2)) << stream << prompt.size();
    }
  }
}

TEST(Api, ErrorsOfTheEngineReachTheClient) {
  Running s;
  s.backend->fail_decode = true;
  Reply r = Ask(s.port, Post(kComplete, R"({"prompt":"x"})"));
  EXPECT_EQ(r.status, 500);
  EXPECT_EQ(r.json()["error"]["type"], "server_error");
  r = Ask(s.port, Post(kComplete, R"({"prompt":"x","stream":true})"));
  // The first token was on its way already.
  const auto events = Events(r.body);
  EXPECT_TRUE(r.status == 500 || events.back().contains("error")) << r.body;
}

TEST(Api, DrainFinishesAnswersAndRefusesNewOnes) {
  FakeOptions fake;
  fake.step = 2ms;
  auto s = std::make_unique<Running>(ServerOptions{}, fake);
  Client c(s->port);
  c.Send(Post(kComplete, R"({"prompt":"x","max_tokens":200})"));
  ASSERT_TRUE(Eventually([&] { return s->server.gauges().slots_busy == 1; }));
  const int port = s->port;
  std::thread drain([&] { s->server.Drain(10s); });
  EXPECT_TRUE(Eventually([&] { return !Client(port).connected(); }));
  const Reply r = ParseReply(c.ReadAll());
  EXPECT_EQ(r.status, 200);
  EXPECT_EQ(r.json()["usage"]["completion_tokens"], 200);
  drain.join();
}

// A small storm here; the large one is tests/soak/hostile.mjs.
TEST(Api, HostileRequestsGetAnErrorOrAnAnswer) {
  ServerOptions options;
  options.limits.header_seconds = options.limits.body_seconds = options.limits.idle_seconds = 0.2;
  Running s(std::move(options));
  std::mt19937_64 random(11);
  const std::vector<std::string> values = {"null",
                                           "-1",
                                           "0",
                                           "1e308",
                                           "-1e308",
                                           "9223372036854775807",
                                           "18446744073709551616",
                                           "\"\"",
                                           "\"\\u0000\"",
                                           "\"\\ud800\"",
                                           "\"\xff\"",
                                           "[]",
                                           "{}",
                                           "[[[[]]]]",
                                           "true",
                                           "NaN",
                                           "",
                                           "\"" + std::string(5000, 'A') + "\""};
  const std::vector<std::string> fields = {"prompt",
                                           "messages",
                                           "max_tokens",
                                           "temperature",
                                           "top_p",
                                           "top_k",
                                           "min_p",
                                           "seed",
                                           "stop",
                                           "stream",
                                           "stream_options",
                                           "logprobs",
                                           "top_logprobs",
                                           "n",
                                           "logit_bias",
                                           "frequency_penalty",
                                           "presence_penalty",
                                           "echo",
                                           "suffix",
                                           "tokens",
                                           "content",
                                           "model",
                                           "response_format",
                                           "tools",
                                           "cache_prompt"};
  int requests = 0;
  for (const char* path : {kChat, kComplete, "/tokenize", "/detokenize"}) {
    for (const std::string& field : fields) {
      for (const std::string& value : values) {
        std::string body =
            std::string(
                R"({"max_tokens":2,"prompt":"x","messages":[{"role":"user","content":"x"}],"content":"x","tokens":[1],")") +
            field + "\":" + value + "}";
        if (random() % 8 == 0) body.resize(1 + random() % (body.size() - 1));
        if (random() % 8 == 0) body[random() % body.size()] = static_cast<char>(random());
        std::string request = Post(path, body);
        if (random() % 40 == 0) request.resize(1 + random() % (request.size() - 1));
        if (random() % 16 == 0) request[random() % request.size()] = static_cast<char>(random());
        const Reply r = Ask(s.port, request);
        ++requests;
        if (r.status == 0) continue;  // closed without an answer: never a whole request
        EXPECT_TRUE(r.status == 200 || (r.status >= 400 && r.status < 500) || r.status == 501 ||
                    r.status == 505)
            << r.status << " " << request;
        if (r.body.starts_with('{')) {
          EXPECT_FALSE(r.json().is_discarded()) << r.body;
        }
      }
    }
  }
  EXPECT_EQ(requests, 4 * std::ssize(fields) * std::ssize(values));
  EXPECT_EQ(Ask(s.port, Get("/health")).status, 200);
}

}  // namespace
}  // namespace moend::serve
