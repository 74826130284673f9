// What this process may use of its machine: the CPUs of its affinity mask within its cgroups' quota, and the
// memory within their limit. A container sees the machine's numbers everywhere else.
#pragma once

#include <cstdint>
#include <string>

namespace moend {

struct MachineLimits {
  int cpus = 1;            // in the affinity mask
  double cpu_quota = 0;    // CPUs' worth of time that the cgroups grant; 0: no limit
  int64_t memory = 0;      // bytes of the machine
  int64_t memory_cap = 0;  // bytes that the cgroups grant; 0: no limit

  // As many as run at the same time: threads wait for each other by spinning, and more of them would spin
  // away the time that the others need.
  int threads() const;
  int64_t usable_memory() const;  // 0: unknown
};

// Cgroups of version 2 (cpu.max, memory.max) and 1 (cpu.cfs_*, memory.limit_in_bytes), the process's own and
// those above it. `root` is put before every path, for tests.
MachineLimits ReadMachineLimits(const std::string& root = "");

}  // namespace moend
