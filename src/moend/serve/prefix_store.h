// Saves and loads prefixes on a thread of its own, so that a slow disk or a dead server never holds up
// decoding. Failures and corrupt values are warnings: the prompt is then read again.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "moend/serve/kv_store.h"
#include "moend/serve/log.h"
#include "moend/serve/saved_prefix.h"

namespace moend::serve {

class PrefixStore {
 public:
  // Stores are asked in this order; saves go to all.
  PrefixStore(std::vector<std::unique_ptr<KvStore>> stores, Log log);
  ~PrefixStore();  // finishes the saves that wait

  // `done` is called on the store's thread, once, with the longest saved prefix of `tokens` whose length is
  // among `lengths` (ascending), or with nothing.
  void Load(std::string cache_id, std::string scope, std::vector<int32_t> tokens,
            std::vector<int64_t> lengths, std::function<void(std::optional<SavedPrefix>)> done);
  // Dropped with a warning when too many bytes wait already.
  void Save(SavedPrefix prefix);
  // Waits until nothing is left to do.
  void Flush();

 private:
  void Run();
  void DoSave(const SavedPrefix& prefix);
  std::optional<SavedPrefix> DoLoad(const std::string& cache_id, const std::string& scope,
                                    const std::vector<int32_t>& tokens, const std::vector<int64_t>& lengths);

  std::vector<std::unique_ptr<KvStore>> stores_;
  Log log_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> loads_, saves_;  // loads go first: someone waits for them
  int64_t waiting_bytes_ = 0;
  bool busy_ = false, stop_ = false;
  std::thread thread_;
};

}  // namespace moend::serve
