#include "moend/base/spill.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "tests/support/test_model.h"

namespace moend {
namespace {

namespace fs = std::filesystem;

TEST(Spill, BlocksComeFromTheFolderAndLeaveNothingThere) {
  test::TempDir dir;
  auto ledger = SpillLedger::Create(dir / "");
  ASSERT_TRUE(ledger) << ledger.error().message;
  constexpr int64_t kBytes = (int64_t{3} << 20) + 5;
  auto buffer = Buffer<uint8_t>::Create(*ledger, kBytes);
  ASSERT_TRUE(buffer) << buffer.error().message;
  std::ifstream maps("/proc/self/maps");
  const std::string mapped(std::istreambuf_iterator<char>(maps), {});
  EXPECT_NE(mapped.find(fs::canonical(dir / "").string() + "/"), std::string::npos);
  EXPECT_EQ((*ledger)->live(), RoundUp(kBytes, kCacheLine));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->data()) % kCacheLine, 0u);
  std::memset(buffer->data(), 7, static_cast<std::size_t>(kBytes));
  EXPECT_EQ((*buffer)[kBytes - 1], 7);
  EXPECT_TRUE(fs::is_empty(dir / ""));
  *buffer = {};
  EXPECT_EQ((*ledger)->live(), 0);
  EXPECT_EQ((*ledger)->allocations(), 0);
}

TEST(Spill, MoreThanTheDiskHasIsRefused) {
  test::TempDir dir;
  auto ledger = SpillLedger::Create(dir / "");
  ASSERT_TRUE(ledger);
  auto buffer = Buffer<uint8_t>::Create(*ledger, int64_t{1} << 50);
  ASSERT_FALSE(buffer);
  EXPECT_EQ(buffer.error().code, ErrorCode::kOutOfMemory);
  EXPECT_EQ((*ledger)->live(), 0);
}

TEST(Spill, AFolderThatIsNotThereIsNamed) {
  const auto ledger = SpillLedger::Create("/nowhere/at/all");
  ASSERT_FALSE(ledger);
  EXPECT_EQ(ledger.error().code, ErrorCode::kIo);
  EXPECT_NE(ledger.error().message.find("/nowhere/at/all"), std::string::npos);
}

}  // namespace
}  // namespace moend
