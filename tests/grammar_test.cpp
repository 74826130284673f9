// Outputs that are held to grammars and JSON schemas, whatever the model would say.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>
#include <string>

#include "moend/engine/text_stream.h"
#include "moend/model/model.h"
#include "tests/support/test_model.h"

namespace moend::test {
namespace {

using Json = nlohmann::json;

class GrammarTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    dir_ = std::make_unique<TempDir>();
    TestModelOptions o;
    o.n_layers = 1;
    o.chat_template = true;
    ASSERT_TRUE(WriteTestModel(o, *dir_ / "model.gguf"));
    auto model = Model::Load(*dir_ / "model.gguf");
    ASSERT_TRUE(model) << model.error().message;
    model_ = *model;
  }
  static void TearDownTestSuite() {
    model_.reset();
    dir_.reset();
  }
  const Tokenizer& tokenizer() const { return model_->tokenizer(); }
  int64_t n_vocab() const { return model_->hparams().n_vocab; }

  // What a model without any sense writes. `closing` is the share of turns in which it prefers what ends
  // things.
  std::string Babble(Grammar& grammar, std::mt19937_64& random, double closing, int most = 400) {
    std::string text;
    TextStream stream;  // bytes that are no characters become U+FFFD, as in every answer
    for (int n = 0; n < most; ++n) {
      const auto allowed = grammar.AllowsOfAll();
      if (!allowed) {
        ADD_FAILURE() << allowed.error().message;
        return text;
      }
      std::vector<int32_t> could, ends;
      for (int32_t t = 0; t < n_vocab(); ++t) {
        if (!(*allowed)[static_cast<std::size_t>(t)]) continue;
        could.push_back(t);
        const std::string piece = tokenizer().Piece(t, true);
        if (tokenizer().IsEndOfGeneration(t) || piece == "\"" || piece == "}" || piece == "]")
          ends.push_back(t);
      }
      if (could.empty()) {
        ADD_FAILURE() << "nothing may follow " << text;
        return text;
      }
      const bool close = !ends.empty() && static_cast<double>(random() % 1000) < closing * 1000;
      const auto& from = close ? ends : could;
      const int32_t token = from[random() % from.size()];
      const auto one = grammar.Allows(std::span(&token, 1));
      EXPECT_TRUE(one && (*one)[0]);
      if (tokenizer().IsEndOfGeneration(token)) return text + stream.Finish();
      grammar.Accept(token);
      text += stream.Push(tokenizer().Piece(token, true));
    }
    return "...";
  }

  Expected<std::unique_ptr<Grammar>> OfSchema(const std::string& schema) {
    MOEND_ASSIGN(const GrammarSource source, tokenizer().SchemaGrammar(schema));
    return tokenizer().MakeGrammar(source);
  }
  std::string ErrorOf(const std::string& gbnf) {
    const auto made = tokenizer().MakeGrammar({.text = gbnf});
    return made ? "none" : made.error().message;
  }

  static std::unique_ptr<TempDir> dir_;
  static std::shared_ptr<const Model> model_;
};
std::unique_ptr<TempDir> GrammarTest::dir_;
std::shared_ptr<const Model> GrammarTest::model_;

TEST_F(GrammarTest, FollowsAGrammar) {
  auto made = tokenizer().MakeGrammar({.text = "root ::= (\"yes\" | \"no\") \"!\"+"});
  ASSERT_TRUE(made) << made.error().message;
  Grammar& g = **made;
  const auto token = [&](const std::string& text) { return (*tokenizer().Tokenize(text, false, false))[0]; };
  const std::vector<int32_t> three = {token("y"), token("x"), -1, token("n"), 1 << 30};
  EXPECT_EQ(*g.Allows(three), (std::vector<bool>{true, false, false, true, false}));
  for (const char* c : {"y", "e", "s", "!"}) {
    const int32_t t = token(c);
    EXPECT_EQ(*g.Allows(std::span(&t, 1)), std::vector<bool>{true});
    g.Accept(t);
  }
  const auto all = *g.AllowsOfAll();
  for (int32_t t = 0; t < n_vocab(); ++t)
    EXPECT_EQ(all[static_cast<std::size_t>(t)], tokenizer().IsEndOfGeneration(t) || t == token("!")) << t;
}

TEST_F(GrammarTest, WhatIsNoGrammarIsNamed) {
  EXPECT_NE(ErrorOf("root ::= ").find("none"), std::string::npos);  // empty output is a grammar
  EXPECT_NE(ErrorOf("root = \"a\"").find("expecting ::="), std::string::npos) << ErrorOf("root = \"a\"");
  EXPECT_NE(ErrorOf("root ::= b").find("'b'"), std::string::npos) << ErrorOf("root ::= b");
  EXPECT_NE(ErrorOf("a ::= \"b\"").find("root"), std::string::npos) << ErrorOf("a ::= \"b\"");
  EXPECT_NE(ErrorOf("root ::= root \"a\"").find("itself"), std::string::npos)
      << ErrorOf("root ::= root \"a\"");
  EXPECT_NE(ErrorOf("root ::= \"a").find("none"), std::string::npos);
  EXPECT_NE(ErrorOf(std::string("root ::= \"\0\"", 12)).find("zero"), std::string::npos);
  EXPECT_NE(ErrorOf("root ::= \"a\"{5000}").find("repetitions"), std::string::npos)
      << ErrorOf("root ::= \"a\"{5000}");
}

// Each ends only by being ended, and others go on.
TEST_F(GrammarTest, HostileGrammarsAreEnded) {
  auto good = OfSchema(R"({"type": "integer"})");
  ASSERT_TRUE(good);
  ASSERT_TRUE((*good)->AllowsOfAll());
  // Empty in a roundabout way, so that it is not seen to begin with itself.
  EXPECT_NE(ErrorOf("root ::= a root \"z\" | \"y\"\na ::= b\nb ::= c\nc ::= | \"x\"").find("cannot be used"),
            std::string::npos);
  EXPECT_NE(ErrorOf("root ::= " + std::string(100000, '(')).find("grammar"), std::string::npos);
  EXPECT_NE(ErrorOf("root ::= (((((\"a\"?){20})?){20})?){20}").find("grammar"), std::string::npos);
  EXPECT_NE(ErrorOf(std::string(2 << 20, 'a')).find("bytes"), std::string::npos);
  const int32_t one = (*tokenizer().Tokenize("1", false, false))[0];
  EXPECT_EQ(*(*good)->Allows(std::span(&one, 1)), std::vector<bool>{true});
}

TEST_F(GrammarTest, LazyGrammarsWaitForTheirTrigger) {
  const GrammarSource literal{
      .text = "root ::= \"<call>\" [0-9]+ \"</call>\"", .lazy = true, .triggers = {{"<call>"}}};
  GrammarSource regex = literal;
  regex.triggers = {{"<call>", true}};
  for (const GrammarSource& source : {literal, regex}) {
    SCOPED_TRACE(source.triggers[0].is_regex);
    auto made = tokenizer().MakeGrammar(source);
    ASSERT_TRUE(made) << made.error().message;
    Grammar& g = **made;
    const auto say = [&](const std::string& text) {
      bool allowed = true;
      const auto tokens = *tokenizer().Tokenize(text, false, false);
      for (const int32_t t : tokens) {
        allowed = allowed && (*g.Allows(std::span(&t, 1)))[0];
        g.Accept(t);
      }
      return allowed;
    };
    const auto may = [&](const std::string& text) -> bool {
      const int32_t t = (*tokenizer().Tokenize(text, false, false))[0];
      return (*g.Allows(std::span(&t, 1)))[0];
    };
    for (int i = 0; i < 80; ++i) EXPECT_TRUE(say("the <cal words "));
    EXPECT_TRUE(say("a<call>"));
    EXPECT_FALSE(may("a"));
    EXPECT_TRUE(may("7"));
    EXPECT_TRUE(say("12"));
    EXPECT_TRUE(may("<"));
  }
}

struct SchemaCase {
  const char* schema;
  std::function<bool(const Json&)> fits;
};

TEST_F(GrammarTest, SchemasHold) {
  const auto object = [](const Json& j) { return j.is_object(); };
  const SchemaCase cases[] = {
      {R"({"type": "object"})", object},
      {R"({})", [](const Json&) { return true; }},
      {R"({"type": "array", "items": {"type": "integer", "minimum": 3, "maximum": 12}, "minItems": 1, "maxItems": 3})",
       [](const Json& j) {
         if (!j.is_array() || j.empty() || j.size() > 3) return false;
         for (const Json& x : j)
           if (!x.is_number_integer() || x < 3 || x > 12) return false;
         return true;
       }},
      {R"({"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}, "b": {"enum": [1, "x\"\n", null]}},
           "required": ["a"], "additionalProperties": false})",
       [](const Json& j) {
         for (const auto& [k, v] : j.items())
           if (k != "a" && k != "b") return false;
         return j.contains("a") && j["a"].is_string() &&
                (!j.contains("b") || j["b"].is_null() || j["b"] == 1 || j["b"] == "x\"\n");
       }},
      {R"({"type": "object", "properties": {"ab": {"type": "null"}}, "additionalProperties": {"type": "boolean"}})",
       [](const Json& j) {
         for (const auto& [k, v] : j.items())
           if (k == "ab" ? !v.is_null() : !v.is_boolean()) return false;
         return j.is_object();
       }},
      {R"({"type": "string", "pattern": "^[a-c]{2}\\d+(-.)?$"})",
       [](const Json& j) {
         const auto s = j.get<std::string>();
         return s.size() >= 3 && s.find_first_of("abc") == 0;
       }},
      {R"({"anyOf": [{"type": "boolean"}, {"const": {"k": [1, 2]}}]})",
       [](const Json& j) { return j.is_boolean() || j == Json::parse(R"({"k": [1, 2]})"); }},
      {R"({"$defs": {"tree": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
           "required": ["next"], "additionalProperties": false}}, "$ref": "#/$defs/tree"})",
       [](const Json& j) { return j.is_object() && j.contains("next"); }},
      {R"({"type": ["number", "null"], "title": "t", "default": 5})",
       [](const Json& j) { return j.is_number() || j.is_null(); }},
      {R"({"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": false})",
       [](const Json& j) { return j.is_array() && j.size() == 2 && j[0].is_boolean() && j[1].is_null(); }},
  };
  std::mt19937_64 random(1);
  int finished = 0;
  for (const SchemaCase& c : cases) {
    for (int i = 0; i < 12; ++i) {
      auto made = OfSchema(c.schema);
      ASSERT_TRUE(made) << c.schema << ": " << made.error().message;
      const std::string text = Babble(**made, random, 0.3, 150);
      if (text == "...") continue;  // it may go on for long
      ++finished;
      const Json j = Json::parse(text, nullptr, false);
      ASSERT_FALSE(j.is_discarded()) << c.schema << ": " << text;
      EXPECT_TRUE(c.fits(j)) << c.schema << ": " << text;
    }
  }
  EXPECT_GT(finished, 60);
}

TEST_F(GrammarTest, WhatASchemaCannotHaveIsNamed) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({"type": "object", "patternProperties": {"a": {}}})", "patternProperties"},
      {R"({"type": "array", "items": {"not": {}}})", "#/items has \"not\""},
      {R"({"type": "number", "minimum": 3})", "minimum"},
      {R"({"type": "string", "pattern": "a"})", "pattern"},
      {R"({"type": "string", "pattern": "^(?=a)b$"})", "pattern"},
      {R"({"type": "string", "pattern": "^[ -~]$"})", "pattern"},
      {R"({"type": "string", "pattern": "^\"$"})", "pattern"},
      {R"({"type": "object", "properties": {"a": {}}, "required": ["b"]})", "required \"b\""},
      {R"({"$ref": "http://example.org/x"})", "example.org"},
      {R"({"type": "array", "items": {"$ref": "#"}})", "#/items has \"$ref #\""},
      {R"({"$ref": "#/$defs/a/b", "$defs": {"a": {"type": "string"}}})", "$ref #/$defs/a/b"},
      {R"({"$ref": "#/$defs/none"})", "none"},
      {R"({"$ref": "#/$defs/a", "minLength": 3, "$defs": {"a": {"type": "string"}}})",
       "minLength beside $ref"},
      {R"({"type": "strnig"})", "strnig"},
      {R"({"type": "object", "properties": {"a": 7}})", "#/properties/a"},
      {R"({"allOf": [{"type": "string"}, {"minLength": 3}]})", "allOf"},
      {R"([1])", "object"},
      {R"({"type": "array", "uniqueItems": true})", "uniqueItems"},
      {R"({"type": "array", "maxItems": 1000000000})", "maxItems"},
      {R"({"type": "object", "properties": {"]x": {}}, "additionalProperties": true})",
       "additionalProperties"},
  };
  for (const auto& [schema, says] : cases) {
    const auto source = tokenizer().SchemaGrammar(schema);
    ASSERT_FALSE(source) << schema;
    EXPECT_EQ(source.error().code, ErrorCode::kInvalidArgument) << schema;
    EXPECT_NE(source.error().message.find(says), std::string::npos)
        << schema << ": " << source.error().message;
  }
  std::string deep = "{}";
  for (int i = 0; i < 100; ++i) deep = R"({"items": )" + deep + "}";
  const auto source = tokenizer().SchemaGrammar(deep);
  ASSERT_FALSE(source);
  EXPECT_EQ(source.error().code, ErrorCode::kTooLong);
  const auto deeper =
      tokenizer().SchemaGrammar(R"({"enum": )" + std::string(300000, '[') + std::string(300000, ']') + "}");
  ASSERT_FALSE(deeper);
  EXPECT_EQ(deeper.error().code, ErrorCode::kTooLong);
  // References in a circle.
  EXPECT_FALSE(OfSchema(
      R"({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}})"));
}

}  // namespace
}  // namespace moend::test
