// The table of request fields: each row does what it says, and docs/serving.md says the same.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "moend/serve/request_fields.h"
#include "tests/support/process.h"

namespace moend::serve {
namespace {

const Limits kLimits;
const RequestDefaults kDefaults{.sampler = {}, .n_vocab = 1000};

using Request = GenerationRequest;

ApiResult<Request> Parse(bool chat, Json body) {
  if (chat && !body.contains("messages"))
    body["messages"] = Json::parse(R"([{"role":"user","content":"x"}])");
  if (!chat && !body.contains("prompt")) body["prompt"] = "x";
  return chat ? ParseChatRequest(body, kLimits, kDefaults) : ParseCompletionRequest(body, kLimits, kDefaults);
}

// What a field that works looks like, and how it shows in the request.
struct Works {
  const char* good;
  const char* bad;
  bool (*shows)(const Request&);
  const char* with = "{}";  // what else the body has
};

constexpr const char* kTwoTools =
    R"([{"type":"function","function":{"name":"f","parameters":{"type":"object"}}},{"type":"function","function":{"name":"g"}}])";
constexpr const char* kWithTools =
    R"({"tools":[{"type":"function","function":{"name":"f"}},{"function":{"name":"g"}}]})";

const std::map<std::string, Works> kBothRoutes = {
    {"model", {R"("any")", "1", [](const Request&) { return true; }}},
    {"stream", {"true", "1", [](const Request& r) { return r.stream; }}},
    {"stream_options",
     {R"({"include_usage":true})", "1", [](const Request& r) { return r.include_usage; },
      R"({"stream":true})"}},
    {"n_predict", {"7", "0", [](const Request& r) { return r.max_tokens == 7; }}},
    {"max_tokens", {"7", "-2", [](const Request& r) { return r.max_tokens == 7; }}},
    {"max_completion_tokens", {"-1", "0", [](const Request& r) { return r.max_tokens == kUnlimited; }}},
    {"temperature", {"0.5", "3", [](const Request& r) { return r.pick.sampler.temperature == 0.5f; }}},
    {"top_k", {"3", "-2", [](const Request& r) { return r.pick.sampler.top_k == 3; }}},
    {"typical_p", {"0.5", "2", [](const Request& r) { return r.pick.sampler.typical_p == 0.5f; }}},
    {"top_p", {"0.5", "2", [](const Request& r) { return r.pick.sampler.top_p == 0.5f; }}},
    {"min_p", {"0.5", "2", [](const Request& r) { return r.pick.sampler.min_p == 0.5f; }}},
    {"seed", {"5", "1.5", [](const Request& r) { return r.pick.sampler.seed == 5; }}},
    {"frequency_penalty", {"1", "3", [](const Request& r) { return r.pick.frequency_penalty == 1; }}},
    {"presence_penalty", {"1", "3", [](const Request& r) { return r.pick.presence_penalty == 1; }}},
    {"repetition_penalty",
     {"1.5", "0",
      [](const Request& r) { return r.pick.repeat_penalty == 1.5 && r.pick.repeat_last_n == -1; }}},
    {"repeat_penalty",
     {"1.5", "0",
      [](const Request& r) { return r.pick.repeat_penalty == 1.5 && r.pick.repeat_last_n == 64; }}},
    {"repeat_last_n", {"5", "-2", [](const Request& r) { return r.pick.repeat_last_n == 5; }}},
    {"logit_bias", {R"({"5":1})", "[]", [](const Request& r) { return r.pick.logit_bias.size() == 1; }}},
    {"stop", {R"("x")", "1", [](const Request& r) { return r.stop.size() == 1; }}},
    {"stop_token_ids",
     {"[5]", "[1000]", [](const Request& r) { return r.pick.stop_tokens == std::vector<int32_t>{5}; }}},
    {"ignore_eos", {"true", "1", [](const Request& r) { return r.pick.ignore_eos; }}},
    {"min_tokens", {"5", "-1", [](const Request& r) { return r.pick.min_tokens == 5; }}},
    {"n", {"1", "2", [](const Request&) { return true; }}},
    {"response_format",
     {R"({"type":"json_object"})", R"({"type":"yaml"})",
      [](const Request& r) { return r.json_schema == R"({"type":"object"})"; }}},
    {"json_schema",
     {R"({"b":1,"a":2})", "17", [](const Request& r) { return r.json_schema == R"({"b":1,"a":2})"; }}},
    {"guided_json",
     {R"("{\"b\":1}")", R"("{")", [](const Request& r) { return r.json_schema == R"({"b":1})"; }}},
    {"guided_choice",
     {R"(["yes","n\"o\n"])", R"(["a",1])",
      [](const Request& r) { return r.grammar == R"(root ::= "yes" | "n\"o\n")"; }}},
    {"grammar", {R"("root ::= \"a\"")", "1", [](const Request& r) { return r.grammar == "root ::= \"a\""; }}},
    {"guided_grammar",
     {R"("root ::= \"a\"")", "1", [](const Request& r) { return r.grammar == "root ::= \"a\""; }}},
    {"cache_prompt", {"false", "1", [](const Request& r) { return !r.cache_prompt; }}},
    {"kv_layers", {"true", "1", [](const Request& r) { return r.kv_layers; }}},
};
const std::map<std::string, Works> kChatOnly = {
    {"messages",
     {R"([{"role":"user","content":"hey"}])", "[]",
      [](const Request& r) { return r.messages[0].content == "hey"; }}},
    {"chat_template_kwargs",
     {R"({"a":1})", "[1]",
      [](const Request& r) { return r.template_variables == Json::parse(R"({"a":1})"); }}},
    {"tools", {kTwoTools, "{}", [](const Request& r) { return r.tools.size() == 2; }}},
    {"tool_choice",
     {R"({"type":"function","function":{"name":"g"}})", R"({"type":"function","function":{"name":"h"}})",
      [](const Request& r) { return r.tool_choice == ToolChoice::kRequired && r.tools.size() == 1; },
      kWithTools}},
    {"parallel_tool_calls", {"true", "1", [](const Request& r) { return r.parallel_tool_calls == true; }}},
    {"reasoning_effort",
     {R"("low")", R"("much")",
      [](const Request& r) { return r.template_variables["reasoning_effort"] == "low"; }}},
    {"enable_thinking",
     {"false", "1", [](const Request& r) { return r.template_variables["enable_thinking"] == false; }}},
    {"reasoning_format", {R"("none")", R"("xml")", [](const Request& r) { return !r.split_reasoning; }}},
    {"logprobs", {"true", "1", [](const Request& r) { return r.pick.top_logprobs == 0; }}},
    {"top_logprobs",
     {"3", "21", [](const Request& r) { return r.pick.top_logprobs == 3; }, R"({"logprobs":true})"}},
};
const std::map<std::string, Works> kCompletionOnly = {
    {"prompt", {R"("hey")", "1", [](const Request& r) { return r.prompt == "hey"; }}},
    {"parse_special", {"false", "1", [](const Request& r) { return !r.parse_special; }}},
    {"best_of", {"1", "2", [](const Request&) { return true; }}},
    {"logprobs", {"3", "true", [](const Request& r) { return r.pick.top_logprobs == 3; }}},
};

bool Of(const RequestField& f, bool chat) {
  return f.routes != (chat ? Routes::kCompletion : Routes::kChat);
}

class RequestFieldTable : public testing::TestWithParam<bool> {};

TEST_P(RequestFieldTable, WhatWorksWorks) {
  std::set<std::string> seen;
  for (const RequestField& f : RequestFields()) {
    if (f.use != Use::kWorks || !Of(f, GetParam())) continue;
    const auto& own = GetParam() ? kChatOnly : kCompletionOnly;
    const auto found = own.contains(f.name) ? own.find(f.name) : kBothRoutes.find(f.name);
    ASSERT_TRUE(found != own.end() && found != kBothRoutes.end()) << f.name << " works, but no test says how";
    const Works& w = found->second;
    seen.insert(f.name);
    Json body = Json::parse(w.with);
    body[f.name] = Json::parse(w.good);
    const auto good = Parse(GetParam(), body);
    ASSERT_TRUE(good) << f.name << ": " << good.error().message;
    EXPECT_TRUE(w.shows(*good)) << f.name;
    body[f.name] = Json::parse(w.bad);
    const auto bad = Parse(GetParam(), body);
    ASSERT_FALSE(bad) << f.name;
    EXPECT_EQ(bad.error().status, 400);
    EXPECT_EQ(bad.error().param, f.name);
  }
  EXPECT_EQ(seen.size(), kBothRoutes.size() + (GetParam() ? kChatOnly : kCompletionOnly).size());
}

TEST_P(RequestFieldTable, WhatIsRefusedIsRefusedUnlessItAsksForNothing) {
  for (const RequestField& f : RequestFields()) {
    if (f.use != Use::kRefused || !Of(f, GetParam())) continue;
    for (const char* value : {R"("something")", "17", R"({"a":1})", R"(["a"])", "1.5"}) {
      const auto r = Parse(GetParam(), {{f.name, Json::parse(value)}});
      ASSERT_FALSE(r) << f.name << " " << value;
      EXPECT_EQ(r.error().status, 400);
      EXPECT_EQ(r.error().param, f.name);
      EXPECT_NE(r.error().message.find(f.name), std::string::npos);
    }
    std::vector<Json> off = Json::parse(f.off);
    off.push_back(nullptr);
    off.push_back(Json::array());
    for (const Json& value : off) {
      Json body = {{f.name, value}};
      const auto r = Parse(GetParam(), body);
      EXPECT_TRUE(r) << f.name << " " << value << ": " << r.error().message;
    }
  }
}

TEST_P(RequestFieldTable, WhatIsIgnoredIsIgnored) {
  for (const RequestField& f : RequestFields()) {
    if (f.use != Use::kIgnored || !Of(f, GetParam())) continue;
    for (const char* value : {R"("x")", "1", "true", "{}", "[]", "null"})
      EXPECT_TRUE(Parse(GetParam(), {{f.name, Json::parse(value)}})) << f.name << " " << value;
  }
}

INSTANTIATE_TEST_SUITE_P(Routes, RequestFieldTable, testing::Bool(),
                         [](const auto& info) { return info.param ? "Chat" : "Completion"; });

TEST(RequestFields, HasOneRowARouteForEachField) {
  for (const bool chat : {false, true}) {
    std::set<std::string> names;
    for (const RequestField& f : RequestFields())
      if (Of(f, chat)) {
        EXPECT_TRUE(names.insert(f.name).second) << f.name;
      }
  }
}

// The fields of users' reports, and others that are easily taken for granted.
TEST(RequestFields, HasAnAnswerToWhatOthersUnderstand) {
  for (const char* name : {"response_format",
                           "tools",
                           "grammar",
                           "json_schema",
                           "guided_json",
                           "guided_choice",
                           "structured_outputs",
                           "chat_template_kwargs",
                           "reasoning_effort",
                           "chat_template",
                           "continue_final_message",
                           "add_generation_prompt",
                           "repeat_penalty",
                           "ignore_eos",
                           "min_tokens",
                           "stop_token_ids",
                           "n_predict",
                           "typical_p",
                           "mirostat",
                           "echo",
                           "suffix",
                           "n_probs",
                           "samplers",
                           "dry_multiplier",
                           "xtc_probability"})
    for (const bool chat : {false, true})
      EXPECT_TRUE(std::ranges::any_of(RequestFields(), [&](const RequestField& f) {
        return name == std::string(f.name) && Of(f, chat);
      })) << name;
}

// Under "### Fields" the documents list the fields by what becomes of them.
TEST(RequestFields, TheDocumentsSayTheSame) {
  const std::string text = moend::test::ReadAll(MOEND_SOURCE_DIR "/docs/serving.md");
  const auto part = [&](const std::string& from, const std::string& to) {
    const auto a = text.find(from), b = text.find(to, a + 1);
    EXPECT_NE(a, std::string::npos) << from;
    EXPECT_NE(b, std::string::npos) << to;
    return a == std::string::npos || b == std::string::npos ? std::string() : text.substr(a, b - a);
  };
  const std::map<Use, std::string> parts = {{Use::kWorks, part("**Works:**", "**Refused")},
                                            {Use::kRefused, part("**Refused", "**Ignored")},
                                            {Use::kIgnored, part("**Ignored", "\n\n")}};
  for (const RequestField& f : RequestFields())
    EXPECT_NE(parts.at(f.use).find(fmt::format("`{}`", f.name)), std::string::npos) << f.name;
}

}  // namespace
}  // namespace moend::serve
