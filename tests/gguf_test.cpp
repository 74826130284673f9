// The reader must answer any bytes at all with a model or with an error: it is fed whole models, models cut
// short, models with every number replaced by hostile ones, and models with random bits flipped. What passes
// our checks goes on to libllama and through the graph, which must survive it too.
#include "moend/model/gguf.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <random>

#include "moend/model/hparams.h"
#include "moend/model/model.h"
#include "moend/model/vocabulary.h"
#include "moend/model/weights.h"
#include "tests/support/plain_runner.h"
#include "tests/support/test_model.h"

namespace moend::test {
namespace {

using Bytes = std::vector<uint8_t>;

Bytes ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

void WriteAll(const std::string& path, std::span<const uint8_t> bytes) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

// A copy on the heap that ends where the bytes end, so that a sanitizer sees every read past them; aligned
// like a mapping.
class Exact {
 public:
  explicit Exact(std::span<const uint8_t> bytes) : size_(bytes.size()) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, std::max<std::size_t>(size_, 1)) != 0) std::abort();
    data_.reset(static_cast<uint8_t*>(p));
    if (size_) std::memcpy(p, bytes.data(), size_);
  }
  std::span<const uint8_t> span() const { return {data_.get(), size_}; }

 private:
  struct Free {
    void operator()(uint8_t* p) const { free(p); }
  };
  std::unique_ptr<uint8_t[], Free> data_;
  std::size_t size_;
};

// All checks that Model::Load makes before libllama sees a file. Empty: they passed.
std::string CheckAll(std::span<const uint8_t> bytes) {
  const Exact copy(bytes);
  const auto file = GgufFile::Parse(copy.span(), "test.gguf");
  if (!file) return file.error().message;
  auto hparams = ReadHyperParams(*file);
  if (!hparams) return hparams.error().message;
  const auto bound = BindWeights(*file, *hparams);
  if (!bound) return bound.error().message;
  const auto vocabulary = CheckVocabulary(*file, hparams->n_vocab);
  if (!vocabulary) return vocabulary.error().message;
  return "";
}

TestModelOptions SmallOptions() {
  TestModelOptions o;
  o.n_layers = 1;
  o.n_embd = 32;
  o.n_heads = 2;
  o.n_kv_heads = 1;
  o.head_size = 16;
  o.n_ff = 32;
  o.n_vocab = kLeastVocab;
  o.n_ctx_train = 128;
  return o;
}

// The smallest model with every kind of key: about 50 KB, of which 11 are header.
const Bytes& SmallModel() {
  static const Bytes bytes = [] {
    const TempDir dir;
    const std::string path = dir / "small.gguf", full = dir / "full.gguf";
    TestModelOptions o = SmallOptions();
    o.rope_scaling = "yarn";
    o.rope_factor = 2;
    o.rope_original_context = 64;
    o.rope_factors = true;
    o.chat_template = true;
    if (!WriteTestModel(o, path)) return Bytes();
    EditModel(path, full, [](gguf_context* file) {
      gguf_set_val_u32(file, "general.alignment", 32);
      gguf_set_val_u8(file, "test.u8", 1);
      gguf_set_val_i16(file, "test.i16", -1);
      gguf_set_val_u64(file, "test.u64", 1);
      gguf_set_val_f64(file, "test.f64", 1);
      const std::vector<float> scores(static_cast<std::size_t>(kLeastVocab), 0.5f);
      gguf_set_arr_data(file, "tokenizer.ggml.scores", GGUF_TYPE_FLOAT32, scores.data(), scores.size());
    });
    return ReadAll(full);
  }();
  return bytes;
}

// Another architecture with the other kind of tokenizer.
const Bytes& OtherModel() {
  static const Bytes bytes = [] {
    const TempDir dir;
    TestModelOptions o = SmallOptions();
    o.architecture = "qwen3";
    o.sentencepiece = true;
    o.tied = true;
    return WriteTestModel(o, dir / "other.gguf") ? ReadAll(dir / "other.gguf") : Bytes();
  }();
  return bytes;
}

// A number in the header of a well-formed file.
struct Field {
  std::size_t offset, width;
};

struct Header {
  std::vector<Field> fields;
  std::size_t end = 0;

  explicit Header(const Bytes& bytes) : bytes_(bytes) {
    end = 4;
    Number(4);
    const uint64_t n_tensors = Number(8), n_keys = Number(8);
    for (uint64_t i = 0; i < n_keys; ++i) {
      Text();
      Value(static_cast<GgufType>(Number(4)));
    }
    for (uint64_t i = 0; i < n_tensors; ++i) {
      Text();
      for (uint64_t dims = Number(4); dims > 0; --dims) Number(8);
      Number(4);
      Number(8);
    }
  }

 private:
  uint64_t Number(std::size_t width) {
    uint64_t value = 0;
    std::memcpy(&value, bytes_.data() + end, width);
    fields.push_back({end, width});
    end += width;
    return value;
  }
  void Text() { end += Number(8); }
  void Value(GgufType type) {
    switch (type) {
      case GgufType::kString:
        return Text();
      case GgufType::kArray: {
        const auto element = static_cast<GgufType>(Number(4));
        for (uint64_t n = Number(8); n > 0; --n) Value(element);
        return;
      }
      case GgufType::kUint8:
      case GgufType::kInt8:
      case GgufType::kBool:
        Number(1);
        return;
      case GgufType::kUint16:
      case GgufType::kInt16:
        Number(2);
        return;
      case GgufType::kUint32:
      case GgufType::kInt32:
      case GgufType::kFloat32:
        Number(4);
        return;
      default:
        Number(8);
    }
  }
  const Bytes& bytes_;
};

// Runs mutated models; those that our checks accept go all the way.
class Ordeal {
 public:
  // Whether the model loads.
  bool Try(std::span<const uint8_t> bytes) {
    ++tried;
    if (const std::string message = CheckAll(bytes); !message.empty()) {
      EXPECT_NE(message.find("test.gguf"), std::string::npos) << message;
      EXPECT_LT(message.size(), 1000u);
      return false;
    }
    ++passed;
    WriteAll(path_, bytes);
    const auto model = Model::Load(path_);
    if (!model) {
      EXPECT_FALSE(model.error().message.empty());
      return false;
    }
    ++loaded;
    const std::vector<int32_t> tokens = {1, 2, 3};
    EXPECT_EQ(PlainLogits(**model, tokens, 2).size(), 3u);
    (*model)->tokenizer().Detokenize(tokens, true);
    if (const auto ids = (*model)->tokenizer().Tokenize("in the an\xff <|eos|> 7!\n", true, true)) {
      for (int32_t id : *ids) {
        EXPECT_GE(id, 0);
        EXPECT_LT(id, (*model)->hparams().n_vocab);
      }
    }
    return true;
  }
  int64_t tried = 0, passed = 0, loaded = 0;

 private:
  TempDir dir_;
  std::string path_ = dir_ / "test.gguf";
};

TEST(Gguf, ReadsASmallModel) {
  ASSERT_FALSE(SmallModel().empty());
  EXPECT_EQ(CheckAll(SmallModel()), "");
  EXPECT_TRUE(Ordeal().Try(SmallModel()));
  EXPECT_TRUE(Ordeal().Try(OtherModel()));
  const Exact copy(SmallModel());
  const auto file = GgufFile::Parse(copy.span(), "test.gguf");
  ASSERT_TRUE(file) << file.error().message;
  EXPECT_EQ(*file->Integer("test.i16", -5, 5), -1);
  EXPECT_EQ(*file->Integer("llama.block_count", 1, 5), 1);
  EXPECT_EQ(*file->String("general.architecture"), "llama");
  EXPECT_EQ(*file->Real("test.f64"), 1.0f);
  EXPECT_EQ(*file->Boolean("tokenizer.ggml.add_bos_token", false), true);
  EXPECT_EQ(file->Strings("tokenizer.ggml.tokens")->at('a'), "a");
  ASSERT_NE(file->FindTensor("blk.0.ffn_up.weight"), nullptr);
  EXPECT_EQ(ShapeText(file->FindTensor("blk.0.ffn_up.weight")->ne), "[32, 32]");
  EXPECT_EQ(file->FindTensor("blk.0.ffn_up.weight")->bytes, 32 * 32 * 2);
  // Missing, ill-typed and out of range.
  EXPECT_FALSE(file->Integer("absent", 0, 1));
  EXPECT_EQ(*file->Integer("absent", 0, 1, 7), 7);
  EXPECT_FALSE(file->Integer("general.architecture", 0, 1, 7));
  EXPECT_FALSE(file->Integer("llama.block_count", 2, 5));
  EXPECT_FALSE(file->String("llama.block_count", ""));
  EXPECT_FALSE(file->Boolean("llama.block_count", true));
  EXPECT_FALSE(file->Real("general.architecture", 1.0f));
  EXPECT_FALSE(file->Strings("general.architecture"));
}

TEST(Gguf, SaysWhatAFileIsInstead) {
  const auto message = [](std::string_view text) {
    return CheckAll({reinterpret_cast<const uint8_t*>(text.data()), text.size()});
  };
  EXPECT_EQ(message(""), "test.gguf is empty; download it again");
  EXPECT_EQ(message("<!DOCTYPE html>"),
            "test.gguf is not a GGUF model: it starts with \"<!DOCTYP\" instead of \"GGUF\"");
  EXPECT_EQ(message("PK\x03\x04"),
            "test.gguf is not a GGUF model: it starts with \"PK\\x03\\x04\" instead of \"GGUF\"");
  EXPECT_NE(message("GGUF").find("is cut off"), std::string::npos);
  const auto version = [&](uint32_t v) {
    Bytes bytes = SmallModel();
    std::memcpy(bytes.data() + 4, &v, 4);
    return CheckAll(bytes);
  };
  EXPECT_EQ(version(2), "");  // the same layout
  EXPECT_EQ(version(1), "test.gguf is a GGUF file of version 1; moend reads versions 2 and 3");
  EXPECT_NE(version(0x03000000).find("big-endian"), std::string::npos);
}

TEST(Gguf, RejectsFilesCutShort) {
  const Bytes& whole = SmallModel();
  const Header header(whole);
  for (std::size_t size = 0; size < header.end; ++size)
    ASSERT_NE(CheckAll(std::span(whole).first(size)), "") << "cut at " << size << " of the header";
  std::mt19937_64 random(1);
  for (int i = 0; i < 1000; ++i) {
    const std::size_t size = random() % whole.size();
    ASSERT_NE(CheckAll(std::span(whole).first(size)), "") << "cut at " << size;
  }
  const std::string message = CheckAll(std::span(whole).first(whole.size() - 1));
  EXPECT_NE(message.find("is cut off: tensor "), std::string::npos) << message;
  EXPECT_NE(message.find(fmt::format("ends at byte {} but the file has {} bytes; download it again",
                                     whole.size(), whole.size() - 1)),
            std::string::npos)
      << message;
}

TEST(Gguf, SurvivesHostileNumbers) {
  constexpr uint64_t k31 = uint64_t{1} << 31, k32 = uint64_t{1} << 32, k63 = uint64_t{1} << 63;
  constexpr uint64_t kHostile[] = {0,   1,       k31 - 1, k31, k31 + 1,     k32 - 1,
                                   k32, k32 + 1, k63 - 1, k63, ~uint64_t{0}};
  const Bytes& whole = SmallModel();
  const Header header(whole);
  ASSERT_GT(header.fields.size(), 900u);
  Ordeal ordeal;
  Bytes bytes = whole;
  for (const Field& field : header.fields) {
    for (uint64_t value : kHostile) {
      if (field.width < 8 && value >> (8 * field.width) != 0 && value != ~uint64_t{0}) continue;
      std::memcpy(bytes.data() + field.offset, &value, field.width);
      ordeal.Try(bytes);
    }
    std::memcpy(bytes.data() + field.offset, whole.data() + field.offset, field.width);
  }
  EXPECT_GT(ordeal.tried, 8000);
  EXPECT_GT(ordeal.tried - ordeal.passed, 5000);
  EXPECT_GT(ordeal.loaded, 0);
}

TEST(Gguf, SurvivesRandomDamage) {
  std::mt19937_64 random(2);
  Ordeal ordeal;
  for (int i = 0; i < 3000; ++i) {
    const Bytes& whole = i % 2 ? OtherModel() : SmallModel();
    const std::size_t header = Header(whole).end;
    Bytes bytes = whole;
    const uint64_t kind = random() % 4;
    if (kind == 3) {
      // A hole or a repetition moves everything behind it.
      const auto at = static_cast<std::ptrdiff_t>(random() % header),
                 n = static_cast<std::ptrdiff_t>(1 + random() % 16);
      if (random() % 2)
        bytes.erase(bytes.begin() + at, bytes.begin() + at + n);
      else
        bytes.insert(bytes.begin() + at, whole.begin() + at, whole.begin() + at + n);
    } else {
      const std::size_t range = kind == 0 ? bytes.size() : header;
      for (uint64_t flips = 1 + random() % (kind == 2 ? 8 : 1); flips > 0; --flips)
        bytes[random() % range] ^= static_cast<uint8_t>(1 << random() % 8);
    }
    ordeal.Try(bytes);
  }
  EXPECT_GT(ordeal.loaded, 300);                 // damage inside weights and texts is not seen
  EXPECT_GT(ordeal.tried - ordeal.passed, 300);  // damage to the structure is
}

}  // namespace
}  // namespace moend::test
