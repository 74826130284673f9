#include "moend/base/machine.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>
#include <string_view>
#include <thread>
#include <vector>

#include "moend/base/file.h"
#include "moend/base/number.h"

namespace moend {
namespace {

constexpr int64_t kMostBytes = 1 << 16;
// Version 1 writes "no limit" as a number near 2^63.
constexpr double kNoLimit = 0x1p60;

std::string Text(const std::string& path) {
  return ReadFile(path, kMostBytes).value_or("");
}

std::vector<std::string_view> Split(std::string_view text, char at) {
  std::vector<std::string_view> parts;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(at, begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

// The number in a file; none for "max", -1 and what is no number.
std::optional<double> Number(std::string_view text) {
  while (!text.empty() && text.back() == '\n') text.remove_suffix(1);
  const auto value = ParseNumber<double>(text);
  return value && *value > 0 && *value < kNoLimit ? value : std::nullopt;
}

void Lower(double& limit, std::optional<double> other) {
  if (other && (limit == 0 || *other < limit)) limit = *other;
}

// Every folder of a hierarchy from the process's group up to the root of the mount. A container may see the
// host's path in /proc where its mount begins at its own group: what is not there has no say.
void ForEachGroup(const std::string& mount, std::string_view group,
                  const std::function<void(const std::string&)>& look) {
  while (!group.empty() && group.back() == '/') group.remove_suffix(1);
  for (;;) {
    look(mount + std::string(group));
    const std::size_t slash = group.rfind('/');
    if (slash == std::string_view::npos) return;
    group = group.substr(0, slash);
  }
}

std::optional<double> Quota(std::string_view quota, std::string_view period) {
  const auto q = Number(quota), p = Number(period);
  if (!q || !p) return std::nullopt;
  return *q / *p;
}

int AffinityCpus() {
  // Masks of machines with more than 1024 CPUs do not fit into a cpu_set_t.
  for (int most = CPU_SETSIZE; most <= 1 << 20; most *= 4) {
    cpu_set_t* set = CPU_ALLOC(static_cast<std::size_t>(most));
    if (!set) break;
    const std::size_t bytes = CPU_ALLOC_SIZE(static_cast<std::size_t>(most));
    const int n = sched_getaffinity(0, bytes, set) == 0 ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (n > 0) return n;
  }
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

}  // namespace

int MachineLimits::threads() const {
  const int granted = cpu_quota > 0 ? static_cast<int>(std::min(cpu_quota, 1e6)) : cpus;
  return std::max(1, std::min(cpus, granted));
}

int64_t MachineLimits::usable_memory() const {
  if (memory_cap <= 0) return memory;
  return memory > 0 ? std::min(memory, memory_cap) : memory_cap;
}

MachineLimits ReadMachineLimits(const std::string& root) {
  MachineLimits limits;
  limits.cpus = AffinityCpus();
  const int64_t pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  if (pages > 0 && page > 0) limits.memory = pages * page;
  double cap = 0;
  const std::string mount = root + "/sys/fs/cgroup", groups = Text(root + "/proc/self/cgroup");
  for (const std::string_view line : Split(groups, '\n')) {
    const auto fields = Split(line, ':');  // id:controllers:path, where the path may hold colons
    if (fields.size() < 3) continue;
    const std::string_view path = line.substr(fields[0].size() + fields[1].size() + 2);
    const auto controllers = Split(fields[1], ',');
    const auto has = [&](std::string_view name) {
      return std::find(controllers.begin(), controllers.end(), name) != controllers.end();
    };
    if (fields[1].empty()) {
      for (const char* at : {"", "/unified"})
        ForEachGroup(mount + at, path, [&](const std::string& group) {
          const std::string cpu = Text(group + "/cpu.max");
          const std::size_t space = std::min(cpu.find(' '), cpu.size());
          Lower(limits.cpu_quota,
                Quota(cpu.substr(0, space), space < cpu.size() ? cpu.substr(space + 1) : std::string()));
          Lower(cap, Number(Text(group + "/memory.max")));
        });
      continue;
    }
    for (const std::string& at : {mount + "/" + std::string(fields[1]), mount + "/cpu", mount + "/memory"})
      ForEachGroup(at, path, [&](const std::string& group) {
        if (has("cpu"))
          Lower(limits.cpu_quota,
                Quota(Text(group + "/cpu.cfs_quota_us"), Text(group + "/cpu.cfs_period_us")));
        if (has("memory")) Lower(cap, Number(Text(group + "/memory.limit_in_bytes")));
      });
  }
  limits.memory_cap = static_cast<int64_t>(cap);
  return limits;
}

}  // namespace moend
