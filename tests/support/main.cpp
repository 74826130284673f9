// main() of the test programs, each of which holds the tests of many files. --file=NAME runs those of
// NAME.cpp alone; all else is GoogleTest's.
#include <gtest/gtest.h>

#include <cstdio>
#include <string>
#include <string_view>

namespace {

// GoogleTest's filter for the tests of one file; empty if there are none.
std::string TestsOf(std::string_view file) {
  std::string filter;
  const testing::UnitTest& all = *testing::UnitTest::GetInstance();
  for (int s = 0; s < all.total_test_suite_count(); ++s) {
    const testing::TestSuite& suite = *all.GetTestSuite(s);
    for (int t = 0; t < suite.total_test_count(); ++t) {
      const testing::TestInfo& test = *suite.GetTestInfo(t);
      std::string_view source = test.file();
      source.remove_prefix(source.rfind('/') + 1);
      if (source.substr(0, source.rfind('.')) != file) continue;
      if (!filter.empty()) filter += ':';
      filter += suite.name();
      filter += '.';
      filter += test.name();
    }
  }
  return filter;
}

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    constexpr std::string_view kFile = "--file=";
    const std::string_view argument = argv[i];
    const std::string filter =
        argument.starts_with(kFile) ? TestsOf(argument.substr(kFile.size())) : std::string();
    if (filter.empty()) {
      std::fprintf(stderr, "%s: \"%s\" is no option, or names a file without tests\n", argv[0], argv[i]);
      return 2;
    }
    GTEST_FLAG_SET(filter, filter);
  }
  return RUN_ALL_TESTS();
}
