// Reading untrusted bodies: limits on their shape, and every field's type and range.
#include <gtest/gtest.h>

#include "moend/serve/request.h"

namespace moend::serve {
namespace {

const Limits kUsualLimits;
const RequestDefaults kUsualDefaults{.sampler = {}, .n_vocab = 1000};

Json Object(const std::string& text) {
  return ParseBody(text, kUsualLimits).value();
}

ApiError CompletionError(const std::string& text) {
  auto r = ParseCompletionRequest(Object(text), kUsualLimits, kUsualDefaults);
  EXPECT_FALSE(r) << text;
  return r ? ApiError{} : r.error();
}

ApiError ChatError(const std::string& text) {
  auto r = ParseChatRequest(Object(text), kUsualLimits, kUsualDefaults);
  EXPECT_FALSE(r) << text;
  return r ? ApiError{} : r.error();
}

TEST(Requests, TemplateVariablesAndSpecialTokens) {
  const auto chat = ParseChatRequest(
      Object(
          R"({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"enable_thinking": false}})"),
      kUsualLimits, kUsualDefaults);
  ASSERT_TRUE(chat);
  EXPECT_EQ(chat->template_variables, Json::parse(R"({"enable_thinking":false})"));
  EXPECT_EQ(
      ChatError(R"({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": [1]})").param,
      "chat_template_kwargs");
  EXPECT_TRUE(
      ParseCompletionRequest(Object(R"({"prompt": "a"})"), kUsualLimits, kUsualDefaults)->parse_special);
  EXPECT_FALSE(ParseCompletionRequest(Object(R"({"prompt": "a", "parse_special": false})"), kUsualLimits,
                                      kUsualDefaults)
                   ->parse_special);
  EXPECT_EQ(CompletionError(R"({"prompt": "a", "parse_special": 1})").param, "parse_special");
}

TEST(ParseBody, TakesObjectsOnly) {
  EXPECT_TRUE(ParseBody(R"({"a": [1, {"b": "]}"}]})", kUsualLimits));
  for (const char* bad : {"", "null", "[]", "1", "{", "{\"a\":}", "{} {}", "{\"a\":1,}", "{'a':1}", "\"{}\"",
                          "{\"a\":\"\xff\"}", "{\"a\":\"\xed\xa0\x80\"}", "{\"a\":\"\xc0\x80\"}",
                          "{\"a\":1e999}", "{\"a\":NaN}", "{\"a\":\"\\ud800\"}"}) {
    const auto r = ParseBody(bad, kUsualLimits);
    ASSERT_FALSE(r) << bad;
    EXPECT_EQ(r.error().status, 400) << bad;
  }
}

TEST(ParseBody, SaysWhereItStopsBeingJson) {
  const auto message = [](const char* body) { return ParseBody(body, kUsualLimits).error().message; };
  EXPECT_NE(message("").find("empty"), std::string::npos);
  EXPECT_NE(message("{\"a\":1,}").find("see line 1, column 8"), std::string::npos) << message("{\"a\":1,}");
  EXPECT_NE(message("{\n \"a\":\"\xff\"}").find("see line 2, column 7"), std::string::npos);
  EXPECT_NE(message("{\"a\":1").find("it ends at line 1, column 6"), std::string::npos)
      << message("{\"a\":1");
  EXPECT_NE(message("{} {}").find("see line 1, column 4"), std::string::npos) << message("{} {}");
  EXPECT_NE(message("{\"a\":1e999}").find("see line 1, column"), std::string::npos);
}

TEST(ParseBody, BoundsDepthBeforeParsing) {
  const auto nested = [](int64_t depth) {
    return "{\"a\":" + std::string(static_cast<std::size_t>(depth - 1), '[') +
           std::string(static_cast<std::size_t>(depth - 1), ']') + "}";
  };
  EXPECT_TRUE(ParseBody(nested(kUsualLimits.json_depth), kUsualLimits));
  for (const int64_t depth :
       {kUsualLimits.json_depth + 1, int64_t{64}, int64_t{65}, int64_t{1000}, int64_t{1000000}}) {
    const auto r = ParseBody(nested(depth), kUsualLimits);
    ASSERT_FALSE(r) << depth;
    EXPECT_EQ(r.error().code, "json_too_deep");
  }
  // Brackets in strings, also behind escapes, are text.
  EXPECT_TRUE(ParseBody("{\"a\":\"\\\"" + std::string(1000, '[') + "\"}", kUsualLimits));
}

TEST(ParseBody, BoundsSizeAndNumberOfValues) {
  Limits small;
  small.body_bytes = 10;
  EXPECT_EQ(ParseBody(R"({"a":12345678})", small).error().status, 413);
  small = {};
  small.json_values = 5;
  EXPECT_TRUE(ParseBody(R"({"a":[1,2,3,4]})", small));
  EXPECT_EQ(ParseBody(R"({"a":[1,2,3,4,5]})", small).error().code, "json_too_large");
  EXPECT_EQ(ParseBody(R"({"a":[[],[],[],[]]})", small).error().code, "json_too_large");
}

TEST(Completion, ReadsEveryField) {
  const auto r = ParseCompletionRequest(
      Object(
          R"({"model":"any","prompt":"hello","max_tokens":7,"temperature":0.5,"top_p":0.25,"top_k":3,"min_p":0.125,
                 "seed":-2,"stop":["a","bc"],"stream":true,"stream_options":{"include_usage":true},"logprobs":2,
                 "frequency_penalty":0.5,"presence_penalty":-1,"logit_bias":{"12":-100,"999":5.5},"n":1,"user":"me",
                 "cache_prompt":false,"echo":false,"suffix":null,"best_of":1})"),
      kUsualLimits, kUsualDefaults);
  ASSERT_TRUE(r) << r.error().message;
  EXPECT_FALSE(r->chat);
  EXPECT_EQ(r->prompt, "hello");
  EXPECT_EQ(r->max_tokens, 7);
  EXPECT_EQ(r->pick.sampler.temperature, 0.5f);
  EXPECT_EQ(r->pick.sampler.top_p, 0.25f);
  EXPECT_EQ(r->pick.sampler.top_k, 3);
  EXPECT_EQ(r->pick.sampler.min_p, 0.125f);
  EXPECT_EQ(r->pick.sampler.seed, UINT64_MAX - 1);
  EXPECT_EQ(r->stop, (std::vector<std::string>{"a", "bc"}));
  EXPECT_TRUE(r->stream && r->include_usage);
  EXPECT_EQ(r->pick.top_logprobs, 2);
  EXPECT_EQ(r->pick.frequency_penalty, 0.5);
  EXPECT_EQ(r->pick.presence_penalty, -1);
  ASSERT_EQ(r->pick.logit_bias.size(), 2u);
  EXPECT_EQ(r->pick.logit_bias[0], (std::pair<int32_t, float>(12, -100.0f)));
  EXPECT_FALSE(r->cache_prompt);
}

TEST(Completion, DefaultsAndForms) {
  auto r = ParseCompletionRequest(Object(R"({"prompt":["x"]})"), kUsualLimits, kUsualDefaults);
  ASSERT_TRUE(r);
  EXPECT_EQ(r->prompt, "x");
  EXPECT_EQ(r->max_tokens, -1);
  EXPECT_EQ(r->pick.top_logprobs, -1);
  EXPECT_TRUE(r->stop.empty() && !r->stream && r->cache_prompt);
  r = ParseCompletionRequest(Object(R"({"prompt":[1,2,999]})"), kUsualLimits, kUsualDefaults);
  ASSERT_TRUE(r);
  EXPECT_EQ(r->prompt_tokens, (std::vector<int32_t>{1, 2, 999}));
  r = ParseCompletionRequest(Object(R"({"prompt":[[5]],"stop":"x","max_tokens":16.0})"), kUsualLimits,
                             kUsualDefaults);
  ASSERT_TRUE(r);
  EXPECT_EQ(r->prompt_tokens, (std::vector<int32_t>{5}));
  EXPECT_EQ(r->stop, (std::vector<std::string>{"x"}));
  EXPECT_EQ(r->max_tokens, 16);
}

TEST(Completion, TwoRequestsWithoutSeedDiffer) {
  const auto seed = [] {
    return ParseCompletionRequest(Object(R"({"prompt":"x"})"), kUsualLimits, kUsualDefaults)
        ->pick.sampler.seed;
  };
  EXPECT_NE(seed(), seed());
  // -1 is llama.cpp's word for a random one.
  const auto minus_one = [] {
    return ParseCompletionRequest(Object(R"({"prompt":"x","seed":-1})"), kUsualLimits, kUsualDefaults)
        ->pick.sampler.seed;
  };
  EXPECT_NE(minus_one(), minus_one());
}

// Each field with values of every wrong kind: an error that names the field, never anything else.
TEST(Completion, RefusesHostileValues) {
  const std::vector<std::string> numbers = {
      "-1", "-9223372036854775808", "9223372036854775807", "18446744073709551615", "1e308", "-1e308", "1.5",
      "0"};
  const std::vector<std::string> others = {"\"x\"", "[]", "{}", "true", "[[[]]]", "[null]", "{\"a\":1}"};
  const auto refused = [](const std::string& field, const std::string& value) {
    const std::string body = field == "prompt" ? "{\"prompt\":" + value + "}"
                                               : "{\"prompt\":\"p\",\"" + field + "\":" + value + "}";
    const auto r = ParseCompletionRequest(Object(body), kUsualLimits, kUsualDefaults);
    if (r) return false;
    EXPECT_EQ(r.error().status, 400) << body;
    EXPECT_TRUE(r.error().param.starts_with(field)) << body << " -> " << r.error().param;
    EXPECT_FALSE(r.error().message.empty());
    return true;
  };
  for (const std::string field : {"max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n",
                                  "logprobs", "frequency_penalty", "presence_penalty", "best_of"}) {
    for (const std::string& v : others) {
      EXPECT_TRUE(refused(field, v)) << field << " " << v;
    }
    EXPECT_TRUE(refused(field, "1e308")) << field;
    EXPECT_TRUE(refused(field, "18446744073709551615")) << field;
    EXPECT_TRUE(field == "seed" || refused(field, "9223372036854775807")) << field;
    for (const std::string& v : numbers) refused(field, v);  // checks the error's shape
  }
  for (const std::string field : {"stream", "cache_prompt", "kv_layers", "echo"})
    for (const std::string v : {"1", "\"true\"", "{}", "[1]"})
      EXPECT_TRUE(refused(field, v)) << field << " " << v;
  for (const std::string v : {"1", "true", "{}", "[1]", "[null]", "[\"\"]", "\"\"", "[[\"a\"]]"})
    EXPECT_TRUE(refused("stop", v)) << v;
  for (const std::string v : {"1", "\"a\"", "[1]", "{\"a\":1}", "{\"-1\":1}", "{\"1000\":1}", "{\"1\":\"x\"}",
                              "{\"1\":101}", "{\"99999999999999999999\":1}", "{\" 1\":1}", "{\"\":1}"})
    EXPECT_TRUE(refused("logit_bias", v)) << v;
  for (const std::string v : {"null", "1", "true", "{}", "[]", "[\"a\",\"b\"]", "[-1]", "[1000]", "[1.5]",
                              "[1,\"a\"]", "[[1],[2]]", "[18446744073709551615]", "[[[1]]]"})
    EXPECT_TRUE(refused("prompt", v)) << v;
  EXPECT_TRUE(refused("suffix", "\"tail\""));
  EXPECT_TRUE(refused("n", "2"));
}

TEST(Completion, BoundsStopsAndTokens) {
  Limits limits;
  limits.max_tokens = 100;
  limits.stops = 2;
  limits.stop_bytes = 4;
  limits.logit_bias = 1;
  const auto parse = [&](const char* body) {
    return ParseCompletionRequest(Object(body), limits, kUsualDefaults);
  };
  EXPECT_TRUE(parse(R"({"prompt":"p","max_tokens":100,"stop":["abcd","b"],"logit_bias":{"1":1}})"));
  EXPECT_EQ(parse(R"({"prompt":"p","max_tokens":101})").error().param, "max_tokens");
  EXPECT_EQ(parse(R"({"prompt":"p","max_completion_tokens":101})").error().param, "max_completion_tokens");
  EXPECT_EQ(parse(R"({"prompt":"p","max_tokens":0})").error().param, "max_tokens");
  EXPECT_EQ(parse(R"({"prompt":"p","stop":["a","b","c"]})").error().code, "too_many");
  EXPECT_EQ(parse(R"({"prompt":"p","stop":"abcde"})").error().code, "too_long");
  EXPECT_EQ(parse(R"({"prompt":"p","logit_bias":{"1":1,"2":1}})").error().code, "too_many");
}

TEST(Chat, ReadsMessages) {
  const auto r = ParseChatRequest(
      Object(
          R"({"messages":[{"role":"developer","content":"be brief"},{"role":"user","content":[{"type":"text","text":"a"},
                 {"type":"text","text":"b"}]},{"role":"assistant","content":"c","tool_calls":[]},{"role":"user","content":""}],
                 "logprobs":true,"top_logprobs":5,"max_completion_tokens":9,"response_format":{"type":"text"},"tools":[]})"),
      kUsualLimits, kUsualDefaults);
  ASSERT_TRUE(r) << r.error().message;
  ASSERT_EQ(r->messages.size(), 4u);
  EXPECT_EQ(r->messages[0].role, "system");
  EXPECT_EQ(r->messages[1].content, "ab");
  EXPECT_EQ(r->messages[2].role, "assistant");
  EXPECT_EQ(r->max_tokens, 9);
  EXPECT_EQ(r->pick.top_logprobs, 5);
}

TEST(Chat, NamesTheMessageAtFault) {
  EXPECT_EQ(ChatError(R"({})").param, "messages");
  EXPECT_EQ(ChatError(R"({"messages":[]})").param, "messages");
  EXPECT_EQ(ChatError(R"({"messages":{}})").param, "messages");
  EXPECT_EQ(ChatError(R"({"messages":[1]})").param, "messages[0]");
  EXPECT_EQ(ChatError(R"({"messages":[{"content":"x"}]})").param, "messages[0].role");
  EXPECT_EQ(ChatError(R"({"messages":[{"role":"root","content":"x"}]})").param, "messages[0].role");
  EXPECT_EQ(ChatError(R"({"messages":[{"role":5,"content":"x"}]})").param, "messages[0].role");
  EXPECT_EQ(ChatError(R"({"messages":[{"role":"user"}]})").param, "messages[0].content");
  EXPECT_EQ(ChatError(R"({"messages":[{"role":"user","content":5}]})").param, "messages[0].content");
  EXPECT_EQ(ChatError(R"({"messages":[{"role":"user","content":[5]}]})").param, "messages[0].content");
  EXPECT_EQ(ChatError(R"({"messages":[{"role":"user","content":[{"type":"image_url"}]}]})").code,
            "unsupported");
  EXPECT_EQ(ChatError(R"({"messages":[{"role":"user","content":[{"type":"text","text":1}]}]})").code,
            "unsupported");
  EXPECT_EQ(
      ChatError(
          R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"a","tool_calls":[1]}]})")
          .param,
      "messages[1].tool_calls[0]");
  EXPECT_EQ(ChatError(R"({"messages":[{"role":"user","content":"x"}],"tools":[{}]})").param,
            "tools[0].function");
  EXPECT_EQ(
      ChatError(R"({"messages":[{"role":"user","content":"x"}],"response_format":{"type":"xml"}})").param,
      "response_format");
  EXPECT_EQ(ChatError(R"({"messages":[{"role":"user","content":"x"}],"response_format":7})").param,
            "response_format");
  EXPECT_EQ(ChatError(R"({"messages":[{"role":"user","content":"x"}],"top_logprobs":5})").param,
            "top_logprobs");
  EXPECT_EQ(
      ChatError(R"({"messages":[{"role":"user","content":"x"}],"logprobs":true,"top_logprobs":21})").param,
      "top_logprobs");
  EXPECT_EQ(ChatError(R"({"messages":[{"role":"user","content":"x"}],"stream_options":{}})").param,
            "stream_options");
  EXPECT_EQ(CompletionError(R"({"prompt":"x","stream":true,"stream_options":{"include_usage":1}})").param,
            "stream_options.include_usage");
}

TEST(Tokenize, ReadsBothNamesAndRefusesTheRest) {
  EXPECT_EQ(ParseTokenizeRequest(Object(R"({"content":"a","add_special":true,"with_pieces":true})"))->content,
            "a");
  EXPECT_EQ(ParseTokenizeRequest(Object(R"({"prompt":"b"})"))->content, "b");
  EXPECT_FALSE(ParseTokenizeRequest(Object(R"({})")));
  EXPECT_FALSE(ParseTokenizeRequest(Object(R"({"content":1})")));
  EXPECT_EQ(ParseDetokenizeRequest(Object(R"({"tokens":[1,2]})"), 3)->size(), 2u);
  for (const char* bad :
       {R"({})", R"({"tokens":1})", R"({"tokens":[3]})", R"({"tokens":[-1]})", R"({"tokens":["a"]})"})
    EXPECT_FALSE(ParseDetokenizeRequest(Object(bad), 3)) << bad;
}

TEST(ApiError, HasOpenAiShape) {
  const auto j = Json::parse(ToJson(BadField("n", "bad \xff bytes", "c")));
  EXPECT_EQ(j["error"]["type"], "invalid_request_error");
  EXPECT_EQ(j["error"]["param"], "n");
  EXPECT_EQ(j["error"]["code"], "c");
  EXPECT_EQ(j["error"]["message"], "bad \xef\xbf\xbd bytes");
  EXPECT_TRUE(Json::parse(ToJson({.status = 500}))["error"]["param"].is_null());
  EXPECT_EQ(FromError({ErrorCode::kTooLong, "m"}).code, "context_length_exceeded");
  EXPECT_EQ(FromError({ErrorCode::kInternal, "m"}).status, 500);
}

}  // namespace
}  // namespace moend::serve
