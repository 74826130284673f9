// A store in memory that can be made to wait.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "moend/serve/prefix_store.h"

namespace moend::serve::test {

// Looking for names waits until `answers` is true.
struct SlowStore : KvStore {
  std::mutex mutex;
  std::map<std::string, std::string>& values;
  std::atomic<bool>& answers;
  SlowStore(std::map<std::string, std::string>& v, std::atomic<bool>& a) : values(v), answers(a) {}
  std::string description() const override { return "map"; }
  Expected<std::optional<int64_t>> FirstPresent(std::span<const std::string> names) override {
    answers.wait(false);
    const std::lock_guard lock(mutex);
    for (std::size_t i = 0; i < names.size(); ++i)
      if (values.contains(names[i])) return static_cast<int64_t>(i);
    return std::nullopt;
  }
  Expected<std::string> Get(const std::string& name) override {
    const std::lock_guard lock(mutex);
    return values.at(name);
  }
  Expected<void> Put(const std::string& name, std::string_view bytes) override {
    const std::lock_guard lock(mutex);
    values[name] = bytes;
    return {};
  }
  Expected<void> Remove(const std::string& name) override {
    const std::lock_guard lock(mutex);
    values.erase(name);
    return {};
  }
};

inline std::unique_ptr<PrefixStore> MakeSlowStore(std::map<std::string, std::string>& values,
                                                  std::atomic<bool>& answers) {
  std::vector<std::unique_ptr<KvStore>> stores;
  stores.push_back(std::make_unique<SlowStore>(values, answers));
  return std::make_unique<PrefixStore>(std::move(stores), Log());
}

}  // namespace moend::serve::test
