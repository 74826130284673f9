// What a process may use of its machine, from trees of files as kernels and containers show them.
#include "moend/base/machine.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <thread>
#include <utility>

#include "tests/support/test_model.h"

namespace moend {
namespace {

using Files = std::initializer_list<std::pair<const char*, const char*>>;

MachineLimits Read(const Files& files) {
  const test::TempDir root;
  for (const auto& [path, text] : files) {
    const std::filesystem::path full = root / path;
    std::filesystem::create_directories(full.parent_path());
    std::ofstream(full) << text;
  }
  return ReadMachineLimits(root / "");
}

TEST(MachineLimits, WithoutCgroupsTheMachineCounts) {
  const MachineLimits none = Read({});
  EXPECT_EQ(none.cpu_quota, 0);
  EXPECT_EQ(none.memory_cap, 0);
  EXPECT_GE(none.cpus, 1);
  EXPECT_EQ(none.threads(), none.cpus);
  EXPECT_GT(none.memory, int64_t{1} << 20);
  EXPECT_EQ(none.usable_memory(), none.memory);
}

TEST(MachineLimits, Version2) {
  // A container with a name space of its own.
  MachineLimits m = Read({{"proc/self/cgroup", "0::/\n"},
                          {"sys/fs/cgroup/cpu.max", "150000 100000\n"},
                          {"sys/fs/cgroup/memory.max", "536870912\n"}});
  EXPECT_DOUBLE_EQ(m.cpu_quota, 1.5);
  EXPECT_EQ(m.threads(), 1);
  EXPECT_EQ(m.usable_memory(), 536870912);
  // A unit of systemd: the lowest limit on the way up holds; "max" is none.
  m = Read({{"proc/self/cgroup", "0::/system.slice/a:b.service\n"},
            {"sys/fs/cgroup/system.slice/a:b.service/cpu.max", "max 100000\n"},
            {"sys/fs/cgroup/system.slice/a:b.service/memory.max", "2147483648\n"},
            {"sys/fs/cgroup/system.slice/cpu.max", "50000 100000\n"},
            {"sys/fs/cgroup/system.slice/memory.max", "1073741824\n"}});
  EXPECT_DOUBLE_EQ(m.cpu_quota, 0.5);
  EXPECT_EQ(m.threads(), 1) << "never none";
  EXPECT_EQ(m.memory_cap, 1073741824);
  m = Read({{"proc/self/cgroup", "0::/\n"},
            {"sys/fs/cgroup/cpu.max", "max 100000\n"},
            {"sys/fs/cgroup/memory.max", "max\n"}});
  EXPECT_EQ(m.cpu_quota, 0);
  EXPECT_EQ(m.memory_cap, 0);
}

TEST(MachineLimits, Version1) {
  MachineLimits m =
      Read({{"proc/self/cgroup", "5:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n1:name=systemd:/\n"},
            {"sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us", "100000\n"},
            {"sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us", "100000\n"},
            {"sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes", "300000000\n"}});
  EXPECT_DOUBLE_EQ(m.cpu_quota, 1);
  EXPECT_EQ(m.memory_cap, 300000000);
  // The host's path, but the container's own mount; no limits.
  m = Read({{"proc/self/cgroup", "5:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n"},
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n"},
            {"sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"},
            {"sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"}});
  EXPECT_EQ(m.cpu_quota, 0);
  EXPECT_EQ(m.memory_cap, 0);
  m = Read({{"proc/self/cgroup", "3:cpu,cpuacct:/docker/x\n"},
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us", "250000\n"},
            {"sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"}});
  EXPECT_DOUBLE_EQ(m.cpu_quota, 2.5);
}

TEST(MachineLimits, NonsenseIsNoLimit) {
  for (const char* text : {"", "x", "-5 100000", "100000 0", "100000", "nan nan", "1e400 1"}) {
    const MachineLimits m = Read({{"proc/self/cgroup", "0::/\nbad line\n:\n"},
                                  {"sys/fs/cgroup/cpu.max", text},
                                  {"sys/fs/cgroup/memory.max", text}});
    EXPECT_EQ(m.cpu_quota, 0) << text;
    EXPECT_GE(m.threads(), 1) << text;
  }
}

TEST(MachineLimits, TheAffinityMaskCounts) {
  int cpus = 0;
  std::thread([&] {  // of this thread alone
    cpu_set_t all, one;
    ASSERT_EQ(sched_getaffinity(0, sizeof all, &all), 0);
    CPU_ZERO(&one);
    for (int c = 0; c < CPU_SETSIZE && CPU_COUNT(&one) == 0; ++c)
      if (CPU_ISSET(c, &all)) CPU_SET(c, &one);
    ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
    cpus = ReadMachineLimits().cpus;
  })
      .join();
  EXPECT_EQ(cpus, 1);
}

}  // namespace
}  // namespace moend
