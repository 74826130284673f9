#include "moend/base/file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

namespace moend {
namespace {

namespace fs = std::filesystem;

class FileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto* info = ::testing::UnitTest::GetInstance()->current_test_info();
    directory_ =
        fs::path(::testing::TempDir()) / ("moend_file_" + std::to_string(::getpid()) + "_" + info->name());
    fs::create_directories(directory_);
  }
  void TearDown() override { fs::remove_all(directory_); }
  std::string Path(const std::string& name) const { return (directory_ / name).string(); }
  int64_t Entries() const {
    return std::distance(fs::directory_iterator(directory_), fs::directory_iterator());
  }
  fs::path directory_;
};

TEST_F(FileTest, RoundTripOfAnySize) {
  for (const std::size_t size : {0u, 1u, 65535u, 65536u, 65537u, 1000000u}) {
    std::string content(size, '\0');
    for (std::size_t i = 0; i < size; ++i) content[i] = static_cast<char>(i * 31 + i / 256);
    ASSERT_TRUE(WriteFileAtomically(Path("a"), content));
    const auto read = ReadFile(Path("a"));
    ASSERT_TRUE(read) << read.error().message;
    EXPECT_EQ(*read, content);
    EXPECT_EQ(Entries(), 1) << "a temporary file was left behind";
  }
}

TEST_F(FileTest, MissingFileIsNamed) {
  const auto read = ReadFile(Path("nothing"));
  ASSERT_FALSE(read);
  EXPECT_EQ(read.error().code, ErrorCode::kNotFound);
  EXPECT_NE(read.error().message.find(Path("nothing")), std::string::npos);
  EXPECT_NE(read.error().message.find("No such file"), std::string::npos);
  EXPECT_EQ(ReadFile("").error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(ReadFile(std::string("a\0b", 3)).error().code, ErrorCode::kInvalidArgument);
}

TEST_F(FileTest, DirectoryIsNoFile) {
  const auto read = ReadFile(directory_.string());
  ASSERT_FALSE(read);
  EXPECT_EQ(read.error().code, ErrorCode::kIo);
  EXPECT_NE(read.error().message.find("directory"), std::string::npos);
  EXPECT_EQ(WriteFileAtomically(directory_.string(), "x").error().code, ErrorCode::kIo);
  EXPECT_EQ(CheckWritable(directory_.string()).error().code, ErrorCode::kIo);
  EXPECT_EQ(CheckWritable(Path("new") + "/").error().code, ErrorCode::kIo);
}

TEST_F(FileTest, LimitHoldsForFilesAndPipes) {
  ASSERT_TRUE(WriteFileAtomically(Path("a"), std::string(1000, 'x')));
  EXPECT_TRUE(ReadFile(Path("a"), 1000));
  const auto read = ReadFile(Path("a"), 999);
  ASSERT_FALSE(read);
  EXPECT_NE(read.error().message.find("1000"), std::string::npos);

  // A pipe has no size to check in advance. Its writer must survive that the reader leaves.
  std::signal(SIGPIPE, SIG_IGN);
  ASSERT_EQ(::mkfifo(Path("pipe").c_str(), 0600), 0);
  for (const int64_t limit : {100000, 200000}) {
    std::thread writer([&] { std::ofstream(Path("pipe")) << std::string(150000, 'y') << std::flush; });
    const auto piped = ReadFile(Path("pipe"), limit);
    writer.join();
    ASSERT_EQ(piped.has_value(), limit == 200000);
    if (piped) {
      EXPECT_EQ(*piped, std::string(150000, 'y'));
    }
  }
}

TEST_F(FileTest, DevicesAndPipesAreNotReplaced) {
  ASSERT_EQ(::mkfifo(Path("pipe").c_str(), 0600), 0);
  EXPECT_FALSE(WriteFileAtomically(Path("pipe"), "x"));
  EXPECT_TRUE(fs::is_fifo(Path("pipe")));
  EXPECT_FALSE(CheckWritable("/dev/null"));
}

TEST_F(FileTest, ReplacesKeepingLinkAndRights) {
  ASSERT_TRUE(WriteFileAtomically(Path("real"), "old"));
  ASSERT_EQ(::chmod(Path("real").c_str(), 0640), 0);
  fs::create_symlink(Path("real"), Path("link"));
  ASSERT_TRUE(WriteFileAtomically(Path("link"), "new"));
  EXPECT_TRUE(fs::is_symlink(Path("link")));
  EXPECT_EQ(*ReadFile(Path("real")), "new");
  EXPECT_EQ(fs::status(Path("real")).permissions(), static_cast<fs::perms>(0640));
}

TEST_F(FileTest, MissingDirectoryIsNamed) {
  const std::string path = Path("no/such/file");
  for (const auto& result : {WriteFileAtomically(path, "x"), CheckWritable(path)}) {
    ASSERT_FALSE(result);
    EXPECT_EQ(result.error().code, ErrorCode::kIo);
    EXPECT_NE(result.error().message.find(path), std::string::npos);
  }
}

TEST_F(FileTest, CheckWritableLeavesNothingAndHarmsNothing) {
  EXPECT_TRUE(CheckWritable(Path("new")));
  EXPECT_EQ(Entries(), 0);
  ASSERT_TRUE(WriteFileAtomically(Path("old"), "content"));
  EXPECT_TRUE(CheckWritable(Path("old")));
  EXPECT_EQ(Entries(), 1);
  EXPECT_EQ(*ReadFile(Path("old")), "content");
}

TEST_F(FileTest, ReadersNeverSeeAHalfWrittenFile) {
  const std::string a(300000, 'a'), b(200000, 'b');
  ASSERT_TRUE(WriteFileAtomically(Path("f"), a));
  std::thread writer([&] {
    for (int i = 0; i < 40; ++i) EXPECT_TRUE(WriteFileAtomically(Path("f"), i % 2 ? a : b));
  });
  for (int i = 0; i < 200; ++i) {
    const auto read = ReadFile(Path("f"));
    EXPECT_TRUE(read && (*read == a || *read == b));
  }
  writer.join();
  EXPECT_EQ(Entries(), 1);
}

TEST_F(FileTest, ManyWritersOfOneDirectory) {
  std::vector<std::thread> writers;
  for (int w = 0; w < 4; ++w) {
    writers.emplace_back([&, w] {
      for (int i = 0; i < 20; ++i)
        EXPECT_TRUE(WriteFileAtomically(Path(std::to_string(w)), std::to_string(i)));
    });
  }
  for (auto& w : writers) w.join();
  EXPECT_EQ(Entries(), 4);
  for (int w = 0; w < 4; ++w) EXPECT_EQ(*ReadFile(Path(std::to_string(w))), "19");
}

}  // namespace
}  // namespace moend
