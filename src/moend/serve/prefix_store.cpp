#include "moend/serve/prefix_store.h"

#include <algorithm>

namespace moend::serve {
namespace {

constexpr int64_t kMaxWaitingBytes = int64_t{256} << 20;

}  // namespace

PrefixStore::PrefixStore(std::vector<std::unique_ptr<KvStore>> stores, Log log)
    : stores_(std::move(stores)), log_(std::move(log)) {
  loader_.thread = std::thread([this] { Run(loader_); });
  saver_.thread = std::thread([this] { Run(saver_); });
}

PrefixStore::~PrefixStore() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  loader_.thread.join();
  saver_.thread.join();
}

void PrefixStore::Run(Worker& worker) {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return stop_ || !worker.tasks.empty(); });
    if (worker.tasks.empty()) return;  // stopping, and all is done
    const auto task = std::move(worker.tasks.front());
    worker.tasks.pop_front();
    worker.busy = true;
    lock.unlock();
    task();
    lock.lock();
    worker.busy = false;
    changed_.notify_all();
  }
}

void PrefixStore::Flush() {
  std::unique_lock lock(mutex_);
  const auto idle = [](const Worker& w) { return !w.busy && w.tasks.empty(); };
  changed_.wait(lock, [&] { return idle(loader_) && idle(saver_); });
}

void PrefixStore::Load(std::string cache_id, std::string scope, std::vector<int32_t> tokens,
                       std::vector<int64_t> lengths, std::function<void(std::optional<SavedPrefix>)> done,
                       std::function<bool(bool found)> wanted) {
  {
    const std::lock_guard lock(mutex_);
    loader_.tasks.push_back([this, cache_id = std::move(cache_id), scope = std::move(scope),
                             tokens = std::move(tokens), lengths = std::move(lengths), done = std::move(done),
                             wanted = std::move(wanted)] {
      std::optional<SavedPrefix> found;
      try {
        if (!wanted || wanted(false)) found = DoLoad(cache_id, scope, tokens, lengths, wanted);
      } catch (const std::exception& e) {  // memory
        log_.Warning("a saved prefix could not be loaded: {}", e.what());
      }
      done(std::move(found));
    });
  }
  changed_.notify_all();
}

void PrefixStore::Save(SavedPrefix prefix) {
  const auto bytes = static_cast<int64_t>(prefix.payload.size());
  {
    const std::lock_guard lock(mutex_);
    if (waiting_bytes_ + bytes > kMaxWaitingBytes) {
      log_.Warning("a prefix of {} tokens is not saved: {} MiB wait to be written already",
                   prefix.tokens.size(), waiting_bytes_ >> 20);
      return;
    }
    waiting_bytes_ += bytes;
    auto shared = std::make_shared<SavedPrefix>(std::move(prefix));
    saver_.tasks.push_back([this, shared, bytes] {
      try {
        DoSave(*shared);
      } catch (const std::exception& e) {
        log_.Warning("a prefix could not be saved: {}", e.what());
      }
      const std::lock_guard inner(mutex_);
      waiting_bytes_ -= bytes;
    });
  }
  changed_.notify_all();
}

void PrefixStore::DoSave(const SavedPrefix& prefix) {
  const int64_t length = std::ssize(prefix.tokens);
  const std::string name = PrefixNames(prefix.cache_id, prefix.scope, prefix.tokens, {&length, 1})[0];
  std::string bytes;
  for (const auto& store : stores_) {
    auto present = store->FirstPresent({&name, 1});
    if (present && *present) continue;  // the same tokens give the same context
    if (bytes.empty()) bytes = Encode(prefix);
    if (auto ok = store->Put(name, bytes); !ok)
      log_.Warning("{}: a prefix of {} tokens is not saved: {}", store->description(), length,
                   ok.error().message);
  }
}

std::optional<SavedPrefix> PrefixStore::DoLoad(const std::string& cache_id, const std::string& scope,
                                               const std::vector<int32_t>& tokens,
                                               const std::vector<int64_t>& lengths,
                                               const std::function<bool(bool)>& wanted) {
  std::vector<std::string> names = PrefixNames(cache_id, scope, tokens, lengths);
  std::ranges::reverse(names);  // longest first
  for (const auto& store : stores_) {
    std::span<const std::string> left = names;
    while (!left.empty()) {
      auto present = store->FirstPresent(left);
      if (!present) {
        log_.Warning("{}: {}", store->description(), present.error().message);
        break;
      }
      if (!*present) break;
      const std::string& name = left[static_cast<std::size_t>(**present)];
      left = left.subspan(static_cast<std::size_t>(**present) + 1);
      if (wanted && !wanted(true)) return std::nullopt;
      auto bytes = store->Get(name);
      if (!bytes) {
        if (bytes.error().code != ErrorCode::kNotFound)
          log_.Warning("{}: {}: {}", store->description(), name, bytes.error().message);
        continue;
      }
      auto saved = Decode(*bytes);
      if (!saved) {
        log_.Warning("{}: {} is ignored and removed: {}", store->description(), name, saved.error().message);
        [[maybe_unused]] const auto removed = store->Remove(name);
        continue;
      }
      // Well formed, but for something else: another model, another key, or a hash that two prompts share.
      if (saved->cache_id != cache_id || saved->scope != scope || saved->tokens.empty() ||
          saved->tokens.size() >= tokens.size() ||
          !std::equal(saved->tokens.begin(), saved->tokens.end(), tokens.begin())) {
        log_.Warning("{}: {} is ignored: it was saved for other tokens", store->description(), name);
        continue;
      }
      return std::move(*saved);
    }
  }
  return std::nullopt;
}

}  // namespace moend::serve
