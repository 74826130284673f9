// Tools, thoughts, schemas and grammars in chats: what is asked is told to the model, what it writes is told
// apart, and what it may not write it does not.
#include <gtest/gtest.h>

#include <random>

#include "moend/model/chat_fallback.h"
#include "moend/serve/answer_reader.h"
#include "moend/serve/engine_backend.h"
#include "moend/serve/request.h"
#include "tests/support/serve_client.h"
#include "tests/support/test_model.h"

namespace moend::serve {
namespace {

using nlohmann::json;
using test::Ask;
using test::Events;
using test::kChat;
using test::kComplete;
using test::Post;
using test::Reply;
using test::Running;

constexpr const char* kTools =
    R"([{"type":"function","function":{"name":"weather","description":"Weather of a place.","parameters":{"type":"object",
      "properties":{"place":{"type":"string","maxLength":12},"days":{"type":"integer","minimum":1,"maximum":9}},
      "required":["place","days"],"additionalProperties":false}}},
      {"type":"function","function":{"name":"clock"}}])";
// The fake answers what follows "echo:", up to a bar.
constexpr const char* kCall =
    R"(Let me see\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"place\": \"Oslo\", \"days\": 2}}\n</tool_call>)";

std::string ChatOf(const std::string& text, const std::string& more) {
  return R"({"messages":[{"role":"user","content":"echo:)" + text + R"(|"}],"temperature":0)" + more + "}";
}
std::string WithTools(const std::string& more = "") {
  return std::string(R"(,"tools":)") + kTools + more;
}

// What the parts of a streamed answer come to, as a whole one.
json Joined(const std::vector<json>& events) {
  json message = {{"content", nullptr}};
  for (const json& e : events) {
    if (!e.is_object() || e["choices"].empty()) continue;
    const json& delta = e["choices"][0]["delta"];
    for (const char* name : {"content", "reasoning_content"})
      if (delta.contains(name) && delta[name].is_string() && delta[name] != "")
        message[name] = (message.value(name, json()).is_string() ? message[name].get<std::string>() : "") +
                        delta[name].get<std::string>();
    for (const json& part : delta.value("tool_calls", json::array())) {
      json& calls = message["tool_calls"];
      const auto index = part["index"].get<std::size_t>();
      if (calls.size() <= index) {
        EXPECT_EQ(calls.size(), index);
        calls.push_back({{"id", part["id"]}, {"type", part["type"]}, {"function", part["function"]}});
      } else {
        EXPECT_FALSE(part.contains("id"));
        auto& arguments = calls[index]["function"]["arguments"];
        arguments = arguments.get<std::string>() + part["function"]["arguments"].get<std::string>();
      }
    }
    if (e["choices"][0]["finish_reason"].is_string()) message["reason"] = e["choices"][0]["finish_reason"];
  }
  return message;
}

TEST(Tools, ACallIsACallWholeAndInParts) {
  Running s;
  const Reply whole = Ask(s.port, Post(kChat, ChatOf(kCall, WithTools())));
  ASSERT_EQ(whole.status, 200) << whole.body;
  const json choice = whole.json()["choices"][0];
  EXPECT_EQ(choice["finish_reason"], "tool_calls");
  const json& call = choice["message"]["tool_calls"][0];
  EXPECT_TRUE(call["id"].get<std::string>().starts_with("call_"));
  EXPECT_EQ(call["type"], "function");
  EXPECT_EQ(call["function"]["name"], "weather");
  EXPECT_EQ(json::parse(call["function"]["arguments"].get<std::string>()),
            json({{"place", "Oslo"}, {"days", 2}}));
  EXPECT_NE(choice["message"]["content"].get<std::string>().find("Let me see"), std::string::npos);

  const Reply parts = Ask(s.port, Post(kChat, ChatOf(kCall, WithTools(R"(,"stream":true)"))));
  ASSERT_EQ(parts.status, 200) << parts.body;
  json joined = Joined(Events(parts.body));
  EXPECT_EQ(joined["reason"], "tool_calls");
  EXPECT_EQ(joined["content"], choice["message"]["content"]);
  EXPECT_EQ(joined["tool_calls"][0]["function"], call["function"]);
}

TEST(Tools, AnAnswerWithoutACallIsText) {
  Running s;
  for (const char* stream : {"false", "true"}) {
    const Reply r =
        Ask(s.port, Post(kChat, ChatOf("It is sunny", WithTools(std::string(R"(,"stream":)") + stream))));
    ASSERT_EQ(r.status, 200) << r.body;
    const json message = stream[0] == 't' ? Joined(Events(r.body)) : r.json()["choices"][0]["message"];
    EXPECT_EQ(message["content"], "It is sunny");
    EXPECT_FALSE(message.contains("tool_calls"));
  }
}

TEST(Tools, ACallThatIsCutShortIsNoCall) {
  Running s;
  const Reply r = Ask(s.port, Post(kChat, ChatOf(kCall, WithTools(R"(,"max_tokens":18)"))));
  ASSERT_EQ(r.status, 200) << r.body;
  EXPECT_EQ(r.json()["choices"][0]["finish_reason"], "length");
}

TEST(Tools, TheTurnsOfATool) {
  Running s;
  const std::string body = R"({"messages":[{"role":"user","content":"Oslo?"},
      {"role":"assistant","content":null,"reasoning_content":"hm","tool_calls":[{"id":"c1","type":"function",
        "function":{"name":"weather","arguments":"{\"place\":\"Oslo\",\"days\":1}"}}]},
      {"role":"tool","tool_call_id":"c1","content":"sun"},{"role":"user","content":"echo:sunny|"}],"temperature":0)" +
                           WithTools() + "}";
  const Reply r = Ask(s.port, Post(kChat, body));
  ASSERT_EQ(r.status, 200) << r.body;
  EXPECT_EQ(r.json()["choices"][0]["message"]["content"], "sunny");
  const auto parsed = ParseChatRequest(Json::parse(body), {}, {.sampler = {}, .n_vocab = 10});
  ASSERT_TRUE(parsed) << parsed.error().message;
  EXPECT_EQ(parsed->messages[2].name, "weather");  // as the call that it answers
  EXPECT_EQ(parsed->messages[1].tool_calls[0].arguments, R"({"place":"Oslo","days":1})");
  EXPECT_EQ(parsed->messages[1].reasoning_content, "hm");
}

TEST(Tools, WhatIsWrongIsNamed) {
  Running s;
  const std::pair<std::string, std::string> cases[] = {
      {R"(,"tools":7)", "tools"},
      {R"(,"tools":[{"type":"web_search"}])", "tools[0].type"},
      {R"(,"tools":[{"type":"function"}])", "tools[0].function"},
      {R"(,"tools":[{"function":{"name":""}}])", "tools[0].function.name"},
      {R"(,"tools":[{"function":{"name":"a"}},{"function":{"name":"a"}}])", "tools[1].function.name"},
      {R"(,"tools":[{"function":{"name":"a","parameters":[]}}])", "tools[0].function.parameters"},
      {R"(,"tool_choice":"required")", "tool_choice"},
      {R"(,"tool_choice":"any")", "tool_choice"},
      {WithTools(R"(,"tool_choice":{"type":"function","function":{"name":"none"}})"), "tool_choice"},
      {WithTools(R"(,"grammar":"root ::= \"a\"")"), "grammar"},
      {R"(,"grammar":"root ::= \"a\"","json_schema":{"type":"object"})", "grammar"},
      {R"(,"response_format":{"type":"json_schema","json_schema":{"name":"x"}})",
       "response_format.json_schema"},
      {R"(,"response_format":{"type":"json_schema","json_schema":{"schema":1}})",
       "response_format.json_schema.schema"},
  };
  for (const auto& [more, param] : cases) {
    const Reply r = Ask(s.port, Post(kChat, ChatOf("a", more)));
    EXPECT_EQ(r.status, 400) << more << r.body;
    EXPECT_EQ(r.json()["error"]["param"], param) << more;
  }
  const Reply broken =
      Ask(s.port, Post(kChat, R"({"messages":[{"role":"assistant","content":null,"tool_calls":[
      {"id":"a","type":"function","function":{"name":"f","arguments":"{"}}]}]})"));
  EXPECT_EQ(broken.json()["error"]["param"], "messages[0].tool_calls[0].function.arguments");
  // Deeper than a stack.
  std::string deep(300000, '[');
  deep = R"({\"a\":)" + deep + std::string(300000, ']') + "}";
  const Reply call = Ask(s.port, Post(kChat, R"({"messages":[{"role":"assistant","content":null,"tool_calls":[
      {"id":"a","function":{"name":"f","arguments":")" +
                                                 deep + R"("}}]}]})"));
  EXPECT_EQ(call.status, 400);
  const Reply schema = Ask(s.port, Post(kComplete, R"({"prompt":"a","guided_json":")" + deep + R"("})"));
  EXPECT_EQ(schema.json()["error"]["param"], "guided_json");
  const Reply none = Ask(s.port, Post(kComplete, R"({"prompt":"a","grammar":"no grammar"})"));
  EXPECT_EQ(none.status, 400) << none.body;
}

TEST(Tools, AGrammarIsObeyed) {
  Running s;
  for (const char* more : {"", R"(,"ignore_eos":true)", R"(,"min_tokens":20)", R"(,"temperature":1.5)"}) {
    const Reply r = Ask(
        s.port, Post(kComplete, std::string(R"({"prompt":"x","max_tokens":30,"grammar":"root ::= \"yes\"")") +
                                    more + "}"));
    ASSERT_EQ(r.status, 200) << r.body;
    EXPECT_EQ(r.json()["choices"][0]["text"], "yes") << more;
    EXPECT_EQ(r.json()["choices"][0]["finish_reason"], "stop");
  }
}

// What of a function's parameters cannot be held to is told to the model, and no more.
TEST(Tools, ParametersThatCannotBeHeldToAreNoError) {
  Running s;
  for (const char* parameters :
       {R"({"type":"object","properties":{"a":{"$ref":"#"},"b":{"$ref":"#/none"},"c":{"not":{}}}})",
        R"({"$ref":"http://example.org/x"})", R"({"type":"object","properties":{"a":{"pattern":"^\\b"}}})",
        "{}"}) {
    const std::string tools =
        fmt::format(R"(,"tools":[{{"function":{{"name":"f","parameters":{}}}}}])", parameters);
    const Reply r = Ask(s.port, Post(kChat, ChatOf("hello", tools)));
    EXPECT_EQ(r.status, 200) << parameters << r.body;
  }
}

TEST(Json, AnObjectOfManyFieldsIsRefused) {
  Running s;
  std::string body = R"({"prompt":"x","logit_bias":{)";
  for (int i = 0; i < 100000; ++i) body += fmt::format("{}\"{}\":1", i ? "," : "", i);
  const Reply r = Ask(s.port, Post(kComplete, body + "}}"));
  EXPECT_EQ(r.status, 400);
  EXPECT_EQ(r.json()["error"]["code"], "json_too_large");
}

// A format with thoughts and calls.
AnswerFormat Thoughtful() {
  static const SpecialTokens kNone;
  const ChatTemplate templ(FallbackTemplate(Thinking::kOptional), "", "", kNone);
  const ChatMessage hello{"user", "Hello"};
  auto prompt = templ.Prepare({&hello, 1}, {.tools = kTools});
  EXPECT_TRUE(prompt) << prompt.error().message;
  return std::move(prompt->format);
}

struct Collected {
  std::string reasoning, content;
  std::vector<ToolCall> calls;
  void Add(const AnswerDelta& d) {
    reasoning += d.reasoning;
    content += d.content;
    for (const AnswerDelta::Call& c : d.calls) {
      if (!c.name.empty()) {
        ASSERT_EQ(c.index, calls.size());
        calls.push_back({c.id, c.name, {}});
      }
      ASSERT_LT(c.index, calls.size());
      calls[c.index].arguments += c.arguments;
    }
  }
};

TEST(AnswerReader, PartsMakeTheWhole) {
  const AnswerFormat format = Thoughtful();
  const std::string texts[] = {
      "<think>\nWell <then>\n</think>\n\nIt is fine. 1 < 2",
      "<think>\nHm\n</think>\n\n<tool_call>\n{\"name\": \"clock\", \"arguments\": {}}\n</tool_call>",
      "Look:\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"place\": \"A\\\"}\", \"days\": "
      "3}}\n</tool_call>",
      "",
  };
  std::mt19937 random(5);
  for (const std::string& text : texts) {
    auto whole = AnswerReader::Make(format).value();
    Collected all;
    all.Add(whole->Push(text));
    all.Add(whole->Finish(false));
    for (int round = 0; round < 5; ++round) {
      auto reader = AnswerReader::Make(format).value();
      Collected c;
      for (std::size_t at = 0; at < text.size();) {
        const std::size_t n = round == 0 ? 1 : 1 + random() % 9;
        c.Add(reader->Push(text.substr(at, n)));
        at += n;
      }
      c.Add(reader->Finish(false));
      EXPECT_EQ(c.reasoning, all.reasoning) << text;
      EXPECT_EQ(c.content, all.content) << text;
      ASSERT_EQ(c.calls.size(), all.calls.size()) << text;
      for (std::size_t i = 0; i < c.calls.size(); ++i) {
        EXPECT_EQ(c.calls[i].name, all.calls[i].name);
        EXPECT_EQ(json::parse(c.calls[i].arguments), json::parse(all.calls[i].arguments));
      }
    }
  }
  auto reader = AnswerReader::Make(format).value();
  Collected c;
  c.Add(reader->Push(texts[0]));
  c.Add(reader->Finish(false));
  EXPECT_TRUE(c.reasoning.starts_with("Well <then>")) << c.reasoning;
  EXPECT_EQ(c.content, "It is fine. 1 < 2");
}

TEST(AnswerReader, PartsOfACallBecomeOne) {
  AnswerDelta d{.content = "a", .calls = {{.index = 0, .id = "i", .name = "f", .arguments = "{"}}};
  d.Append(
      {.reasoning = "r",
       .content = "b",
       .calls = {{.index = 0, .arguments = "}"}, {.index = 1, .id = "j", .name = "g", .arguments = "{}"}}});
  EXPECT_EQ(d.content, "ab");
  EXPECT_EQ(d.reasoning, "r");
  ASSERT_EQ(d.calls.size(), 2u);
  EXPECT_EQ(d.calls[0].name, "f");
  EXPECT_EQ(d.calls[0].arguments, "{}");
  EXPECT_EQ(d.calls[1].name, "g");
}

// Whatever was written, nothing of it is lost without a word.
TEST(AnswerReader, WhatIsNotOfTheFormatIsText) {
  const AnswerFormat format = Thoughtful();
  for (const std::string text : {"<tool_call>\n{\"name\": \"nobody\", \"arguments\": {}}\n</tool_call>",
                                 "<tool_call>\n{\"name\": \"weather\", \"arg", "</think> what"}) {
    for (const bool cut : {false, true}) {
      auto reader = AnswerReader::Make(format).value();
      Collected c;
      c.Add(reader->Push(text));
      c.Add(reader->Finish(cut));
      EXPECT_FALSE(c.content.empty() && c.calls.empty() && c.reasoning.empty()) << text;
    }
  }
}

// A model that knows nothing, held to formats: what it says fits all the same.
TEST(Tools, ARandomModelCallsWhatItMust) {
  moend::test::TempDir dir;
  moend::test::TestModelOptions options;
  options.chat_template = true;
  options.n_layers = 1;
  ASSERT_TRUE(moend::test::WriteTestModel(options, dir / "m.gguf"));
  const auto model = Model::Load(dir / "m.gguf").value();
  const auto engine = Engine::Create(model, {.n_threads = 1}).value();
  EngineBackendOptions of_engine;
  of_engine.plan = FullPlan(engine->fingerprint(), 2048);
  of_engine.n_ctx = 2048;
  auto backend = MakeEngineBackend(engine, of_engine);
  ASSERT_TRUE(backend) << backend.error().message;
  ServerOptions of_server;
  of_server.port = 0;
  Server server(of_server, Log());
  const int port = server.Start().value();
  server.Serve(std::move(*backend), nullptr);
  // Letters that end what was begun are likely, so that texts do not go on and on.
  const std::string bias = fmt::format(R"(,"logit_bias":{{"{}":6}},"max_tokens":400,"temperature":1)",
                                       model->tokenizer().Tokenize("\"", false, false).value()[0]);
  for (int seed = 0; seed < 6; ++seed) {
    const std::string more = bias + fmt::format(R"(,"seed":{},"stream":{})", seed, seed % 2 == 1);
    const auto ask = [&](const std::string& fields) {
      const Reply r =
          Ask(port, Post(kChat, R"({"messages":[{"role":"user","content":"Oslo?"}])" + more + fields + "}"));
      EXPECT_EQ(r.status, 200) << r.body;
      if (seed % 2 == 1) return Joined(Events(r.body));
      json message = r.json()["choices"][0]["message"];
      message["reason"] = r.json()["choices"][0]["finish_reason"];
      return message;
    };
    const json called = ask(WithTools(R"(,"tool_choice":{"type":"function","function":{"name":"weather"}})"));
    if (called["reason"] != "length") {
      ASSERT_EQ(called["reason"], "tool_calls") << called;
      for (const json& call : called["tool_calls"]) {
        EXPECT_EQ(call["function"]["name"], "weather");
        const json a = json::parse(call["function"]["arguments"].get<std::string>());
        EXPECT_EQ(a.size(), 2u);
        EXPECT_TRUE(a["place"].is_string() && a["days"] >= 1 && a["days"] <= 9) << a;
      }
    }
    const json form =
        ask(R"(,"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{"type":"object",
        "properties":{"z":{"type":"boolean"},"a":{"enum":["p","q"]}},"required":["z","a"],"additionalProperties":false}}})");
    ASSERT_EQ(form["reason"], "stop") << form;
    const std::string text = form["content"];
    const json parsed = json::parse(text);
    EXPECT_TRUE(parsed["z"].is_boolean() && (parsed["a"] == "p" || parsed["a"] == "q")) << text;
    EXPECT_LT(text.find("\"z\""), text.find("\"a\""));  // in the schema's order
  }
  server.Drain(std::chrono::seconds(5));
}

}  // namespace
}  // namespace moend::serve
