// Saves and loads prefixes, each on a thread of its own, so that a slow disk or a dead server never holds up
// decoding, nor a long save a load. Failures and corrupt values are warnings: the prompt is then read again.
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
  // among `lengths` (ascending), or with nothing. `wanted`, if there is one, is asked before the stores are
  // (false), and when one has a prefix, before its bytes are fetched (true); if it says no, the answer is
  // nothing.
  void Load(std::string cache_id, std::string scope, std::vector<int32_t> tokens,
            std::vector<int64_t> lengths, std::function<void(std::optional<SavedPrefix>)> done,
            std::function<bool(bool found)> wanted = {});
  // Dropped with a warning when too many bytes wait already.
  void Save(SavedPrefix prefix);
  // Waits until nothing is left to do.
  void Flush();

 private:
  // The tasks of one thread, in order.
  struct Worker {
    std::deque<std::function<void()>> tasks;
    bool busy = false;
    std::thread thread;
  };
  void Run(Worker& worker);
  void DoSave(const SavedPrefix& prefix);
  std::optional<SavedPrefix> DoLoad(const std::string& cache_id, const std::string& scope,
                                    const std::vector<int32_t>& tokens, const std::vector<int64_t>& lengths,
                                    const std::function<bool(bool)>& wanted);

  std::vector<std::unique_ptr<KvStore>> stores_;
  Log log_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t waiting_bytes_ = 0;
  bool stop_ = false;
  Worker loader_, saver_;
};

}  // namespace moend::serve
