// The text that calibration measures on when no other is given.
#include <gtest/gtest.h>

#include "moend/base/file.h"
#include "moend/calibrate/default_text.h"
#include "tests/support/test_model.h"

namespace moend {
namespace {

std::shared_ptr<const Model> SomeModel(bool chat_template) {
  const test::TempDir dir;
  test::TestModelOptions options;
  options.chat_template = chat_template;
  EXPECT_TRUE(test::WriteTestModel(options, dir / "model.gguf"));
  auto model = Model::Load(dir / "model.gguf");
  EXPECT_TRUE(model) << model.error().message;
  return model ? *model : nullptr;
}

TEST(CalibrationText, IsTheFile) {
  const auto file = ReadFile(MOEND_SOURCE_DIR "/models/calibration-mixed.txt");
  ASSERT_TRUE(file) << file.error().message;
  EXPECT_EQ(MixedText(), *file);
  EXPECT_GE(file->size(), 100'000u);
  EXPECT_LE(file->size(), 300'000u);
}

TEST(CalibrationText, ConversationsTakeTheModelsTemplate) {
  const std::string marked =
      "before\n%%% user\nOne?\nTwo?\n%%% assistant\n12\n%%% text\nplain %%% user\n%%% user\nx";
  const auto chat = SomeModel(true), plain = SomeModel(false);
  ASSERT_TRUE(chat && plain);
  auto text = RenderMarkedText(marked, plain->tokenizer());
  ASSERT_TRUE(text) << text.error().message;
  EXPECT_EQ(*text, "before\nUser: One?\nTwo?\n\nAssistant: 12\n\nplain %%% user\nUser: x\n\n");
  text = RenderMarkedText(marked, chat->tokenizer());
  ASSERT_TRUE(text) << text.error().message;
  EXPECT_EQ(*text,
            "before\n<|im_start|>user\nOne?\nTwo?<|im_end|>\n<|im_start|>assistant\n12<|im_end|>\n"
            "plain %%% user\n<|im_start|>user\nx<|im_end|>\n");
  EXPECT_EQ(*RenderMarkedText("%%% user\nx\n", plain->tokenizer()), "User: x\n\n");
  EXPECT_EQ(*RenderMarkedText("", plain->tokenizer()), "");
  const auto wrong = RenderMarkedText("%%% system\nx", plain->tokenizer());
  ASSERT_FALSE(wrong);
  EXPECT_EQ(wrong.error().code, ErrorCode::kCorrupt);
  EXPECT_NE(wrong.error().message.find("\"system\""), std::string::npos);
}

TEST(CalibrationText, RendersForEveryModel) {
  for (const bool chat : {false, true}) {
    const auto model = SomeModel(chat);
    ASSERT_TRUE(model);
    const auto text = DefaultCalibrationText(model->tokenizer());
    ASSERT_TRUE(text) << text.error().message;
    EXPECT_EQ(text->find("\n%%% "), std::string::npos);
    EXPECT_NE(text->find(chat ? "<|im_start|>user\n" : "User: "), std::string::npos);
    EXPECT_NE(text->find("Jorun Haskel"), std::string::npos);
    const auto tokens = model->tokenizer().Tokenize(*text, false, true);
    ASSERT_TRUE(tokens) << tokens.error().message;
    EXPECT_GT(tokens->size(), 40'000u);
  }
}

}  // namespace
}  // namespace moend
