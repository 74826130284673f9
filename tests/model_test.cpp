// Loading models: what is accepted, what is refused and in which words; the tokenizer; the fingerprint.
#include "moend/model/model.h"
#include "moend/model/gguf.h"

#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

#include "moend/model/mapped_file.h"
#include "tests/support/plain_runner.h"
#include "tests/support/test_model.h"

namespace moend::test {
namespace {

const std::string kReference = MOEND_SOURCE_DIR "/models/moend-reference-23m-q8_0.gguf";

class ModelTest : public testing::Test {
 protected:
  std::string Write(const TestModelOptions& options, const std::string& name = "model.gguf") {
    const std::string path = dir_ / name;
    EXPECT_TRUE(WriteTestModel(options, path));
    return path;
  }
  std::shared_ptr<const Model> Load(const std::string& path, const LoadOptions& options = {}) {
    auto model = Model::Load(path, options);
    EXPECT_TRUE(model) << model.error().message;
    return model ? *model : nullptr;
  }
  // Expects an error of this code whose message names the file and holds all `words`.
  void ExpectRefused(const std::string& path, ErrorCode code, const std::vector<std::string>& words) {
    const auto model = Model::Load(path);
    ASSERT_FALSE(model);
    EXPECT_EQ(model.error().code, code) << model.error().message;
    EXPECT_NE(model.error().message.find(path), std::string::npos) << model.error().message;
    for (const std::string& word : words)
      EXPECT_NE(model.error().message.find(word), std::string::npos)
          << word << " in: " << model.error().message;
  }
  // The same for a small model with other keys or tensor names.
  void ExpectEditRefused(const std::function<void(gguf_context*)>& keys,
                         const std::function<std::string(const std::string&)>& name, ErrorCode code,
                         const std::vector<std::string>& words) {
    const std::string base = Write({}), edited = dir_ / "edited.gguf";
    ASSERT_TRUE(EditModel(base, edited, keys, name));
    ExpectRefused(edited, code, words);
  }
  static auto Rename(const std::string& from, const std::string& to) {
    return [=](const std::string& name) { return name == from ? to : name; };
  }

  TempDir dir_;
};

// Asked without repacking: which types are repacked is the machine's affair (AMX takes Q8_0).
TEST_F(ModelTest, LoadsTheReferenceModel) {
  const auto model = Load(kReference, {.repack = false});
  ASSERT_TRUE(model);
  const HyperParams& h = model->hparams();
  EXPECT_EQ(h.architecture_name, "llama");
  EXPECT_EQ(h.name, "moend reference 23M");
  EXPECT_EQ(h.n_layers, 12);
  EXPECT_EQ(h.n_embd, 384);
  EXPECT_EQ(h.n_heads, 8);
  EXPECT_EQ(h.n_kv_heads, 2);
  EXPECT_EQ(h.head_size, 64);
  EXPECT_EQ(h.n_ff, 1024);
  EXPECT_EQ(h.n_vocab, 8192);
  EXPECT_EQ(h.n_ctx_train, 16384);
  EXPECT_EQ(h.softmax_scale, 0.125f);
  EXPECT_EQ(h.rope.freq_base, 1e6f);
  EXPECT_EQ(h.rope.freq_scale, 1.0f);
  EXPECT_EQ(h.rope.mode, GGML_ROPE_TYPE_NORMAL);
  EXPECT_EQ(model->file_bytes(), 24967776);
  EXPECT_EQ(model->weights().head.output, model->weights().tok_embd);  // tied
  EXPECT_EQ(model->weights().layers.size(), 12u);
  EXPECT_EQ(model->path(), kReference);
}

TEST_F(ModelTest, WeightsLieInTheMappedFile) {
  const auto model = Load(kReference, {.repack = false});
  ASSERT_TRUE(model);
  const auto address = reinterpret_cast<uintptr_t>(model->weights().layers[5].ffn_up->data);
  std::ifstream maps("/proc/self/maps");
  if (!maps) GTEST_SKIP() << "no /proc";
  bool found = false;
  for (std::string line; std::getline(maps, line);) {
    uintptr_t begin = 0, end = 0;
    char mode[5] = {};
    ASSERT_EQ(sscanf(line.c_str(), "%lx-%lx %4s", &begin, &end, mode), 3);
    if (address < begin || address >= end) continue;
    found = true;
    EXPECT_STREQ(mode, "r--p");
    EXPECT_NE(line.find("moend-reference-23m-q8_0.gguf"), std::string::npos) << line;
  }
  EXPECT_TRUE(found);
}

// Without a mapping the file may be overwritten in place, or cut off, while the model is in use.
TEST_F(ModelTest, WhatWasReadInsteadOfMappedIsSafeFromWriters) {
  const std::string path = Write({});
  const auto mapped = Load(path), read = Load(path, {.map = false});
  ASSERT_TRUE(mapped);
  ASSERT_TRUE(read);
  EXPECT_EQ(read->hash(), mapped->hash());
  const std::vector<int32_t> tokens = RandomTokens(12, 1);
  const auto before = PlainLogits(*read, tokens, 8);
  ASSERT_FALSE(before.empty());
  EXPECT_EQ(before, PlainLogits(*mapped, tokens, 8));
  std::ofstream(path, std::ios::trunc) << "no model";
  EXPECT_EQ(PlainLogits(*read, tokens, 8), before);
}

TEST_F(ModelTest, AFileThatChangesWhileItIsLoadedIsNoticed) {
  const std::string path = Write({});
  for (const bool map : {true, false}) {
    const auto file = MappedFile::Open(path, map);
    ASSERT_TRUE(file) << file.error().message;
    EXPECT_TRUE(file->CheckUnchanged(path));
    EXPECT_EQ(file->CheckUnchanged(path + ".none").error().code, ErrorCode::kNotFound);
    // Written to.
    std::ofstream(path, std::ios::app) << "x";
    const auto longer = file->CheckUnchanged(path);
    ASSERT_FALSE(longer);
    EXPECT_NE(longer.error().message.find("changed while"), std::string::npos);
  }
  // Another one under its name.
  const auto file = MappedFile::Open(path);
  ASSERT_TRUE(file);
  std::filesystem::copy_file(path, path + ".copy");
  std::filesystem::rename(path + ".copy", path);
  EXPECT_FALSE(file->CheckUnchanged(path));
}

TEST_F(ModelTest, ReadsRopeScaling) {
  TestModelOptions o;
  o.rope_scaling = "yarn";
  o.rope_factor = 4;
  o.rope_original_context = 512;
  RopeParams r = Load(Write(o))->hparams().rope;
  EXPECT_EQ(r.freq_scale, 0.25f);
  EXPECT_EQ(r.ext_factor, 1.0f);
  EXPECT_EQ(r.n_ctx_orig, 512);
  EXPECT_NEAR(r.attn_factor, 1.0f, 1e-6);
  o.rope_scaling = "none";
  r = Load(Write(o))->hparams().rope;
  EXPECT_EQ(r.freq_scale, 1.0f);
  EXPECT_EQ(r.ext_factor, 0.0f);
  o.rope_scaling = "";
  o.architecture = "qwen3";
  r = Load(Write(o))->hparams().rope;
  EXPECT_EQ(r.freq_scale, 0.25f);
  EXPECT_EQ(r.ext_factor, 0.0f);
  EXPECT_EQ(r.mode, GGML_ROPE_TYPE_NEOX);
}

TEST_F(ModelTest, RefusesWhatIsNoModelFile) {
  ExpectRefused(dir_ / "absent.gguf", ErrorCode::kNotFound, {"no such file"});
  ExpectRefused(dir_ / ".", ErrorCode::kInvalidArgument, {"is a directory"});
  ExpectRefused("/dev/null", ErrorCode::kInvalidArgument, {"not a regular file"});
  std::ofstream(dir_ / "empty.gguf");
  ExpectRefused(dir_ / "empty.gguf", ErrorCode::kCorrupt, {"is empty"});
  std::ofstream(dir_ / "page.gguf") << "<html>Sign in</html>";
  ExpectRefused(dir_ / "page.gguf", ErrorCode::kCorrupt, {"is not a GGUF model", "<html>Si"});
  std::ifstream whole(kReference, std::ios::binary);
  std::string half(12'000'000, '\0');
  whole.read(half.data(), static_cast<std::streamsize>(half.size()));
  std::ofstream(dir_ / "half.gguf", std::ios::binary) << half;
  ExpectRefused(dir_ / "half.gguf", ErrorCode::kCorrupt,
                {"is cut off: tensor blk.", "12000000 bytes", "again"});
}

TEST_F(ModelTest, RefusesOtherArchitectures) {
  ExpectEditRefused([](gguf_context* f) { gguf_set_val_str(f, "general.architecture", "mamba"); }, {},
                    ErrorCode::kUnsupported, {"\"mamba\"", "llama, qwen2"});
  ExpectEditRefused([](gguf_context* f) { gguf_set_val_u32(f, "llama.expert_count", 8); }, {},
                    ErrorCode::kUnsupported, {"mixture of 8 experts"});
  ExpectEditRefused([](gguf_context* f) { gguf_set_val_str(f, "llama.rope.scaling.type", "longrope"); }, {},
                    ErrorCode::kUnsupported, {"\"longrope\"", "none, linear and yarn"});
  ExpectEditRefused([](gguf_context* f) { gguf_set_val_bool(f, "llama.attention.causal", false); }, {},
                    ErrorCode::kUnsupported, {"encoder"});
  ExpectEditRefused([](gguf_context* f) { gguf_set_val_u16(f, "split.count", 3); }, {}, ErrorCode::kCorrupt,
                    {"split.no"});
  TestModelOptions o;
  o.head_size = 40;
  ExpectRefused(Write(o), ErrorCode::kUnsupported, {"heads of 40 channels", "multiples of 16 up to 256"});
  o.head_size = 272;
  ExpectRefused(Write(o), ErrorCode::kUnsupported, {"heads of 272 channels"});
}

TEST_F(ModelTest, RefusesContradictions) {
  const auto number = [](const char* key, uint32_t value) {
    return [=](gguf_context* f) { gguf_set_val_u32(f, key, value); };
  };
  ExpectEditRefused([](gguf_context* f) { gguf_remove_key(f, "llama.block_count"); }, {}, ErrorCode::kCorrupt,
                    {"lacks the key llama.block_count"});
  ExpectEditRefused(number("llama.block_count", 4), {}, ErrorCode::kCorrupt,
                    {"lacks the tensor blk.3.attn_norm.weight of shape [128]"});
  ExpectEditRefused(number("llama.block_count", 2), {}, ErrorCode::kUnsupported,
                    {"tensor blk.2.", "no place"});
  ExpectEditRefused(number("llama.block_count", 100000), {}, ErrorCode::kCorrupt,
                    {"100000, outside 1 to 512"});
  ExpectEditRefused(number("llama.embedding_length", 96), {}, ErrorCode::kCorrupt,
                    {"token_embd.weight has the shape [128, 320]", "[96, 320]"});
  ExpectEditRefused(number("llama.attention.head_count_kv", 3), {}, ErrorCode::kCorrupt,
                    {"4 query heads", "3 KV"});
  ExpectEditRefused(number("llama.attention.value_length", 16), {}, ErrorCode::kUnsupported,
                    {"V heads of 16"});
  ExpectEditRefused(number("llama.rope.dimension_count", 16), {}, ErrorCode::kUnsupported,
                    {"rotates 16 of 32"});
  ExpectEditRefused([](gguf_context* f) { gguf_set_val_f32(f, "llama.rope.freq_base", -1); }, {},
                    ErrorCode::kCorrupt, {"rope.freq_base is -1"});
  ExpectEditRefused([](gguf_context* f) { gguf_set_val_f32(f, "llama.rope.scaling.factor", NAN); }, {},
                    ErrorCode::kCorrupt, {"rope.scaling.factor is nan"});
  ExpectEditRefused([](gguf_context* f) { gguf_set_val_str(f, "llama.context_length", "long"); }, {},
                    ErrorCode::kCorrupt, {"llama.context_length is of type text instead of an integer"});
  ExpectEditRefused({}, Rename("blk.1.ffn_up.weight", ""), ErrorCode::kCorrupt,
                    {"lacks the tensor blk.1.ffn_up.weight of shape [128, 256]"});
  ExpectEditRefused({}, Rename("blk.1.ffn_up.weight", "blk.1.ffn_up_exps.weight"), ErrorCode::kCorrupt,
                    {"blk.1.ffn_up.weight"});
  ExpectEditRefused({}, Rename("output.weight", "cls.weight"), ErrorCode::kUnsupported, {"cls.weight"});
  ExpectEditRefused({}, Rename("output_norm.weight", "token_embd_norm.weight"), ErrorCode::kCorrupt,
                    {"output_norm.weight"});
}

TEST_F(ModelTest, LayersWithEqualNumbersMayListThem) {
  const std::string base = Write({}), edited = dir_ / "edited.gguf";
  std::vector<int32_t> widths = {256, 256, 256};
  const auto set = [&](gguf_context* f) {
    gguf_set_arr_data(f, "llama.feed_forward_length", GGUF_TYPE_INT32, widths.data(), widths.size());
  };
  ASSERT_TRUE(EditModel(base, edited, set));
  EXPECT_EQ(Load(edited)->hparams().n_ff, 256);
  widths = {256, 128, 256};
  ASSERT_TRUE(EditModel(base, edited, set));
  ExpectRefused(edited, ErrorCode::kUnsupported, {"differs between layers (256 and 128)"});
  widths = {256, 256};
  ASSERT_TRUE(EditModel(base, edited, set));
  ExpectRefused(edited, ErrorCode::kCorrupt, {"has 2 values instead of 3"});
}

TEST_F(ModelTest, RefusesTypesThatCannotBeMultiplied) {
  TestModelOptions o;
  o.weight_type = GGML_TYPE_I32;
  ExpectRefused(Write(o), ErrorCode::kUnsupported, {"token_embd.weight is of type i32", "q4_K", "f32"});
}

TEST_F(ModelTest, RefusesVocabulariesThatContradictThemselves) {
  const auto tokens = [](int64_t n, const std::function<void(std::vector<std::string>&)>& change) {
    return [=](gguf_context* f) {
      std::vector<std::string> texts;
      const int64_t key = gguf_find_key(f, "tokenizer.ggml.tokens");
      for (int64_t i = 0; i < n; ++i)
        texts.emplace_back(gguf_get_arr_str(f, key, static_cast<std::size_t>(i)));
      change(texts);
      std::vector<const char*> pointers;
      for (const std::string& t : texts) pointers.push_back(t.c_str());
      gguf_set_arr_str(f, "tokenizer.ggml.tokens", pointers.data(), pointers.size());
    };
  };
  ExpectEditRefused(tokens(319, [](auto&) {}), {}, ErrorCode::kCorrupt, {"319 tokens", "320 rows"});
  ExpectEditRefused(tokens(320, [](auto& t) { t[300] = t[97]; }), {}, ErrorCode::kCorrupt,
                    {"the token \"a\" twice", "300"});
  ExpectEditRefused(tokens(320, [](auto& t) { t[300] = std::string(5000, 'x'); }), {}, ErrorCode::kCorrupt,
                    {"token 300 of 5000 bytes"});
  ExpectEditRefused(tokens(320,
                           [](auto& t) {
                             t[300].clear();
                             t[301] = "[EMPTY_300]";
                           }),
                    {}, ErrorCode::kCorrupt, {"[EMPTY_300]"});
  ExpectEditRefused([](gguf_context* f) { gguf_remove_key(f, "tokenizer.ggml.merges"); }, {},
                    ErrorCode::kCorrupt, {"tokenizer.ggml.merges"});
  ExpectEditRefused([](gguf_context* f) { gguf_set_val_str(f, "tokenizer.ggml.model", "bert"); }, {},
                    ErrorCode::kUnsupported, {"\"bert\"", "llama and gpt2"});
  ExpectEditRefused([](gguf_context* f) { gguf_set_val_str(f, "tokenizer.ggml.pre", "whitespace"); }, {},
                    ErrorCode::kUnsupported, {"pre-tokenizer whitespace"});
  ExpectEditRefused([](gguf_context* f) { gguf_set_val_str(f, "tokenizer.ggml.pre", "no-such-thing"); }, {},
                    ErrorCode::kCorrupt, {"unknown pre-tokenizer type: 'no-such-thing'"});
  ExpectEditRefused([](gguf_context* f) { gguf_set_val_u32(f, "tokenizer.ggml.bos_token_id", 320); }, {},
                    ErrorCode::kCorrupt, {"bos_token_id is 320", "320 tokens"});
  ExpectEditRefused([](gguf_context* f) { gguf_set_val_u32(f, "tokenizer.ggml.add_bos_token", 1); }, {},
                    ErrorCode::kCorrupt, {"add_bos_token is of type uint32 instead of a boolean"});
  const std::vector<int32_t> types(319, 1);
  ExpectEditRefused(
      [&](gguf_context* f) {
        gguf_set_arr_data(f, "tokenizer.ggml.token_type", GGUF_TYPE_INT32, types.data(), types.size());
      },
      {}, ErrorCode::kCorrupt, {"token_type has 319 entries for 320 tokens"});
  // Without the tokenizer none of this matters.
  const std::string edited = dir_ / "edited.gguf";
  EXPECT_TRUE(Model::Load(edited, {.vocabulary = false}));
}

TEST_F(ModelTest, HashTellsModelsApart) {
  TestModelOptions o;
  const std::string first = Load(Write(o, "a.gguf"))->hash();
  EXPECT_EQ(first.size(), 16u);
  EXPECT_EQ(first.find_first_not_of("0123456789abcdef"), std::string::npos);
  EXPECT_EQ(Load(Write(o, "b.gguf"))->hash(), first);  // the path does not matter
  o.seed = 2;
  EXPECT_NE(Load(Write(o, "c.gguf"))->hash(), first);  // other weights
  const std::string edited = dir_ / "edited.gguf";
  ASSERT_TRUE(EditModel(dir_ / "a.gguf", edited,
                        [](gguf_context* f) { gguf_set_val_f32(f, "llama.rope.freq_base", 20000.0f); }));
  EXPECT_NE(Load(edited)->hash(), first);
  ASSERT_TRUE(EditModel(dir_ / "a.gguf", edited, [](gguf_context* f) {
    gguf_set_val_str(f, "general.name", "renamed");
    gguf_set_val_str(f, "tokenizer.chat_template", "chatml");
  }));
  EXPECT_EQ(Load(edited)->hash(), first);  // words about the model are not the model
}

// As llama-gguf-split writes them: the first part has the keys, each has some of the tensors.
TEST_F(ModelTest, SplitFilesAreOneModel) {
  const std::string whole = Write({}, "whole.gguf");
  const auto name = [&](int part, int count) {
    return dir_ / fmt::format("part-{:05}-of-{:05}.gguf", part, count);
  };
  const auto in_part = [](const std::string& tensor) {
    return tensor.starts_with("blk.1") ? 2 : tensor.starts_with("blk.2") ? 3 : 1;
  };
  const auto write = [&](int part, const std::string& to, int no, int tensors) {
    return EditModel(
        whole, to,
        [&](gguf_context* f) {
          gguf_set_val_u16(f, "split.no", static_cast<uint16_t>(no));
          gguf_set_val_u16(f, "split.count", 3);
          gguf_set_val_i32(f, "split.tensors.count", tensors);
        },
        [&](const std::string& tensor) { return in_part(tensor) == part ? tensor : std::string(); });
  };
  const auto all = static_cast<int>(GgufFile::Open(whole)->tensors().size());
  for (int p = 1; p <= 3; ++p) ASSERT_TRUE(write(p, name(p, 3), p - 1, all));

  const auto model = Load(name(1, 3));
  ASSERT_TRUE(model);
  const auto one = Load(whole);
  EXPECT_EQ(model->hash(), one->hash());
  EXPECT_GT(model->file_bytes(), one->file_bytes());
  EXPECT_EQ(*model->tokenizer().Tokenize("the in", true, false),
            *one->tokenizer().Tokenize("the in", true, false));
  for (const bool map : {true, false}) {  // any part may change
    const auto file = GgufFile::Open(name(1, 3), map);
    ASSERT_TRUE(file);
    EXPECT_TRUE(file->CheckUnchanged());
    const auto time = std::filesystem::last_write_time(name(3, 3));
    std::filesystem::last_write_time(name(3, 3), time + std::chrono::seconds(1));
    const auto changed = file->CheckUnchanged();
    ASSERT_FALSE(changed);
    EXPECT_NE(changed.error().message.find(name(3, 3)), std::string::npos);
  }

  ExpectRefused(name(2, 3), ErrorCode::kInvalidArgument, {"part 2 of 3", "name the first", name(1, 3)});
  std::filesystem::copy_file(name(1, 3), dir_ / "other.gguf");
  ExpectRefused(dir_ / "other.gguf", ErrorCode::kInvalidArgument, {"must end with -00001-of-00003.gguf"});
  std::filesystem::rename(name(3, 3), dir_ / "away.gguf");
  ExpectRefused(name(1, 3), ErrorCode::kNotFound, {"part 3", name(3, 3), "missing"});
  std::filesystem::copy_file(name(2, 3), name(3, 3));
  // The part that is wrong is named, not the one that was asked for.
  const auto expect_named = [&](const std::string& part, const std::string& words) {
    const auto refused = Model::Load(name(1, 3));
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, ErrorCode::kCorrupt);
    EXPECT_NE(refused.error().message.find(part), std::string::npos) << refused.error().message;
    EXPECT_NE(refused.error().message.find(words), std::string::npos) << refused.error().message;
  };
  expect_named(name(3, 3), "part 2 of 3, not 3 of 3");
  ASSERT_TRUE(write(2, name(3, 3), 2, all));
  expect_named(name(3, 3), "an earlier part has too");
  ASSERT_TRUE(write(3, name(3, 3), 2, all));
  ASSERT_TRUE(write(1, name(1, 3), 0, all + 1));
  ExpectRefused(name(1, 3), ErrorCode::kCorrupt, {"one model"});
}

TEST_F(ModelTest, TokenizesAndBack) {
  const auto model = Load(Write({}));
  ASSERT_TRUE(model);
  const Tokenizer& t = model->tokenizer();
  EXPECT_EQ(t.bos(), 264);
  EXPECT_TRUE(t.adds_bos());
  EXPECT_FALSE(t.has_chat_template());
  EXPECT_TRUE(t.IsEndOfGeneration(265));
  EXPECT_TRUE(t.IsEndOfGeneration(267));  // <|im_end|>
  EXPECT_FALSE(t.IsEndOfGeneration('a'));
  for (const std::string text :
       {"", "the cat", "  two  spaces\n\n", "caf\xc3\xa9 \xe4\xb8\xad\xe6\x96\x87 \xf0\x9f\x98\x80"}) {
    const auto tokens = t.Tokenize(text, false, false);
    ASSERT_TRUE(tokens);
    EXPECT_EQ(t.Detokenize(*tokens, false), text);
    std::string pieces;
    for (int32_t id : *tokens) pieces += t.Piece(id, false);
    EXPECT_EQ(pieces, text);
  }
  const auto with_bos = t.Tokenize("in", true, false);
  ASSERT_TRUE(with_bos);
  EXPECT_EQ(*with_bos, (std::vector<int32_t>{264, 259}));  // "in" is a merge
  // A text or a template that spells out the first token gets no second one; one that spells it twice means
  // that.
  EXPECT_EQ(*t.Tokenize("<|bos|>in", true, true), *with_bos);
  EXPECT_EQ(*t.Tokenize("<|bos|>in", false, true), *with_bos);
  EXPECT_EQ(*t.Tokenize("<|bos|>", true, true), (std::vector<int32_t>{264}));
  EXPECT_EQ(*t.Tokenize("<|bos|><|bos|>in", true, true), (std::vector<int32_t>{264, 264, 259}));
  EXPECT_GT(t.Tokenize("<|bos|>in", true, false)->size(), 3u) << "as text it is text";
  EXPECT_EQ(t.Tokenize("<|eos|>", false, true)->size(), 1u);
  EXPECT_EQ(t.Tokenize("<|eos|>", false, false)->size(), 7u);
  EXPECT_EQ(t.Piece(265, true), "<|eos|>");
  EXPECT_EQ(t.Piece(265, false), "");
}

TEST_F(ModelTest, TokenizesWithSentencePieces) {
  TestModelOptions o;
  o.sentencepiece = true;
  const auto model = Load(Write(o));
  ASSERT_TRUE(model);
  const Tokenizer& t = model->tokenizer();
  EXPECT_EQ(t.bos(), 1);
  EXPECT_TRUE(t.IsEndOfGeneration(2));
  const auto tokens = t.Tokenize("the in", true, false);
  ASSERT_TRUE(tokens);
  EXPECT_EQ(*tokens, (std::vector<int32_t>{1, 261, 263, 262}));
  EXPECT_EQ(t.Detokenize(*tokens, false), " the in");
  EXPECT_EQ(t.Detokenize(*t.Tokenize("\xff\n7", false, false), false), "\xff\n7");
}

class TakesAnything : public ModelTest, public testing::WithParamInterface<bool> {};

TEST_P(TakesAnything, AnyText) {
  TestModelOptions o;
  o.sentencepiece = GetParam();
  const auto model = Load(Write(o));
  ASSERT_TRUE(model);
  const Tokenizer& t = model->tokenizer();
  std::string all;
  for (int i = 0; i < 512; ++i) all += static_cast<char>(i * 37);
  for (const std::string& text :
       {all, std::string("\xff\xfe\xc3"), std::string("a\0b", 3), std::string(50'000, ' '),
        std::string(50'000, '!'), std::string(50'000, '\xf0')}) {
    const auto tokens = t.Tokenize(text, true, true);
    ASSERT_TRUE(tokens) << tokens.error().message;
    for (int32_t id : *tokens) ASSERT_TRUE(id >= 0 && id < 320);
  }
  for (int32_t id : {-1, -2147483647, 320, 2147483647}) {
    EXPECT_EQ(t.Piece(id, true), "");
    EXPECT_FALSE(t.IsEndOfGeneration(id));
    EXPECT_EQ(t.Detokenize(std::vector<int32_t>{id, 'a', id}, true), t.Piece('a', true));
  }
}

INSTANTIATE_TEST_SUITE_P(Tokenizers, TakesAnything, testing::Bool(),
                         [](const auto& info) { return info.param ? "SentencePieces" : "BytePairs"; });

// The pre-tokenizer "default" goes through std::regex, which recurses for every character of a word.
TEST_F(ModelTest, LongWordsDoNotOverflowTheStack) {
  TestModelOptions o;
  o.pre_tokenizer = "default";
  const auto model = Load(Write(o));
  ASSERT_TRUE(model);
  for (char c : {'!', '7', 'a', ' '}) {
    const auto tokens = model->tokenizer().Tokenize(std::string(300'000, c), false, false);
    ASSERT_TRUE(tokens) << tokens.error().message;
    EXPECT_GT(tokens->size(), 1000u);
  }
  const auto too_long = model->tokenizer().Tokenize(std::string((1 << 20) + 1, '!'), false, false);
  ASSERT_FALSE(too_long);
  EXPECT_EQ(too_long.error().code, ErrorCode::kTooLong);
}

TEST_F(ModelTest, TokenizerServesManyThreads) {
  const auto model = Load(kReference);
  ASSERT_TRUE(model);
  const std::string text = "The lighthouse keeper wrote 12 letters; none of them was ever answered.";
  const auto want = model->tokenizer().Tokenize(text, true, false);
  ASSERT_TRUE(want);
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (std::size_t k = 0; k < wrong.size(); ++k)
    threads.emplace_back([&, k] {
      for (int i = 0; i < 50; ++i) {
        const auto got = model->tokenizer().Tokenize(text, true, false);
        wrong[k] += !got || *got != *want || model->tokenizer().Detokenize(*got, false) != text;
      }
    });
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(wrong, std::vector<int>(4, 0));
}

}  // namespace
}  // namespace moend::test
