// Where idle prefixes are kept outside of this process: a folder, or a Valkey/Redis that several servers
// share. A store holds named byte strings; what they mean is in saved_prefix.h.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "moend/base/error.h"

namespace moend::serve {

// Thread safe: one thread may save while another one loads.
class KvStore {
 public:
  virtual ~KvStore() = default;
  virtual std::string description() const = 0;  // for messages; holds no password
  // The first of the names that is present, as an index.
  virtual Expected<std::optional<int64_t>> FirstPresent(std::span<const std::string> names) = 0;
  virtual Expected<std::string> Get(const std::string& name) = 0;  // kNotFound
  virtual Expected<void> Put(const std::string& name, std::string_view bytes) = 0;
  virtual Expected<void> Remove(const std::string& name) = 0;
};

// Files below `dir`, which is made if it is missing. The oldest files go when they take more than
// `max_bytes`.
Expected<std::unique_ptr<KvStore>> OpenDiskStore(const std::string& dir, int64_t max_bytes);

// redis://[user:password@]host[:port][/database] or unix:///path/to.sock. Values expire `ttl_seconds` after
// their last use. Connects when first needed and again after errors. A server that lets 200 ms pass without a
// byte, or 5 s with an answer incomplete, counts as dead for some seconds; so does one that announces or
// sends more than an answer of ours can have. kInvalidArgument for a URL that is none.
Expected<std::unique_ptr<KvStore>> OpenRedisStore(const std::string& url, int64_t ttl_seconds);

}  // namespace moend::serve
